"""Verdicts on made-up runs: how often they are false, how much they miss, and which cells are the same cell."""

import itertools
import math
import random
import statistics

import pytest

from longctx.analysis.comparison import compare, compare_memory
from longctx.analysis.matching import pair
from longctx.analysis.settle import settling, with_rounds
from longctx.analysis.shift import interval_rank, shift_between
from longctx.errors import LongctxError, UsageError
from longctx.results import BenchmarkResult
from longctx.terminal.comparison import settle_lines

CPU = {"cpu": "A processor", "device": "cpu", "threads": 2, "torch": "2.13.0", "flags": {"tf32_matmul": False}}
GPU = CPU | {"gpu": "A card", "device": "cuda:0"}
SHAPE = {"d_model": 64, "n_heads": 8, "num_kv_heads": None}


def row(rounds=(1.0,) * 5, *, name="BLADE", length=1024, **fields):
    fields = {"dtype": "fp32", "config": SHAPE, "environment": CPU, "block_options": {"chunk_size": 512}} | fields
    return BenchmarkResult(block_name=name, sequence_length=length, samples=[[v] * 3 for v in rounds], **fields)


def cell(base, new, **options):
    """The one cell of two sides, each given as rows of one file."""
    (found,) = compare({"a.json": base}, {"b.json": new}, **options).cells
    return found


def noisy(rng, noise, *, rounds=5, factor=1.0):
    return [factor * (1 + rng.gauss(0, noise)) for _ in range(rounds)]


def verdicts(seeds, *, noise, effect=1.0, drift=lambda rng: 1.0, rounds=5):
    found = []
    for seed in range(seeds):
        rng = random.Random(seed)
        base, new = noisy(rng, noise, rounds=rounds), noisy(rng, noise, rounds=rounds, factor=effect * drift(rng))
        found.append(cell([row(base)], [row(new)]).verdict)
    return found


# -- the ratio and its interval ------------------------------------------------------------------------------------


def test_the_ratio_is_the_median_of_all_pairs():
    base, new = [1.0, 2.0, 4.0], [3.0, 5.0]
    found = shift_between(base, new)
    assert found.ratio == pytest.approx(statistics.median(n / b for n in new for b in base))
    assert shift_between([], new) is None


def test_one_bad_round_does_not_move_the_ratio():
    assert shift_between([1.0, 1.01, 0.99, 1.0, 9.0], [1.0, 1.01, 0.99, 1.0, 1.0]).ratio == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("n", "m"), [(2, 3), (3, 3), (4, 4), (5, 5), (5, 7), (8, 8)])
def test_the_confidence_is_that_of_all_orders(n, m):
    rank, confidence = interval_rank(n, m)
    # U of every way in which n of n + m places fall to one side.
    counts = [sum(p - i for i, p in enumerate(places)) for places in itertools.combinations(range(n + m), n)]
    miss = [2 * sum(u <= k for u in counts) / len(counts) for k in range(n * m)]
    assert confidence == pytest.approx(1 - miss[rank - 1])
    assert confidence >= 0.95 or rank == 1
    assert miss[rank] > 0.05


def test_the_interval_is_the_widest_where_95_percent_cannot_be_had():
    found = shift_between([1.0, 1.0, 1.1], [1.2, 1.3, 1.4])
    assert (found.low, found.high, found.confidence) == (pytest.approx(1.2 / 1.1), 1.4, pytest.approx(0.9))
    assert shift_between([1.0], [2.0]).confidence is None
    assert interval_rank(5, 5)[1] == pytest.approx(1 - 2 * 4 / 252)


def test_many_rounds_are_no_burden():
    rng = random.Random(0)
    found = shift_between(noisy(rng, 0.03, rounds=5000), noisy(rng, 0.03, rounds=5000, factor=1.1))
    assert found.ratio == pytest.approx(1.1, rel=0.01) and 1.08 < found.low < found.high < 1.12
    exact, normal = interval_rank(50, 50)[0], 1250 - 1.96 * math.sqrt(2500 * 101 / 12)
    assert abs(exact - normal) < 2


