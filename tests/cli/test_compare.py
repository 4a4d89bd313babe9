"""`compare` from files: verdicts, exit codes, refusals, documents, and files that hold anything."""

import json
import random
import re
import subprocess
import sys

import pytest

from longctx.results import BenchmarkResult

HOSTILE = "\x1b[31m[red]x[/red]|`<b>@me"
LENGTHS = (1024, 2048)
ENVIRONMENT = {"cpu": "A processor", "device": "cpu", "threads": 2, "torch": "2.13.0", "flags": {"tf32_matmul": False}}


def rows(*, scale=None, rounds=5, seed=0, **fields):
    """Two blocks at two lengths, quiet; scale: block -> factor on its time."""
    rng = random.Random(seed)
    found = []
    for length in LENGTHS:
        for block, seconds in (("BLADE", length * 1e-5), ("Dense", length**2 * 1e-8)):
            middle = seconds * (scale or {}).get(block, 1.0)
            medians = [middle * (1 + rng.gauss(0, 0.004)) for _ in range(rounds)]
            settings = {
                "dtype": "fp32",
                "config": {"d_model": 64, "n_heads": 8},
                "environment": ENVIRONMENT,
                "peak_memory_mb": length / 64,
                "command": "longctx sweep --d-model 64 --blocks BLADE Dense --rounds 3",
            }
            result = {"block_name": block, "sequence_length": length, "samples": [[m] * 3 for m in medians]}
            found.append(BenchmarkResult(**(result | settings | fields)))
    return found


def write(path, results):
    path.write_text(json.dumps([result.to_json() for result in results]))
    return str(path)


@pytest.fixture
def base(tmp_path):
    return write(tmp_path / "base.json", rows())


@pytest.fixture
def new(tmp_path):
    return write(tmp_path / "new.json", rows(scale={"Dense": 1.5}, seed=1))


@pytest.fixture
def few(tmp_path):
    return write(tmp_path / "few.json", rows(rounds=3, seed=2))


def test_a_verdict_for_every_cell_and_one_sentence(longctx, base, new):
    code, out, err = longctx("compare", base, new)
    assert (code, err) == (0, "")
    assert "2 of 4 cells are slower, 2 the same." in out
    assert re.search(r"^Dense +1K +10\.\d +1\d\.\d +1\.\d+x +1\.\d+-1\.\d+ +slower +same$", out, re.MULTILINE)
    assert "97% interval" in out and "Nothing that was recorded" in out and "\x1b" not in out
    assert "2 of 4 cells are faster, 2 the same." in longctx("compare", new, base)[1]


@pytest.mark.parametrize("columns", [120, 80, 50])
def test_it_fits_the_terminal(longctx, base, few, columns):
    _, out, _ = longctx("compare", base, few, columns=columns)
    # A command is copied whole.
    lines = [line for line in out.splitlines() if not line.startswith("  longctx sweep") and base not in line]
    assert max(map(len, lines)) <= columns
    assert "inconclusive" in out and out.count("BLADE") >= 2


def test_the_command_that_would_settle_it_is_given(longctx, base, few):
    _, out, _ = longctx("compare", base, few)
    command = "longctx sweep --d-model 64 --blocks BLADE Dense --rounds 5 --output-file"
    assert f"\n  {command} {few} --resume\n" in out
    assert f"{command} {base}" not in out and "at least 5 are needed" in out


def test_exit_codes(longctx, tmp_path, base, new, few):
    assert longctx("compare", base, new)[0] == 0
    assert longctx("compare", base, new, "--strict")[0] == 0
    assert longctx("compare", base, new, "--fail-on-regression")[0] == 4
    assert longctx("compare", new, base, "--fail-on-regression", "--strict")[0] == 0
    assert longctx("compare", base, few)[0] == 0
    assert longctx("compare", base, few, "--fail-on-regression")[0] == 0
    assert longctx("compare", base, few, "--strict")[0] == 7
    lost = rows(rounds=3)
    lost[0].status, lost[0].samples = "oom", []
    path = write(tmp_path / "lost.json", lost)
    code, out, _ = longctx("compare", base, path, "--fail-on-regression", "--strict")
    assert code == 4 and "ok -> oom" in out and "1 no longer ok" in out
    grown = write(tmp_path / "grown.json", rows(peak_memory_mb=100.0))
    code, out, _ = longctx("compare", base, grown, "--fail-on-regression")
    assert code == 4 and "4 take more memory" in out and "more +84.0 MiB" in out


def test_a_cell_that_is_missing_is_not_passed_over_under_strict(longctx, tmp_path, base):
    path = write(tmp_path / "part.json", rows()[:3])
    assert longctx("compare", base, path)[0] == longctx("compare", path, base, "--strict")[0] == 0
    code, out, _ = longctx("compare", base, path, "--strict")
    assert code == 7 and "only in base" in out


