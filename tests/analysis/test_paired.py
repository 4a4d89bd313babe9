"""Verdicts on pairs: by rule on made-up rounds, and by simulation on a machine whose speed wanders."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest

from longctx.analysis.paired import GUARD, PairedCell, interval, judge, judge_samples, judge_saved, sentence
from longctx.results import BenchmarkResult

CPU = GUARD["cpu"]


def verdict_of(*ratios: float, guard: float = CPU) -> str:
    """The verdict on rounds of these ratios."""
    return judge_samples([[ratio] * 3 for ratio in ratios], [[1.0] * 3 for _ in ratios], guard=guard).verdict


def row(name: str = "New", *, samples=None, **values) -> BenchmarkResult:
    samples = [[1.0] * 4] * 5 if samples is None else samples
    median = statistics.median(map(statistics.median, samples)) if samples else None
    shared = {"sequence_length": 64, "samples": samples, "forward_time_median": median}
    return BenchmarkResult(block_name=name, **(shared | values))


# -- the rule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "verdict"),
    [
        ([1.08, 1.07, 1.09, 1.08, 1.06], "slower"),
        ([0.93, 0.92, 0.94, 0.925, 0.93], "faster"),
        ([2.0, 2.1, 1.9, 2.0, 2.2], "slower"),
        ([1.0, 1.01, 0.99, 1.005, 0.995], "same"),
        ([1.025, 1.02, 1.029, 1.021, 1.02], "same"),
        # One that disagrees, one on the border, rounds far apart, four of five that are certain.
        ([1.08, 1.07, 1.09, 1.08, 0.99], "inconclusive"),
        ([1.08, 1.07, 1.09, 1.08, 1.005], "inconclusive"),
        ([1.011, 1.02, 1.4, 1.5, 1.04], "inconclusive"),
        ([1.02, 1.02, 1.02, 1.02, 1.04], "inconclusive"),
        ([1.08, 1.07, 1.09, 1.08], "inconclusive"),
        ([1.0, 1.0, 1.0, 1.0], "inconclusive"),
        ([], "inconclusive"),
    ],
)
def test_rounds_make_a_verdict(rounds, verdict):
    assert verdict_of(*rounds) == verdict
    mirrored = {"faster": "slower", "slower": "faster"}.get(verdict, verdict)
    assert verdict_of(*(1 / ratio for ratio in rounds)) == mirrored


def test_the_guard_decides_what_is_no_difference():
    rounds = [1.02, 1.022, 1.021, 1.019, 1.02]
    assert verdict_of(*rounds) == "same"
    assert verdict_of(*rounds, guard=GUARD["cuda"]) == "slower"
    assert verdict_of(1.08, 1.07, 1.09, 1.08, 1.06, guard=0.2) == "same"


def test_more_rounds_than_five_forgive_one_that_is_off():
    assert verdict_of(*[1.08] * 5, 0.99) == "inconclusive"
    assert verdict_of(*[1.08] * 9, 0.99) == "slower"


def test_the_interval_is_that_of_the_median_over_rounds():
    assert interval([1.0, 1.1, 1.2, 1.3, 1.4]) == (1.0, 1.4, pytest.approx(0.9375))
    low, high, confidence = interval([float(n) for n in range(1, 13)])
    assert (low, high, confidence) == (3.0, 10.0, 0.95)


def test_samples_in_the_same_place_belong_together():
    # The machine slows down threefold; only neighbours tell that ours takes 1.1 times as long.
    drift = [1.0, 1.5, 2.0, 2.5, 3.0]
    ours, theirs = [[1.1 * d for d in drift]] * 5, [drift] * 5
    found = judge_samples(ours, theirs, guard=CPU)
    assert found.ratio == pytest.approx(1.1)
    assert found.rounds == pytest.approx([1.1] * 5)
    assert (found.verdict, found.pairs) == ("slower", 25)


def test_samples_that_are_no_times_are_left_out():
    found = judge_samples([[1.0, 0.0, 2.0, math.inf]] * 5, [[1.0, 1.0, 2.0, 1.0]] * 5, guard=CPU)
    assert (found.verdict, found.pairs) == ("same", 10)
    assert judge_samples([[0.0]], [[1.0]], guard=CPU).ratio is None


# -- rows ----------------------------------------------------------------------------------------------------------


def test_a_side_that_is_not_ok_makes_the_pair_not_ok():
    failed = row(status="crashed", samples=[])
    for ours, theirs in ((failed, row("Old")), (row("Old"), failed), (failed, failed)):
        cell = judge(ours, theirs)
        assert cell.outcome.verdict == "not ok"
        assert cell.outcome.reason == "New is crashed"
        assert cell.outcome.ratio is None
    assert judge(failed, row("Old")).regressed
    assert not judge(row("Old"), failed).regressed
    assert not judge(failed, failed).regressed


def test_the_guard_suits_the_device():
    assert judge(row(), row("Old")).outcome.guard == 0.03
    gpu = {"environment": {"gpu": "A GPU"}}
    assert judge(row(**gpu), row("Old", **gpu)).outcome.guard == 0.01
    assert judge(row(), row("Old"), guard=0.2).outcome.guard == 0.2


def test_a_pair_is_plain_data():
    told = judge(row(samples=[[1.1] * 4] * 5), row("Old")).to_json()
    assert json.loads(json.dumps(told, allow_nan=False)) == told | {"rounds": [1.1] * 5}
    assert list(told)[:5] == ["block_name", "against", "sequence_length", "time_s", "against_time_s"]
    assert (told["verdict"], told["ratio"], told["pairs"]) == ("slower", 1.1, 20)


def told(*ratios: float) -> str:
    cells = [
        judge(row(samples=[[ratio] * 4] * 5, sequence_length=64 << n), row("Old")) for n, ratio in enumerate(ratios)
    ]
    return sentence(cells)


def test_the_sentence_says_what_was_found():
    assert told(1.1) == "At 64 tokens New is slower than Old: 1.100x the time (1.100 to 1.100 over 5 rounds)."
    assert "as fast as Old to within 3.0%" in told(1.0)
    assert told(1.1, 1.0, 0.5) == (
        "Of 3 cells: 1 faster, 1 slower, 1 same. The largest difference: New at 256 tokens, 0.500x."
    )
    assert told(1.0, 1.0) == "Of 2 cells: 2 same."
    few = judge(row(samples=[[1.1]]), row("Old", samples=[[1.0]]))
    assert "inconclusive: 1 round; it takes 5; raise --rounds" in sentence([few])
    assert "cannot be compared: New is oom" in sentence(
        [PairedCell(ours=row(), theirs=row(), outcome=judge(row(status="oom"), row()).outcome)]
    )


# -- a machine whose speed wanders ---------------------------------------------------------------------------------


def wandering(chance: random.Random):
    """Seconds that a call of one second takes at a moment: tens of percent from second to second, and spikes."""
    level, tempo, phase = 1.0, chance.uniform(0.5, 3.0), chance.uniform(0, 6)
    moment = 0.0

    def cost(at_s: float) -> float:
        nonlocal level, moment
        while moment < at_s:
            moment += 0.05
            level = max(0.7, min(2.0, level + chance.gauss(0.0, 0.06)))
        slow = level * (1 + 0.15 * math.sin(tempo * at_s + phase))
        spike = chance.expovariate(1.5) if chance.random() < 0.15 else 0.0
        return slow * (1 + spike + abs(chance.gauss(0.0, 0.03)))

    return cost


def simulate(seed: int, effect: float):
    """Samples of both sides as a sweep takes them: 40 pairs of turns a round, each side's process a little apart."""
    chance = random.Random(seed)
    ours, theirs = [], []
    for _ in range(5):
        cost, at_s = wandering(chance), 0.0
        call_s = [0.004 * effect * math.exp(chance.gauss(0.0, 0.008)), 0.004 * math.exp(chance.gauss(0.0, 0.008))]
        taken = [[], []]
        for turn in range(40):
            for side in (0, 1) if turn % 2 == 0 else (1, 0):
                for _ in range(5):
                    seconds = call_s[side] * cost(at_s)
                    at_s += seconds
                    taken[side].append(seconds)
        ours.append(taken[0])
        theirs.append(taken[1])
    return ours, theirs