# -- how often a verdict is false, and how much is missed ----------------------------------------------------------


@pytest.mark.parametrize(
    "drift",
    [lambda rng: rng.choice((1.04, 1 / 1.04)), lambda rng: 1 + rng.gauss(0, 0.04), lambda rng: 1.0],
    ids=["always 4%", "sd 4%", "none"],
)
def test_a_against_a_is_hardly_ever_told_apart(drift):
    found = verdicts(300, noise=0.03, drift=drift)
    assert found.count("slower") + found.count("faster") <= 3


def test_half_as_slow_again_is_always_found():
    assert set(verdicts(300, noise=0.03, effect=1.5, drift=lambda rng: 1 + rng.gauss(0, 0.04))) == {"slower"}
    assert set(verdicts(300, noise=0.03, effect=1 / 1.5, drift=lambda rng: 1 + rng.gauss(0, 0.04))) == {"faster"}


def test_a_tenth_is_found_on_a_quiet_machine():
    assert verdicts(300, noise=0.01, effect=1.1).count("slower") >= 285


@pytest.mark.parametrize("rounds", [1, 2, 3, 4])
def test_few_rounds_prove_nothing(rounds):
    assert set(verdicts(50, noise=0.001, effect=3.0, rounds=rounds)) == {"inconclusive"}
    assert set(verdicts(50, noise=0.001, rounds=rounds)) == {"inconclusive"}


def test_a_shift_within_the_spread_between_rounds_proves_nothing():
    base, new = [1.00, 1.02, 1.05, 1.08, 1.10], [1.101, 1.12, 1.15, 1.18, 1.21]
    found = cell([row(base)], [row(new)])
    assert (found.verdict, found.reason) == ("inconclusive", "rounds of one side lie 10% apart, more than the shift")
    assert "rounds of one side lie among" in cell([row(base)], [row([1.09, *new[1:]])]).reason


def test_the_guard_is_that_of_the_device_or_the_one_asked_for():
    base, new = [1.0, 1.001, 1.002, 0.999, 0.998], [1.035, 1.036, 1.037, 1.034, 1.033]
    assert cell([row(base)], [row(new)]).verdict == "same"
    assert cell([row(base, environment=GPU)], [row(new, environment=GPU)]).verdict == "slower"
    assert cell([row(base)], [row(new)], guard=0.01).verdict == "slower"
    assert cell([row(base, environment=GPU)], [row(new, environment=GPU)], guard=0.1).verdict == "same"
    for guard in (-0.01, 1.01, math.nan):
        with pytest.raises(UsageError):
            cell([row()], [row()], guard=guard)


def test_a_shift_that_nothing_recorded_explains_is_marked():
    new = row([1.5] * 5, source_hash="a")
    assert cell([row(source_hash="a")], [new]).unexplained
    assert not cell([row(source_hash="b")], [new]).unexplained
    assert not cell([row(source_hash="a", environment=CPU | {"torch": "2.12.0"})], [new]).unexplained


# -- memory --------------------------------------------------------------------------------------------------------


def test_memory_is_exact_on_cuda_and_guarded_on_a_cpu():
    size = 100 << 20
    assert compare_memory([size], [size + 1], exact=True).word == "more"
    assert compare_memory([size], [size], exact=True).word == "same"
    assert compare_memory([size], [size + (2 << 20)], exact=False).word == "same"
    assert compare_memory([size], [size + (2 << 20) + 1], exact=False).word == "more"
    assert compare_memory([100 * size], [99 * size + 1], exact=False).word == "same"
    assert compare_memory([100 * size], [98 * size], exact=False).word == "less"
    assert compare_memory([0], [size], exact=True).word == "more"
    assert compare_memory([size, 3 * size], [size, 4 * size], exact=True).word == "varies"
    assert compare_memory([], [size], exact=True) is None