def test_a_guard_of_ones_own(longctx, base, new):
    assert "4 of 4 cells are the same" in longctx("compare", base, new, "--guard", "60")[1]
    for words in (["--guard", "-1"], ["--guard", "nan"], ["--guard", "5%"]):
        assert longctx("compare", base, new, *words)[0] == 2


def test_several_files_a_side(longctx, tmp_path, few, new):
    more = write(tmp_path / "more.json", rows(rounds=2, seed=3))
    for words in (
        ["--base", few, more, "--new", new],
        ["--base", few, "--base", more, "--new", new],
        ["--base", f"{few},{more}", "--new", new],
        [few, new, "--base", more],
        ["--base", few, few, more, "--new", new],
    ):
        code, out, _ = longctx("compare", *words)
        assert code == 0 and "2 of 4 cells are slower" in out, words
    assert "at least 5" in longctx("compare", "--base", few, few, "--new", new)[1]


def test_warnings_stand_beside_the_verdict(longctx, tmp_path, base):
    hot = write(tmp_path / "hot.json", rows(scale={"Dense": 1.5}, seed=1, warnings=["throttled", "contended"]))
    _, out, _ = longctx("compare", base, hot)
    assert re.search(r"slower +same +contended, throttled$", out, re.MULTILINE)
    assert "all cells in new (other programs used this machine" in out
    _, out, _ = longctx("compare", base, hot, columns=50)
    assert "throttled: " in out


@pytest.mark.parametrize("columns", [120, 50])
def test_cells_of_several_modes_are_told_apart_everywhere(longctx, tmp_path, columns):
    sides = [
        write(tmp_path / f"{name}.json", [*rows(seed=seed), *rows(seed=seed + 1, mode="train", warnings=["unstable"])])
        for name, seed in (("base", 0), ("new", 2))
    ]
    _, out, _ = longctx("compare", *sides, columns=columns)
    cells = re.findall(r"^(?:BLADE|Dense) .*?(?=\d\.\d{3}x)", out, re.MULTILINE)
    assert len(cells) == 8 and sum("train" in cell for cell in cells) == 4
    said = " ".join(out.split())
    assert "unstable: BLADE (train) at 1K, Dense (train) at 1K, BLADE (train) at 2K" in said
    text = longctx("compare", *sides, "--markdown")[1]
    assert "| block | mode | tokens |" in text and "| BLADE | train | 1,024 |" in text


def test_what_cannot_be_compared_is_refused(longctx, tmp_path, base):
    for name, environment in (
        ("threads", {"threads": 8}),
        ("device", {"cpu": "Another"}),
        ("TF32", {"flags": {"tf32_matmul": True}}),
    ):
        path = write(tmp_path / "x.json", rows(environment=ENVIRONMENT | environment))
        code, out, err = longctx("compare", base, path)
        assert (code, out) == (2, "") and name in err and "--allow-different" in err
        code, out, _ = longctx("compare", base, path, "--allow-different")
        assert code == 0 and "Not the same on both sides" in out and name in out
    path = write(tmp_path / "y.json", rows(dtype="bf16"))
    assert "dtype fp32 in base, bf16 in new" in longctx("compare", base, path)[2]
    path = write(tmp_path / "z.json", rows(batch_size=4))
    code, out, err = longctx("compare", base, path)
    assert (code, out) == (2, "") and "no cell in common; batch size 1 in base, 4 in new" in err
    assert longctx("compare", base, path, "--allow-different")[0] == 0


def test_what_differs_is_listed(longctx, tmp_path, base):
    settings = {"environment": ENVIRONMENT | {"torch": "2.14.0"}, "source_hash": "f" * 64}
    path = write(tmp_path / "x.json", rows(**settings))
    _, out, _ = longctx("compare", base, path)
    assert "\n  torch: 2.13.0 -> 2.14.0\n" in out and "source of" not in out


def test_json_is_one_document(longctx, base, few):
    code, out, err = longctx("compare", base, few, "--json", "--strict")
    found = json.loads(out)
    assert (code, err) == (7, "") and found["counts"]["inconclusive"] == 4 == len(found["cells"])
    cell = found["cells"][0]
    assert cell["ratio"] == pytest.approx(1, rel=0.02) and len(cell["interval"]) == 2
    assert cell["confidence"] == pytest.approx(1 - 2 / 56) and cell["guard"] == 0.05
    assert len(cell["base"]["round_medians_s"]) == 5 and cell["memory"] == "same"
    assert found["settle"][0]["side"] == "new" and found["settle"][0]["command"].endswith("--resume")
    assert longctx("compare", base, few, "--json", "--markdown")[0] == 2


def test_markdown_is_a_comment(longctx, base, new):
    code, out, _ = longctx("compare", base, new, "--markdown", "--fail-on-regression")
    assert code == 4 and out.startswith("**2 of 4 cells are slower, 2 the same**\n\n| block | tokens |")
    assert out.count("| **slower** |") == 2 and out.count("<details>") == out.count("</details>") == 2


