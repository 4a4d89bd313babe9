"""`plot` and `report` from files: the newest sweep, several files, files that hold anything, and no torch."""

import csv
import io
import json
import re
import subprocess
import sys

import pytest

from longctx.analysis.runs import is_of_older_source, name_older_sources
from longctx.results import BenchmarkResult

LENGTHS = (1024, 2048, 4096)
HOSTILE = "\x1b[31m[red]x[/red]|`<b>"


def rows(scale=1.0, *, name="BLADE"):
    found = [
        BenchmarkResult(
            block_name=block,
            sequence_length=length,
            forward_time_mean=scale * seconds,
            forward_time_median=scale * seconds,
            throughput_tokens_per_sec=length / seconds,
            peak_memory_mb=length / 64,
            allocated_memory_mb=length / 32,
            memory_efficiency_mb_per_token=1 / 32,
            peak_bytes_per_token=16384.0,
            samples=[[scale * seconds] * 6],
            dtype="fp32",
        )
        for length in LENGTHS
        for block, seconds in ((name, length * 1e-5), ("Dense", length**2 * 1e-8))
    ]
    error = {"type": "OutOfMemoryError", "message": "needs 9 GiB", "log_tail": ""}
    return [*found, BenchmarkResult(block_name="Dense", sequence_length=8192, status="oom", error=error)]


def write(path, results):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([result.to_json() for result in results]))
    return str(path)


@pytest.fixture
def saved(tmp_path):
    return write(tmp_path / "run.json", rows())


def test_all_five_pictures_of_a_file(longctx, saved):
    code, out, err = longctx("plot", saved)
    assert (code, err) == (0, "")
    titles = re.findall(r"^(\w[\w ]+) \([\w/]+\) over tokens", out, re.MULTILINE)
    assert titles == ["Forward time", "Throughput", "Peak memory", "Peak memory per token", "Scaling of time"]
    assert out.count("OOM at 8K: Dense") == 5
    assert "1K" in out and "4K" in out and "\x1b" not in out


@pytest.mark.parametrize("columns", [120, 80, 50])
def test_pictures_fit_the_terminal(longctx, saved, columns):
    _, out, _ = longctx("plot", saved, columns=columns)
    assert max(map(len, out.splitlines())) <= columns


def test_metrics_are_words_of_one_list(longctx, saved):
    code, out, _ = longctx("plot", saved, "--metric", "memory", "time")
    assert code == 0 and out.index("Peak memory") < out.index("Forward time") and "Throughput" not in out
    code, _, err = longctx("plot", saved, "--metric", "tme")
    assert code == 2 and "Did you mean 'time'?" in err


def test_several_files_are_laid_over_each_other(longctx, tmp_path, saved):
    other = write(tmp_path / "later" / "run.json", rows(2.0))
    code, out, _ = longctx("plot", saved, other, "--metric", "time")
    assert code == 0 and "BLADE (later/run)" in out and f"BLADE ({tmp_path.name}/run)" in out


def test_the_newest_sweep_is_the_default(longctx, tmp_path):
    for command in ("plot", "report"):
        code, out, err = longctx(command, "--results-dir", tmp_path / "none")
        assert (code, out) == (2, "") and "longctx sweep" in err
    write(tmp_path / "results" / "a.json", rows())
    code, out, _ = longctx("plot", "--results-dir", tmp_path / "results", "--metric", "scaling")
    assert code == 0 and "local slope" in out


@pytest.mark.parametrize("ending", ["txt", "html", "svg"])
def test_pictures_are_saved(longctx, tmp_path, saved, ending):
    target = tmp_path / f"out.{ending}"
    code, out, err = longctx("plot", saved, "--save", target)
    assert (code, out) == (0, "") and str(target) in err
    text = target.read_text(encoding="utf-8")
    assert "Forward" in text and "BLADE" in text
    assert not re.search(r"url\((?!#)|https?://(?!www\.w3\.org|www\.textualize\.io)", text)
    code, _, err = longctx("plot", saved, "--save", target)
    assert code == 2 and "exists" in err
    assert longctx("plot", saved, "--save", target, "--force")[0] == 0