def test_memory_that_grew_is_a_regression_and_no_verdict_on_time():
    found = cell([row(peak_memory_mb=10.0, environment=GPU)], [row(peak_memory_mb=10.5, environment=GPU)])
    assert (found.verdict, found.memory.word, found.regression) == ("same", "more", True)
    assert found.memory.new_bytes - found.memory.base_bytes == 1 << 19


# -- statuses ------------------------------------------------------------------------------------------------------


def test_what_was_ok_and_is_not_is_a_regression():
    error = {"type": "X", "message": "it broke"}
    found = cell([row()], [row((), status="crashed", error=error)])
    assert (found.verdict, found.reason, found.regression) == ("not ok", "it broke", True)
    assert not cell([row((), status="oom")], [row()]).regression
    assert not cell([row((), status="oom")], [row((), status="oom")]).regression


def test_a_block_that_does_not_load_any_more_is_the_same_cell():
    # It never told its options.
    assert cell([row()], [row((), status="crashed", block_options={})]).no_longer_ok


def test_one_bad_file_of_several_is_enough():
    found = compare({"a": [row()]}, {"b": [row()], "c": [row((), status="timeout")]})
    assert found.cells[0].no_longer_ok


def test_the_sentence_counts():
    base = [row(name=name) for name in "ABCDE"]
    new = [row([1.5] * 5, name="A"), row([0.5] * 5, name="B"), row(name="C"), row((1.0,), name="D"), row(name="F")]
    found = compare({"a": base}, {"b": new})
    assert found.sentence == (
        "1 of 4 cells is slower, 1 faster, 1 the same, 1 inconclusive, 1 only in base, 1 only in new"
    )
    assert [c.traits.name for c in found.undecided] == ["D", "E"]
    assert compare({"a": base}, {"b": base}).sentence == "5 of 5 cells are the same"


# -- which cells are the same --------------------------------------------------------------------------------------


def test_rounds_of_several_files_are_put_together():
    files = {"a": [row([1.0, 1.01, 1.02])], "b": [row([1.0, 0.99])]}
    found = compare(files, {"c": [row([1.3] * 5)]}).cells[0]
    assert found.verdict == "slower" and len(found.base.rounds) == 5


def test_a_copy_of_a_file_adds_no_rounds():
    mine = row([1.0, 1.01, 1.02])
    assert len(pair({"a": [mine], "copy": [mine]}, {"c": [row()]})[0].base.rounds) == 3


def test_the_later_row_of_a_cell_in_a_file_counts():
    assert cell([row([9.0] * 5, source_hash="old"), row()], [row()]).verdict == "same"


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Dense"},
        {"length": 2048},
        {"batch_size": 2},
        {"mode": "train"},
        {"block_options": {"chunk_size": 256}},
        {"config": SHAPE | {"d_model": 128}},
        {"config": SHAPE | {"n_heads": 4}},
        {"config": SHAPE | {"num_kv_heads": 2}},
        {"config": SHAPE | {"layers": 2}},
        {"config": SHAPE | {"scope": "model"}},
    ],
    ids=lambda change: ",".join(change) + ",".join(change.get("config", ())),
)
def test_other_cells_are_not_compared(change):
    with pytest.raises(LongctxError, match="no cell in common") as error:
        compare({"a": [row()]}, {"b": [row(**change)]})
    assert error.value.exit_code == 2 and "--allow-different" in error.value.hint
    found = compare({"a": [row()]}, {"b": [row(**change)]}, allow_different=True)
    assert sorted(c.verdict for c in found.cells) == ["only-in-base", "only-in-new"]
    assert found.sentence == "no cell is in both, 1 only in base, 1 only in new"