def test_names_of_strangers_stay_text(longctx, tmp_path):
    settings = {
        "environment": ENVIRONMENT | {"torch": HOSTILE, "flags": {HOSTILE: HOSTILE}},
        "warnings": [HOSTILE],
        "path": HOSTILE,
        "command": f"longctx sweep --blocks {HOSTILE}; rm -rf ~",
    }
    hostile = rows(rounds=3, **settings)
    for row in hostile:
        row.block_name = HOSTILE
    hostile[2].status, hostile[2].error = "\x1b[2Joom", {"message": HOSTILE}
    one, other = write(tmp_path / "x.json", hostile), write(tmp_path / "y.json", hostile[::-1])
    plain = write(tmp_path / "z.json", rows())
    for words in ([one, other], [one, other, "--markdown"], [one, other, "--json"], [one, plain, "--allow-different"]):
        code, out, _ = longctx("compare", *words)
        assert code == 0 and "\x1b" not in out and "red" in out
        assert "; rm" not in out
    assert "@me" not in longctx("compare", one, other, "--markdown")[1]
    assert "<b>" not in longctx("compare", one, other, "--markdown")[1]


def test_records_that_lack_almost_everything(longctx, tmp_path, base):
    published = ("block_name", "sequence_length", "batch_size", "forward_time_mean", "peak_memory_mb")
    records = [row.to_json() | {"forward_time_mean": 0.5} for row in rows()]
    old = tmp_path / "old.json"
    old.write_text(json.dumps([{name: record[name] for name in published} for record in records]))
    code, out, _ = longctx("compare", old, base)
    assert code == 0 and "4 of 4 cells are inconclusive" in out and "no rounds are recorded in base" in out
    assert "environment: not recorded -> recorded" in out and "longctx sweep --rounds 5" in out
    bare = tmp_path / "bare.json"
    bare.write_text('[{"block_name": "BLADE", "sequence_length": 1024, "forward_time_mean": NaN, "samples": [[null]]}]')
    code, out, _ = longctx("compare", bare, base)
    assert code == 0 and "inconclusive" in out and "nan" not in out.lower()


ODD = (None, True, -1, 0, 1e300, "x", "", [], [1], [[1.0]] * 6, [[1e-29], [1e29]], {}, {"a": 1}, {"flags": {"a": [1]}})


def test_records_with_anything_in_them_never_crash(longctx, tmp_path):
    rng = random.Random(0)
    names = [name for name in rows()[0].to_json() if name not in ("block_name", "sequence_length")]
    for turn in range(40):
        paths = []
        for side in "ab":
            records = [row.to_json() for row in rows(seed=turn)]
            for record in records:
                record |= {name: rng.choice(ODD) for name in rng.sample(names, 4)}
            path = tmp_path / f"{side}.json"
            path.write_text(json.dumps(records))
            paths.append(path)
        for words in ([], ["--json"], ["--markdown"]):
            code, out, err = longctx("compare", *paths, "--allow-different", *words, columns=rng.choice((20, 50, 120)))
            assert code == 0, err
            if words == ["--json"]:
                json.loads(out)


@pytest.mark.parametrize("text", ["", "{", '{"a": 1}', "[1, 2]", "[]"])
def test_unusable_files_are_named(longctx, tmp_path, base, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    for words in ([path, base], [base, path]):
        code, out, err = longctx("compare", *words)
        assert (code, out) == (2, "") and "bad.json" in err
    assert path.read_text() == text


def test_both_sides_must_be_named(longctx, base, tmp_path):
    for words in ([], [base], ["--base", base], ["--new", base]):
        code, out, err = longctx("compare", *words)
        assert (code, out) == (2, "") and "longctx compare base.json new.json" in err
    assert "there is no file" in longctx("compare", base, tmp_path / "none.json")[2]


def test_a_file_against_itself(longctx, base):
    code, out, _ = longctx("compare", base, base, "--strict", "--fail-on-regression")
    assert code == 0 and "4 of 4 cells are the same" in out


def test_it_stands_after_report_in_the_help(longctx):
    _, out, _ = longctx("--help")
    commands = re.findall(r"^│ (\w+) ", out, re.MULTILINE)
    assert commands[commands.index("report") + 1] == "compare"


def test_no_torch_is_loaded(base, new):
    code = (
        "import sys; from longctx.cli.main import build\n"
        f"try: build()(['compare', {base!r}, {new!r}])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]


def test_a_file_against_itself_is_told_so(longctx, base):
    _, out, err = longctx("compare", base, base)
    assert "base and new are the same" in err
    assert out.count(" --resume") <= 1


def test_sides_of_other_blocks_are_told_by_their_names(longctx, tmp_path, base):
    others = rows()
    for row in others:
        row.block_name, row.block_options = f"My{row.block_name}", {"size": 3}
    code, _, err = longctx("compare", base, write(tmp_path / "other.json", others))
    assert code == 2 and "block BLADE, Dense in base, MyBLADE, MyDense in new" in err and "size" not in err