def test_a_place_that_cannot_be_written_is_said(longctx, tmp_path, saved):
    assert longctx("plot", saved, "--save", tmp_path / "x.gif")[0] == 2
    (tmp_path / "file").write_text("")
    code, _, err = longctx("plot", saved, "--save", tmp_path / "file" / "x.svg")
    assert code == 2 and "cannot write" in err


def test_report_shows_tables_slopes_and_failures(longctx, saved):
    code, out, err = longctx("report", saved)
    assert (code, err) == (0, "")
    for words in ("BLADE", "Dense", "OOM", "needs 9 GiB", "local slope", "0.24x"):
        assert words in out, words
    assert "\x1b" not in out


def test_a_name_is_not_taken_for_a_ratio(longctx, tmp_path):
    path = write(tmp_path / "run.json", [row for row in rows(name="Mixer") if row.block_name != "Dense"])
    _, out, _ = longctx("report", path)
    assert "Fastest first\n" in out and "against Dense" not in out


@pytest.mark.parametrize("columns", [120, 80, 50])
def test_report_fits_the_terminal(longctx, saved, columns):
    _, out, _ = longctx("report", saved, columns=columns)
    assert max(map(len, out.splitlines())) <= columns


def test_report_as_documents(longctx, saved, tmp_path):
    code, out, _ = longctx("report", saved, "--json")
    (run,) = json.loads(out)["runs"]
    assert code == 0 and len(run["results"]) == 7 and run["run"] == "run"
    assert run["ratios_to_dense"][4]["ratio"] == pytest.approx(0.24414, rel=1e-3)
    code, out, _ = longctx("report", saved, "--csv")
    assert code == 0 and len(list(csv.DictReader(io.StringIO(out)))) == 7
    code, out, _ = longctx("report", saved, write(tmp_path / "b.json", rows()), "--markdown")
    assert code == 0 and out.count("| block | tokens |") == 2 and "### run" in out
    assert longctx("report", saved, "--json", "--csv")[0] == 2


@pytest.fixture
def long_run(tmp_path):
    """Seven lengths: Dense quadratic over a floor, BLADE linear and leaner, crossing at 20K."""
    found = []
    for length in (1024 << i for i in range(7)):
        for block, seconds in (("Dense", 2e-4 + 1e-12 * length**2), ("BLADE", 2e-4 + 2e-8 * length)):
            samples = [[seconds * c * d for d in (0.999, 1.0, 1.001)] for c in (1.0, 1.02, 0.99)]
            found.append(
                BenchmarkResult(
                    block_name=block,
                    sequence_length=length,
                    forward_time_median=seconds,
                    forward_time_ci95=[seconds * 0.4, seconds * 2.2],
                    peak_memory_mb=length / (64 if block == "Dense" else 256),
                    samples=samples,
                )
            )
    return write(tmp_path / "long.json", found)


@pytest.mark.parametrize("columns", [120, 80, 50])
def test_report_says_what_the_numbers_mean(longctx, long_run, columns):
    code, out, err = longctx("report", long_run, columns=columns)
    flat = " ".join(out.split())
    assert (code, err) == (0, "") and max(map(len, out.splitlines())) <= columns
    for words in ("faster than Dense from 19K on", "quadratic", "It overtakes Dense", "0.25 of Dense's", "Pareto"):
        assert words in flat, words


def test_crossover_of_any_two(longctx, long_run):
    code, out, _ = longctx("report", long_run, "--crossover", "dense", "BLADE")
    assert code == 0 and "Dense: slower than BLADE from 19K on" in out
    code, out, err = longctx("report", long_run, "--crossover", "dense", "BLAD")
    assert code == 2 and "Did you mean 'BLADE'?" in err


def test_documents_hold_what_was_derived(longctx, long_run):
    (run,) = json.loads(longctx("report", long_run, "--json")[1])["runs"]
    laws = {law["name"]: law["time"] for law in run["laws"]}
    assert laws["Dense"]["kind"] == "law" and laws["Dense"]["exponent"] == pytest.approx(2.0, abs=0.02)
    assert laws["BLADE"]["floor"] == pytest.approx(2e-4, rel=0.05)
    (crossing,) = run["crossovers"]
    assert crossing["tokens"] == pytest.approx(20e3, rel=0.05) and crossing["a_is_faster_after"]
    assert crossing["tokens_ci95"][0] <= 20e3 <= crossing["tokens_ci95"][1]
    assert run["best"][-1]["pareto"] == ["BLADE"] and 1 <= len(run["summary"]) <= 4
    text = longctx("report", long_run, "--markdown")[1]
    assert "| block | time k |" in text and "- BLADE: faster than Dense" in text and "| tokens | least time |" in text