def test_steps_of_a_training_are_compared_step_by_step():
    base, new = ([row(training_step=step) for step in steps] for steps in ((100, 200), (200, 300)))
    found = compare({"a": base}, {"b": new}, allow_different=True)
    verdicts = {c.traits.training_step: c.verdict for c in found.cells}
    assert (verdicts[100], verdicts[300]) == ("only-in-base", "only-in-new")
    assert verdicts[200] not in ("only-in-base", "only-in-new")


def test_changed_options_are_named():
    new = [row(block_options={"chunk_size": 256}), row(name="Dense")]
    found = compare({"a": [row(), row(name="Dense")]}, {"b": new})
    assert {c.reason for c in found.cells if c.traits.name == "BLADE"} == {"the other side has it with other options"}


def test_as_many_key_value_heads_as_heads_is_the_default():
    assert cell([row()], [row(config=SHAPE | {"num_kv_heads": 8})]).verdict == "same"


def test_records_of_the_published_fields_are_matched_and_prove_nothing():
    old = BenchmarkResult(block_name="BLADE", sequence_length=1024, forward_time_mean=2.0, config={"d_model": 64})
    found = cell([old], [row()])
    assert (found.verdict, found.shift.ratio, found.shift.low) == ("inconclusive", 0.5, None)
    assert found.reason == "no rounds are recorded in base"


# -- what differs around them --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"environment": CPU | {"cpu": "Another"}}, "device A processor in base, Another in new"),
        ({"environment": GPU}, "kind of device CPU in base, GPU in new"),
        ({"environment": CPU | {"threads": 4}}, "threads 2 in base, 4 in new"),
        ({"environment": CPU | {"flags": {"tf32_matmul": True}}}, "TF32 in matmul off in base, on in new"),
        ({"dtype": "bf16"}, "dtype fp32 in base, bf16 in new"),
    ],
)
def test_what_leaves_nothing_to_compare_is_refused(change, word):
    with pytest.raises(LongctxError, match=word) as error:
        compare({"a": [row()]}, {"b": [row(**change)]})
    assert error.value.exit_code == 2 and "--allow-different" in error.value.hint
    found = compare({"a": [row()]}, {"b": [row(**change)]}, allow_different=True)
    assert found.cells[0].verdict == "same" and any(each.fatal for each in found.differences)


def test_files_of_one_side_must_agree_too():
    files = {"a": [row()], "b": [row([1.0, 1.1], environment=CPU | {"threads": 4})]}
    with pytest.raises(LongctxError, match="threads 2, 4 in base, 2 in new"):
        compare(files, {"c": [row()]})


def test_other_differences_are_listed_once():
    base = [row(name=name, source_hash="a" * 64, path="flash") for name in "AB"]
    settings = {"environment": CPU | {"torch": "2.14.0", "driver": "1"}, "config": SHAPE | {"cuda_graph": True}}
    new = [row(name=name, source_hash="b" * 64, path="math", **settings) for name in "AB"]
    found = [(each.name, each.base, each.new) for each in compare({"a": base}, {"b": new}).differences]
    assert found == [
        ("torch", "2.13.0", "2.14.0"),
        ("source of A", "a" * 12, "b" * 12),
        ("path of A", "flash", "math"),
        ("source of B", "a" * 12, "b" * 12),
        ("path of B", "flash", "math"),
    ]
    base[0].config = SHAPE | {"cuda_graph": False}
    assert ("cuda graph", "off", "on") in [
        (each.name, each.base, each.new) for each in compare({"a": base}, {"b": new}).differences
    ]


def test_of_what_is_not_told_nothing_is_said_but_that():
    (found,) = compare({"a": [row(environment={})]}, {"b": [row()]}).differences
    assert (found.name, found.base, found.new, found.fatal) == ("environment", "not recorded", "recorded", False)


def test_a_file_of_two_devices_is_matched_device_by_device():
    both = [row(), row([2.0] * 5, environment=GPU)]
    found = compare({"a": both}, {"b": both[::-1]})
    assert [c.verdict for c in found.cells] == ["same", "same"] and not found.differences