def verdicts(effect: float) -> list[str]:
    return [judge_samples(*simulate(seed, effect), guard=CPU).verdict for seed in range(200)]


def test_equal_sides_are_not_called_different():
    found = verdicts(1.0)
    assert found.count("same") + found.count("inconclusive") >= 199
    assert found.count("same") >= 150


@pytest.mark.parametrize(("effect", "verdict"), [(1.08, "slower"), (1 / 1.08, "faster")])
def test_eight_percent_are_caught(effect, verdict):
    assert verdicts(effect).count(verdict) >= 190


def test_the_machine_of_the_simulation_is_a_hard_one():
    """Medians of the same code, run one after the other, lie more than a tenth apart."""
    apart = []
    for seed in range(50):
        rounds = zip(simulate(seed, 1.0)[0], simulate(seed + 1000, 1.0)[0], strict=True)
        apart += [abs(math.log(statistics.median(a) / statistics.median(b))) for a, b in rounds]
    assert statistics.median(apart) > 0.1


def test_a_saved_run_knows_its_pairs_and_its_guard():
    slow = [[1.02] * 4] * 5
    ours = row("New", samples=slow, config={"against": {"opponent": "Old", "guard": 0.01}})
    theirs = row("Old", config={"against": {"opponent": None, "guard": 0.01}})
    (cell,) = judge_saved([theirs, ours])
    assert (cell.ours, cell.theirs, cell.outcome.verdict) == (ours, theirs, "slower")
    ours.config["against"]["guard"] = None
    assert judge_saved([ours, theirs])[0].outcome.verdict == "same"
    assert judge_saved([ours]) == judge_saved([row("New"), row("Old")]) == []