def test_a_sweep_ends_with_the_short_form(long_run):
    from longctx.results import read_results
    from longctx.terminal.findings import short_form

    for width in (120, 80, 50):
        text = short_form(read_results(long_run), width, ascii_only=True).plain
        assert text.isascii() and max(map(len, text.splitlines())) <= width
        assert "quadratic" in text and "Crossovers" in text and "Best at" not in text
    assert short_form([], 80).plain == ""


def test_uncertainty_bars_and_reference_slopes(longctx, long_run):
    for columns in (100, 80):
        _, out, _ = longctx("plot", long_run, "--metric", "scaling", columns=columns)
        assert "┃ 95% interval" in out and "··· T   ::: T²" in out and out.count("┃") > 14
        assert len(out.splitlines()) <= 24 and max(map(len, out.splitlines())) <= columns
    assert "┃" not in longctx("plot", long_run, "--metric", "memory")[1]


def test_hostile_records_end_no_report(longctx, tmp_path):
    numbers = (None, 0, -1, 1e29, 1e-29, "x", [1], True, 3.5)
    records = [
        {
            "block_name": HOSTILE if i % 3 else "Dense",
            "sequence_length": 1 << (i % 40),
            "batch_size": numbers[i % 9],
            "forward_time_mean": numbers[(i * 5) % 9],
            "forward_time_median": numbers[(i * 7) % 9],
            "forward_time_ci95": [numbers[i % 9], numbers[(i + 2) % 9]],
            "peak_memory_mb": numbers[(i * 2) % 9],
            "joules_per_token": numbers[(i * 4) % 9],
            "samples": [[numbers[i % 9]], "x", [], [1e29, 1e-29], [i + 1.0]],
            "warnings": ["launch_bound", HOSTILE, 3][: i % 4],
            "mode": ["forward", HOSTILE, None][i % 3],
            "config": {"d_model": HOSTILE},
        }
        for i in range(240)
    ]
    for count in (1, 2, 40, 240):
        path = tmp_path / "x.json"
        path.write_text(json.dumps(records[:count]))
        for words in ([], ["--json"], ["--csv"], ["--markdown"]):
            code, out, _ = longctx("report", path, *words, columns=50)
            assert code == 0 and "\x1b" not in out


def test_names_of_strangers_stay_text(longctx, tmp_path):
    path = write(tmp_path / "x.json", rows(name=HOSTILE))
    for words in (["plot", path], ["report", path], ["report", path, "--csv"], ["report", path, "--markdown"]):
        code, out, _ = longctx(*words)
        assert code == 0 and "\x1b" not in out and "red" in out


def test_records_of_the_published_fields_alone(longctx, tmp_path):
    published = ("block_name", "sequence_length", "batch_size", "forward_time_mean", "memory_efficiency_mb_per_token")
    records = [{name: result.to_json()[name] for name in published} for result in rows()[:-1]]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(records))
    code, out, _ = longctx("plot", path)
    assert code == 0 and "Allocated memory per token" in out
    assert longctx("report", path)[0] == 0


def test_a_run_without_one_ok_row(longctx, tmp_path):
    path = write(tmp_path / "x.json", [rows()[-1]])
    for words in (["plot", path], ["report", path]):
        code, out, _ = longctx(*words)
        assert code == 0 and "OOM" in out


