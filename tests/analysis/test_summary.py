"""Curves, and what a run says."""

import pytest
from made_records import row, run

from longctx.analysis.conclusions import conclude
from longctx.analysis.series import METRICS, collect, metric_for
from longctx.analysis.summary import headline, problems, rankings, slopes


def test_curves_and_what_is_missing():
    curves, missing = collect({"": run()}, METRICS["time"])
    assert {c.name: len(c.points) for c in curves} == {"Dense": 3, "BLADE": 4, "Identity": 3}
    assert [(m.name, m.x, m.reason) for m in missing] == [("Dense", 8192, "oom")]
    _, missing = collect({"": run()}, METRICS["memory"])
    assert ("Identity", 1024, "no figure") in [(m.name, m.x, m.reason) for m in missing]


def test_a_later_record_of_the_same_cell_counts():
    rows = [row("A", 1024, status="oom"), row("A", 1024, 2.0)]
    assert collect({"": rows}, METRICS["time"])[0][0].points == [(1024, 2.0)]
    assert collect({"": rows}, METRICS["time"])[1] == []
    curves, missing = collect({"": rows[::-1]}, METRICS["time"])
    assert curves == [] and missing[0].reason == "oom"


def test_curves_are_named_by_what_differs():
    rows = [row("A", 1024, 1.0, dtype="fp32"), row("A", 1024, 2.0, dtype="bf16")]
    assert [c.name for c in collect({"": rows}, METRICS["time"])[0]] == ["A fp32", "A bf16"]
    rows_of_steps = [row("A", 1024, 1.0, training_step=step) for step in (100, 200)]
    assert [c.name for c in collect({"": rows_of_steps}, METRICS["time"])[0]] == ["A step=100", "A step=200"]
    assert [r.setting for r in rankings(rows_of_steps)] == [
        "step 100",
        "step 200",
    ]
    runs = {"old": rows[:1], "new": rows[:1]}
    assert [c.name for c in collect(runs, METRICS["time"])[0]] == ["A (old)", "A (new)"]


def test_memory_per_token_never_mixes_two_figures():
    published = [row("A", 1024, 1.0, memory_efficiency_mb_per_token=0.5)]
    ours = [row("A", 1024, 1.0, memory_efficiency_mb_per_token=0.5, peak_bytes_per_token=100.0)]
    assert metric_for("memory-per-token", published).value(published[0]) == 0.5 * 1024**2
    assert metric_for("memory-per-token", published + ours).value(published[0]) is None
    assert metric_for("memory-per-token", ours).value(ours[0]) == 100.0


def test_what_a_context_costs_in_decode_is_the_state():
    noisy = {"mode": "decode", "peak_memory_mb": 0.004, "peak_bytes_per_token": 3.0, "batch_size": 2}
    rows = [row("Dense", t, 1e-3, state_bytes=2 * 512 * t, **noisy) for t in (1024, 2048)]
    metric = metric_for("memory-per-token", rows)
    assert [metric.value(r) for r in rows] == [512.0, 512.0] and metric.title == "State per token"


def test_the_mode_is_in_the_title():
    assert metric_for("time", [row("A", 1024, 1.0, mode="train")]).title == "Train time"


def test_rankings_and_slopes():
    found = rankings(run())
    assert [r.length for r in found] == [1024, 2048, 4096, 8192]
    names = [ranked.result.block_name for ranked in found[2].rows]
    assert names == ["Identity", "BLADE", "Dense"]
    assert found[2].rows[1].ratio.value == pytest.approx(0.25)
    fits = {row.name: row for row in slopes(run())}
    assert fits["Dense"].time.slope == pytest.approx(2.0)
    assert fits["BLADE"].memory.slope == pytest.approx(1.0)
    assert fits["Dense"].memory is None


def test_rows_of_different_settings_are_ranked_apart():
    rows = [row("A", 1024, 1.0, dtype="fp32"), row("A", 1024, 2.0, dtype="bf16")]
    found = rankings(rows)
    assert [len(r.rows) for r in found] == [1, 1]
    assert "fp32" in found[0].setting and "bf16" in found[1].setting


def test_problems_carry_their_reason():
    ((result, why),) = problems(run())
    assert (result.status, why) == ("oom", "needs")
    wrong = row("A", 1, 1.0, status="wrong", gate={"passed": False, "reason": "looks ahead"}, error=None)
    assert problems([wrong])[0][1] == "looks ahead"


def test_headline():
    text = headline(run()[:9])
    assert "4,096" in text and "BLADE" in text and "4.00x faster than Dense" in text
    assert headline([]) is None
    assert headline([row("BLADE", 1024, 1.0)]) is None
    slow = [row("Dense", 1024, 1.0), row("BLADE", 1024, 2.0)]
    assert "Dense is faster" in headline(slow) and "2.00x" in headline(slow)


def test_headline_claims_nothing_that_the_rounds_contradict():
    dense, blade = row("Dense", 1024, 1.0), row("BLADE", 1024, 0.8)
    dense.samples, blade.samples = [[1.0], [1.0], [1.0]], [[0.8], [1.3], [0.7]]
    assert "3 rounds do not tell it from Dense" in headline([dense, blade])
    blade.samples = [[1.3], [0.8], [1.2]]
    assert "Dense is ahead" in headline([dense, blade]) and "from the next, BLADE" in headline([dense, blade])
    blade.samples = [[0.8], [0.9], [0.7]]
    assert "1.25x faster" in headline([dense, blade])


def test_the_summary_and_the_crossovers_agree():
    """Three rounds of one length agree by chance; those of all lengths say that it is noise."""
    rows = []
    for length, ratios in ((1024, (0.9, 1.1, 1.0)), (2048, (1.1, 0.95, 0.9)), (4096, (0.9, 0.95, 0.99))):
        rows += [row("Dense", length, 1.0), row("BLADE", length, 0.95)]
        rows[-2].samples, rows[-1].samples = [[1.0]] * 3, [[ratio] for ratio in ratios]
    found = conclude(rows)
    assert found.crossovers[0].verdict == "level"
    assert "1.05x faster" in headline(rows)
    assert "3 rounds do not tell it from Dense" in found.sentences[0]


def test_measured_lengths_are_said_exactly():
    rows = [row(name, t, t * 1e-3) for name in ("Dense", "BLADE") for t in (1024, 2048, 8192)]
    assert "from 1K to 8K alone" in " ".join(conclude(rows).sentences)


def test_headline_says_what_makes_it_doubtful():
    rows = [row("Dense", 1024, 1.0), row("BLADE", 1024, 0.5, warnings=["contended", "launch_bound"])]
    assert headline(rows).endswith("Not a firm result: contended.")
    assert "firm" not in headline(run()[:9])