# -- what would settle it ------------------------------------------------------------------------------------------


def test_the_command_that_adds_rounds():
    command = "longctx sweep --blocks Dense 'my file.py:X' --rounds 3 --max-time 60 --output-file=old.json --force"
    assert with_rounds(command, "run.json", 5) == (
        "longctx sweep --blocks Dense 'my file.py:X' --rounds 5 --output-file ./run.json --resume"
    )
    assert with_rounds("longctx quick --seq-len 4096", "a/b.json", 6) == (
        "longctx sweep --sequence-lengths 4096 --benchmark-runs 5 --rounds 6 --output-file a/b.json --resume"
    )
    quoted = with_rounds("longctx sweep; rm -rf ~ $(date) `id`", "x", 5)
    assert quoted is None
    assert "'$(date)'" in with_rounds("longctx sweep --blocks $(date)", "x", 5)
    for text in ("", "rm -rf ~", "longctx", "longctx report", "longctx sweep 'open", "longctx sweep " + "x" * 5000):
        assert with_rounds(text, "x", 5) is None


def test_a_side_that_lacks_rounds_is_measured_on():
    command = "longctx sweep --blocks BLADE"
    few, enough = row([1.0] * 3, command=command), row([1.0, 1.2, 1.1, 1.3, 1.05], command=command)
    (found,) = settling(compare({"r/a.json": [few]}, {"r/b.json": [enough]}))
    assert (found.side, found.text) == ("base", f"{command} --rounds 5 --output-file r/a.json --resume")
    found = settling(compare({"r/a.json": [enough]}, {"r/b.json": [enough]}))
    assert [(c.side, c.text.split()[5]) for c in found] == [("base", "10"), ("new", "10")]
    files = {"r/a.json": [few], "r/b.json": [row([1.01], command=command)]}
    (found,) = settling(compare(files, {"r/c.json": [enough]}))
    assert found.text == f"{command} --rounds 5 --output-file r/b.json --resume"
    assert settling(compare({"a": [row()]}, {"b": [row()]})) == []
    # Nine percent apart, but either side's rounds scatter by four: twice as many would say no more.
    slower = row([1.09, 1.11, 1.10, 1.13, 1.12], command=command)
    steady = row([1.0, 1.02, 1.01, 1.04, 1.03], command=command)
    both = compare({"r/a.json": [steady]}, {"r/b.json": [slower]})
    assert both.cells[0].verdict == "inconclusive" and not both.cells[0].more_rounds_help
    assert settling(both) == []
    assert "--against" in settle_lines(both)[-1]


# -- files of strangers --------------------------------------------------------------------------------------------


def test_absurd_values_do_not_end_it():
    absurd = [
        BenchmarkResult(block_name="", sequence_length=1),
        BenchmarkResult(block_name="A", sequence_length=1, samples=[[math.nan], [], [0.0, -1.0]], status="ok"),
        BenchmarkResult(block_name="A", sequence_length=2, samples=[[1e-29], [1e29]] * 5, peak_memory_mb=math.nan),
        BenchmarkResult(block_name="A", sequence_length=3, config={"d_model": [1], "n_heads": {"a": 1}}, status=""),
        BenchmarkResult(block_name="A", sequence_length=4, environment={"flags": [1], "nvml": 3, "gpu": {"a": 1}}),
        BenchmarkResult(block_name="A", sequence_length=5, environment={"flags": {"device": "x", "tf32 x": {}}}),
        BenchmarkResult(block_name="A", sequence_length=6, config=[], environment=[], block_options=[], warnings="x"),
        BenchmarkResult(block_name="A", sequence_length=7, samples=[[1.0]] * 5, peak_memory_mb=1e29),
        row(),
    ]
    found = compare({"a": absurd}, {"b": absurd[::-1]})
    assert len(found.cells) == len(absurd)
    assert not {c.verdict for c in found.cells} & {"slower", "faster"}
    settling(found)