@pytest.mark.parametrize("text", ["", "{", '{"a": 1}', "[1, 2]", "[]"])
def test_unusable_files_are_named(longctx, tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    for command in ("plot", "report"):
        code, out, err = longctx(command, path)
        assert (code, out) == (2, "") and "bad.json" in err
    assert path.read_text() == text


def test_no_torch_is_loaded(saved):
    code = (
        "import sys; from longctx.cli.main import build\n"
        f"for command in ('plot', 'report'):\n"
        f"    try: build()([command, {saved!r}])\n"
        "    except SystemExit as end: assert end.code == 0, end.code\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]


@pytest.fixture
def modes(tmp_path):
    """Two modes, two batches and two number formats at one length."""
    found = []
    for mode, factor in (("forward", 1), ("train", 3)):
        for batch in (1, 4):
            for dtype in ("fp32", "bf16"):
                for block, seconds in (("Dense", 2e-3), ("BLADE", 1e-3)):
                    time_s = factor * batch * seconds
                    found.append(
                        BenchmarkResult(
                            block_name=block,
                            sequence_length=1024,
                            batch_size=batch,
                            mode=mode,
                            dtype=dtype,
                            forward_time_median=time_s,
                            samples=[[time_s] * 3],
                            forward_part_s=time_s / 3 if mode == "train" else None,
                            backward_part_s=2 * time_s / 3 if mode == "train" else None,
                        )
                    )
    return write(tmp_path / "modes.json", found)


@pytest.mark.parametrize("columns", [120, 80, 50, 30])
@pytest.mark.parametrize("x", ["batch_size", "dtype", "length"])
def test_pictures_over_anything(longctx, modes, x, columns):
    code, out, _ = longctx("plot", modes, "--metric", "time", "--x", x, columns=columns)
    assert code == 0
    assert "Forward time" in out and "Train time" in out
    assert max(map(len, out.splitlines())) <= columns
    words = {"batch_size": "over batch", "dtype": "over dtype", "length": "tokens"}
    assert words[x] in out
    if x == "dtype" and columns >= 80:
        assert re.search(r"bf16 +fp32", out)


def test_an_axis_that_is_not_there_is_refused(longctx, modes):
    code, _, err = longctx("plot", modes, "--x", "batchsize")
    assert code == 2 and "Did you mean 'batch_size'?" in err and "differ in" in err


def test_report_keeps_modes_apart(longctx, modes):
    code, out, _ = longctx("report", modes)
    assert code == 0
    heads = [out.index(words) for words in ("forward: no state kept", "train: forward, loss and backward")]
    assert heads == sorted(heads)
    assert "backward" in next(line for line in out[heads[1] :].splitlines() if "block" in line)
    assert "train, fp32, batch 4" in out and "Train: At 1,024 tokens, fp32, batch 1, BLADE" in out
    code, out, _ = longctx("report", modes, "--markdown")
    assert out.count("| block | dtype | batch | tokens |") == 2
    assert "| forward (ms) | backward (ms) |" in out and "**train: forward, loss and backward**" in out
    code, out, _ = longctx("report", modes, "--json")
    (run,) = json.loads(out)["runs"]
    assert {each["mode"] for each in run["best"]} == {"forward", "train"}
    code, out, _ = longctx("report", modes, "--csv")
    row = list(csv.DictReader(io.StringIO(out)))[-1]
    assert (row["mode"], float(row["forward_part_s"])) == ("train", 0.004)


def priced(**environment):
    """Rows with a cost model, of one machine."""
    found = rows()[:-1]
    for row in found:
        row.flops, row.bytes = 7e6 * row.sequence_length, 4096.0 * row.sequence_length
        row.tflops, row.joules_per_token, row.roofline_fraction = 0.5, 2e-6, 0.25
        row.environment = {"cpu": "A processor", "threads": 2, "torch": "2.13.0", **environment}
    return found


def test_rates_and_energy_have_pictures_with_their_units(longctx, tmp_path):
    path = write(tmp_path / "x.json", priced())
    code, out, _ = longctx("plot", path, "--metric", "tflops", "energy")
    assert code == 0 and "Rate of model FLOPs (GFLOP/s)" in out and "Energy (uJ/token)" in out


@pytest.mark.parametrize("columns", [120, 80, 50])
def test_a_roofline_stands_under_the_kept_peaks_of_its_machine(longctx, tmp_path, monkeypatch, columns):
    from longctx.engine.peaks import Peaks, keep_peaks, peaks_key

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = write(tmp_path / "x.json", priced())
    code, out, err = longctx("plot", path, "--metric", "roofline")
    assert (code, out) == (2, "") and "longctx sysinfo --peaks --device cpu" in err and "A processor" in err
    keep_peaks(peaks_key(priced()[0].environment), Peaks(flops={"fp32": 5e12}, copy_bytes=1e10))
    code, out, err = longctx("plot", path, "--metric", "roofline", columns=columns)
    assert (code, err) == (0, "") and max(map(len, out.splitlines()[:-2])) <= columns and len(out.splitlines()) <= 24
    assert "▀▀ roof: 5.00 TFLOP/s" in out and "25.0% of the roof" in out
    both = write(tmp_path / "y.json", [*priced(), *priced(threads=1)])
    assert longctx("plot", both, "--metric", "roofline")[0] == 2
    assert longctx("plot", write(tmp_path / "z.json", rows()), "--metric", "roofline")[0] == 2


@pytest.mark.parametrize("columns", [120, 80, 50])
def test_report_has_the_least_time_of_the_work(longctx, tmp_path, columns):
    _, out, _ = longctx("report", write(tmp_path / "x.json", priced()), columns=columns)
    assert "of the roof" in out and "25.0%" in out and max(map(len, out.splitlines())) <= columns
    line = next(csv.DictReader(io.StringIO(longctx("report", tmp_path / "x.json", "--csv")[1])))
    assert float(line["roofline_fraction"]) == 0.25 and float(line["flops"]) == 7e6 * 1024
    pasted = longctx("report", tmp_path / "x.json", "--markdown")[1]
    assert "| block | tokens | FLOP/byte |" in pasted and "| 25.0% |" in pasted and "Roofline at the longest" in pasted


def test_watching_needs_a_terminal_and_one_file(longctx, saved, tmp_path):
    for words in (["plot", saved, "--watch"], ["plot", saved, "--watch", "--save", str(tmp_path / "x.svg")]):
        code, out, err = longctx(*words)
        assert (code, out) == (2, "") and "--watch" in err


def test_in_decode_what_a_block_holds_is_its_state(longctx, tmp_path):
    step = {"mode": "decode", "forward_time_median": 1e-3, "samples": [[1e-3] * 3], "peak_memory_mb": 1.0}
    found = [
        BenchmarkResult(block_name=block, sequence_length=length, state_bytes=size * length, **step)
        for block, size in (("Dense", 64), ("BLADE", 1))
        for length in (1024, 2048)
    ]
    path = write(tmp_path / "decode.json", found)
    for words, head in ((), "smallest state"), (("--markdown",), "| smallest state |"):
        code, out, _ = longctx("report", path, *words)
        assert code == 0
        assert head in out and "least memory" not in out


def test_an_older_source_of_a_block_has_a_name_of_its_own(longctx, tmp_path):
    old, new = rows(2.0, name="Mine"), rows(name="Mine")
    for found, source in ((old, "0486877aa"), (new, "ffff000bb")):
        for row in found:
            row.source_hash = source if row.block_name == "Mine" else "same"
    path = write(tmp_path / "run.json", [row for row in old if row.block_name == "Mine"] + new)
    _, out, _ = longctx("report", path)
    assert len(re.findall(r"^ +\dK +Mine@0486877 ", out, re.MULTILINE)) == 3
    assert len(re.findall(r"^ +\dK +Mine +\d", out, re.MULTILINE)) == 3
    _, out, _ = longctx("plot", path, "--metric", "time")
    assert "Mine@0486877" in out
    table = list(csv.DictReader(io.StringIO(longctx("report", path, "--csv")[1])))
    assert {row["source_hash"] for row in table if row["block_name"] == "Mine"} == {"ffff000bb"}


def test_a_block_of_another_checkout_is_no_older_source():
    sides = [
        BenchmarkResult(block_name=name, sequence_length=1024, source_hash="0486877aa") for name in ("B", "B@../main")
    ]
    sides[1].source_hash = "ffff000bb"
    name_older_sources(sides)
    assert [row.block_name for row in sides] == ["B", "B@../main"] and not any(map(is_of_older_source, sides))


def test_one_length_has_no_scaling(longctx, tmp_path):
    path = write(tmp_path / "run.json", [row for row in rows() if row.sequence_length == 1024])
    _, out, _ = longctx("plot", path)
    assert "Forward time" in out and "Scaling" not in out
    assert "Scaling" in longctx("plot", path, "--metric", "scaling")[1]


def test_a_file_is_no_block_of_a_crossover(longctx, saved):
    code, _, err = longctx("report", "--crossover", "BLADE", saved)
    assert code == 2 and f"not the file {saved}" in err.replace("\n  ", "").replace("\n", "")
