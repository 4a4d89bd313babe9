"""A result and its file: the published form, records that strangers wrote, and a file that is whole at every moment."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import stat
import tempfile
import threading
import unicodedata
from pathlib import Path

import jsonschema
import pytest

import longctx
from longctx import results
from longctx.errors import ResultsError
from longctx.results import (
    STATUSES,
    BenchmarkResult,
    ResultsFile,
    last_results_path,
    plain_text,
    read_records,
    read_results,
)

PUBLISHED = [
    "block_name",
    "sequence_length",
    "batch_size",
    "forward_time_mean",
    "forward_time_std",
    "forward_time_min",
    "forward_time_max",
    "peak_memory_mb",
    "allocated_memory_mb",
    "reserved_memory_mb",
    "throughput_tokens_per_sec",
    "memory_efficiency_mb_per_token",
    "config",
]

FOREIGN = {
    "block_name": "TheirBlock",
    "sequence_length": 2048,
    "batch_size": 2,
    "forward_time_mean": 0.25,
    "forward_time_std": 0.01,
    "forward_time_min": 0.2,
    "forward_time_max": 0.3,
    "peak_memory_mb": 100.5,
    "allocated_memory_mb": 80.0,
    "reserved_memory_mb": 128.0,
    "throughput_tokens_per_sec": 16384.0,
    "memory_efficiency_mb_per_token": 0.0195,
    "config": {"d_model": 512, "n_heads": 8, "device": "cuda", "torch_benchmark": True, "cudnn_benchmark": True},
}

FLOATS = [f.name for f in dataclasses.fields(BenchmarkResult) if f.type == "float | None"]


def full_result(**values) -> BenchmarkResult:
    """A result in which every field is set."""
    given = {
        **FOREIGN,
        "key": "0123456789abcdef0123",
        "source_hash": "ab" * 32,
        "warnings": ["unstable", "throttled"],
        "mode": "train",
        "dtype": "bf16",
        "training_step": 300,
        "block_target": "path/to/file.py:TheirBlock",
        "block_options": {"window": 64, "causal": True, "kind": "é", "scale": None},
        "forward_time_median": 0.25,
        "forward_time_ci95": [0.24, 0.26],
        "samples": [[0.25, 0.26], [0.24]],
        "gate": {"error": 1e-7, "tolerance": 1e-5, "passed": True, "reason": None},
        "path": "fused",
        "error": {"type": "T", "message": "several\nlines", "log_tail": "\tindented"},
        "environment": {"flags": {"threads": 2}, "affinity": [0, 1]},
        "command": "longctx sweep",
    }
    for name in FLOATS:
        given.setdefault(name, 1.5)
    return BenchmarkResult(**{**given, **values})


def write(path: Path, records: object) -> Path:
    path.write_text(json.dumps(records))
    return path


# -- the form ------------------------------------------------------------------------------------------------------


def test_published_fields_come_first_and_in_order():
    record = BenchmarkResult(block_name="BLADE", sequence_length=16).to_json()
    assert list(record)[: len(PUBLISHED)] == PUBLISHED
    assert record["forward_time_mean"] is None
    published = ["d_model", "n_heads", "device", "torch_benchmark", "cudnn_benchmark"]
    assert list(longctx.BenchmarkConfig().to_json())[:5] == published


@pytest.mark.parametrize("status", STATUSES)
def test_what_is_written_is_read_back_the_same(tmp_path, status):
    given = [full_result(status=status), BenchmarkResult(block_name="Other", sequence_length=1, status=status)]
    ResultsFile(tmp_path / "run.json").save(given)
    assert read_results(tmp_path / "run.json") == given
    assert longctx.load(tmp_path / "run.json") == given
    assert longctx.load(str(tmp_path / "run.json")) == given


def test_a_file_with_only_the_published_fields_is_read(tmp_path):
    (found,) = read_results(write(tmp_path / "theirs.json", [FOREIGN]))
    assert {name: getattr(found, name) for name in PUBLISHED} == FOREIGN
    assert found.ok
    assert found.time_s == 0.25
    assert (found.mode, found.samples, found.key, found.error) == ("forward", [], None, None)


@pytest.mark.parametrize("step", [-1, 1.5, True, "100", None, 1e300])
def test_a_step_that_no_training_makes_is_none(tmp_path, step):
    (found,) = read_results(write(tmp_path / "run.json", [{**FOREIGN, "training_step": step}]))
    assert found.training_step is None


def test_name_and_length_are_enough(tmp_path):
    (found,) = read_results(write(tmp_path / "bare.json", [{"block_name": "B", "sequence_length": 8}]))
    assert found == BenchmarkResult(block_name="B", sequence_length=8)


def test_fields_of_another_version_are_passed_over(tmp_path):
    record = {**FOREIGN, "schema_version": 99, "colour": "green", "__class__": "x", "ok": False, "time_s": 7}
    (found,) = read_results(write(tmp_path / "newer.json", [record]))
    assert found.schema_version == 99
    assert found.ok
    assert found.time_s == 0.25


def test_no_records_are_no_results(tmp_path):
    assert read_results(write(tmp_path / "empty.json", [])) == []


# -- records that strangers wrote ----------------------------------------------------------------------------------


@pytest.fixture
def read_hostile(tmp_path):
    """Reads the text of a results file and sees to it that it, and its folder, stay as they were."""
    path = tmp_path / "hostile.json"

    def read(text: str | bytes) -> list[BenchmarkResult]:
        data = text if isinstance(text, bytes) else text.encode()
        path.write_bytes(data)
        try:
            return read_results(path)
        finally:
            assert path.read_bytes() == data
            assert list(tmp_path.iterdir()) == [path]

    return read


def texts_in(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for pair in value.items() for each in pair for text in texts_in(each)]
    if isinstance(value, list):
        return [text for each in value for text in texts_in(each)]
    return [value] if isinstance(value, str) else []


def is_harmless(text: str) -> bool:
    """Whether a terminal shows the text and does nothing else; lines and tabs may stand in it."""
    return all(unicodedata.category(c)[0] != "C" or c in "\n\t" for c in text)


SPELLS = {
    "escape": "\x1b[31mred\x1b]0;title\x07",
    "8-bit escape": "\x9b31m",
    "carriage return": "good\rbad!",
    "backspace": "x\b\b",
    "null": "a\x00b",
    "right to left": "\u202eEDALB\u202c",
    "isolate": "\u2066\u2069",
    "mark": "\u200e\u200f",
    "arabic mark": "a\u061cb",
    "line separator": "a\u2028b",
    "byte order mark": "\ufeffa",
    "half a character": "a\ud800b",
}


@pytest.mark.parametrize("spell", SPELLS.values(), ids=SPELLS.keys())
def test_text_is_made_harmless_wherever_it_stands(read_hostile, spell):
    nested = {spell: [spell, {spell: {"deeper": spell}}]}
    record = {
        "sequence_length": 8,
        **dict.fromkeys(("block_name", "key", "status", "mode", "dtype", "path", "command", "block_target"), spell),
        **dict.fromkeys(("config", "block_options", "gate", "error", "environment"), nested),
        "warnings": [spell],
    }
    (found,) = read_hostile(json.dumps([record]))
    texts = texts_in(found.to_json())
    assert len(texts) > 20
    assert not [text for text in texts if not is_harmless(text)]
    # It can be shown and saved again.
    "".join(texts).encode()


def test_text_without_end_is_cut(read_hostile):
    (found,) = read_hostile(json.dumps([{"block_name": "B" * 10**6, "sequence_length": 8, "warnings": ["w"] * 10**5}]))
    assert len(found.block_name) <= results.MAX_TEXT
    assert len(found.warnings) <= 100
    assert plain_text("x" * 20, 10) == "xxxxxxx..."


ABSURD = ["1e400", "-1e400", "NaN", "Infinity", "-Infinity", "-1", "-0.5", "1e31", "9" * 400, "true", '"3"', "[]", "{}"]


@pytest.mark.parametrize("text", ABSURD)
def test_a_number_that_no_measurement_gives_is_none(read_hostile, text):
    fields = "".join(f', "{name}": {text}' for name in FLOATS)
    (found,) = read_hostile(f'[{{"block_name": "B", "sequence_length": 8{fields}}}]')
    assert {getattr(found, name) for name in FLOATS} == {None}
    assert found.time_s is None


@pytest.mark.parametrize("text", [*ABSURD, "1.5", "null"])
def test_an_absurd_count_takes_the_default(read_hostile, text):
    (found,) = read_hostile(
        f'[{{"block_name": "B", "sequence_length": 8, "batch_size": {text}, "schema_version": {text}}}]'
    )
    assert (found.batch_size, found.schema_version) == (1, results.SCHEMA_VERSION)


@pytest.mark.parametrize("text", ABSURD)
def test_an_absurd_sample_spoils_its_round_and_no_other(read_hostile, text):
    lists = f'"samples": [[1.0, {text}], [2.0, 3.0]], "forward_time_ci95": [{text}, 2.0]'
    (found,) = read_hostile(f'[{{"block_name": "B", "sequence_length": 8, {lists}}}]')
    assert found.samples == [[2.0, 3.0]]
    assert found.forward_time_ci95 is None


def fits(value: object, kind: str) -> bool:
    """Whether `value` is of the type that the field is declared with."""
    if kind.endswith(" | None"):
        return value is None or fits(value, kind.removesuffix(" | None"))
    if kind.startswith("list["):
        return isinstance(value, list) and all(fits(each, kind[5:-1]) for each in value)
    if kind.startswith("dict["):
        return isinstance(value, dict)
    kinds = {"int": int, "float": int | float, "str": str}
    return isinstance(value, kinds[kind]) and not isinstance(value, bool)


WRONG = [None, True, 7, -1.5, "text", [], {}, [None], [[]], [[1, "x"]], [{"a": []}], {"a": [1]}, {"": None}]


@pytest.mark.parametrize("field", dataclasses.fields(BenchmarkResult), ids=lambda field: field.name)
def test_a_value_of_the_wrong_type_is_no_value_of_its_field(read_hostile, field):
    for value in WRONG:
        text = json.dumps([{**FOREIGN, field.name: value}])
        if field.name in ("block_name", "sequence_length") and (not fits(value, field.type) or value == -1.5):
            with pytest.raises(ResultsError):
                read_hostile(text)
            continue
        (found,) = read_hostile(text)
        assert fits(getattr(found, field.name), field.type)
        json.dumps(found.to_json(), allow_nan=False)


def test_numbers_in_nested_data_can_be_written_again(read_hostile):
    gate = f'{{"error": 1e400, "a": [NaN, -Infinity, 7{"0" * 99}]}}'
    (found,) = read_hostile(f'[{{"block_name": "B", "sequence_length": 8, "gate": {gate}}}]')
    assert found.gate == {"error": None, "a": [None, None, None]}


def test_data_nested_without_end_is_cut(read_hostile):
    deep = '{"a":' * 400 + "1" + "}" * 400
    (found,) = read_hostile(f'[{{"block_name": "B", "sequence_length": 8, "config": {deep}}}]')
    assert json.dumps(found.to_json()).count('{"a"') < 20


MALICE = b"import pathlib; pathlib.Path('executed').touch()"


class Malice:
    def __reduce__(self):
        return (exec, (MALICE.decode(),))


NOT_RESULTS = {
    "empty": b"",
    "blank": b" \n",
    "an object": b"{}",
    "a record": json.dumps(FOREIGN).encode(),
    "null": b"null",
    "a number": b"3",
    "a string": b'"[]"',
    "numbers": b"[1, 2]",
    "nulls": b"[null]",
    "lists": b"[[]]",
    "cut off": json.dumps([FOREIGN]).encode()[:-20],
    "two documents": b"[] []",
    "binary": bytes(range(256)),
    "utf-16": json.dumps([FOREIGN]).encode("utf-16"),
    "latin-1": '[{"block_name": "é", "sequence_length": 8}]'.encode("latin-1"),
    "a pickle": pickle.dumps([Malice()]),
    "a program": MALICE,
    "a nest": b"[" * 200_000,
    "a longer nest": b'[{"a":' * 100_000,
    "a number of a million digits": b"[" + b"9" * 1_000_000 + b"]",
    "no name": b'[{"sequence_length": 8}]',
    "a name that is none": b'[{"block_name": 8, "sequence_length": 8}]',
    "a length of zero": b'[{"block_name": "B", "sequence_length": 0}]',
    "a negative length": b'[{"block_name": "B", "sequence_length": -8}]',
    "half a token": b'[{"block_name": "B", "sequence_length": 8.5}]',
    "a length that is text": b'[{"block_name": "B", "sequence_length": "8"}]',
    "a length that is true": b'[{"block_name": "B", "sequence_length": true}]',
    "an endless length": b'[{"block_name": "B", "sequence_length": 1e400}]',
    "an absurd length": b'[{"block_name": "B", "sequence_length": 9007199254740993}]',
    "one bad record": json.dumps([FOREIGN, {**FOREIGN, "block_name": None}]).encode(),
    "escapes": b"\x1b[2J\x1b]0;title\x07",
}


@pytest.mark.parametrize("data", NOT_RESULTS.values(), ids=NOT_RESULTS.keys())
def test_a_file_of_anything_else_is_refused_in_words_and_left_alone(read_hostile, monkeypatch, tmp_path, data):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ResultsError, match=r"hostile\.json") as caught:
        read_hostile(data)
    assert caught.value.exit_code == 2
    assert is_harmless(caught.value.message)
    assert len(caught.value.message) < 500
    assert not Path("executed").exists()


def test_a_byte_order_mark_is_no_damage(read_hostile):
    (found,) = read_hostile(b"\xef\xbb\xbf" + json.dumps([FOREIGN]).encode())
    assert found.block_name == "TheirBlock"


def test_the_bad_record_is_named(read_hostile):
    with pytest.raises(ResultsError, match="record 3 has no block_name"):
        read_hostile(json.dumps([FOREIGN, FOREIGN, {}]))


def test_a_missing_file_a_folder_and_a_giant_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ResultsError, match=r"no file .*missing\.json") as caught:
        longctx.load(tmp_path / "missing.json")
    assert caught.value.hint
    with pytest.raises(ResultsError, match="cannot read"):
        longctx.load(tmp_path)
    with pytest.raises(ResultsError) as caught:
        longctx.load(tmp_path / "\x1b[31m.json")
    assert is_harmless(caught.value.message)
    monkeypatch.setattr(results, "MAX_FILE_BYTES", 10)
    with pytest.raises(ResultsError, match="larger"):
        longctx.load(write(tmp_path / "giant.json", [FOREIGN]))


# -- opening the file of a sweep -----------------------------------------------------------------------------------


def result_of(name: str = "BLADE", **values) -> BenchmarkResult:
    return BenchmarkResult(**{"block_name": name, "sequence_length": 16, "key": "k", **values})


def test_a_new_file_needs_nothing_and_leaves_nothing(tmp_path):
    path = tmp_path / "some" / "folder" / "run.json"
    for resume, force in ((False, False), (True, False), (False, True)):
        _, earlier = ResultsFile.open(path, resume=resume, force=force)
        assert earlier == []
        assert list(path.parent.iterdir()) == []


def test_a_file_that_is_there_is_not_replaced_unasked(tmp_path):
    path = write(tmp_path / "run.json", [FOREIGN])
    before = path.read_bytes()
    with pytest.raises(ResultsError, match="exists") as caught:
        ResultsFile.open(path, resume=False, force=False)
    assert "--resume" in caught.value.hint
    assert "--force" in caught.value.hint
    assert path.read_bytes() == before


def test_force_begins_anew_and_not_before_there_is_something_to_save(tmp_path):
    path = tmp_path / "run.json"
    path.write_bytes(b"damaged [")
    file, earlier = ResultsFile.open(path, resume=False, force=True)
    assert earlier == []
    assert path.read_bytes() == b"damaged ["
    file.save([result_of()])
    assert read_results(path) == [result_of()]


def test_resume_keeps_what_others_wrote_in_front_and_unchanged(tmp_path):
    others = [
        {**FOREIGN, "their_own": {"deep": [1, {"x": None}], "text": "é\x1b"}, "forward_time_std": 1e-310},
        {"block_name": "B", "sequence_length": 8, "samples": "not ours", "key": None},
        full_result(key="other").to_json() | {"added": 2**80},
    ]
    path = write(tmp_path / "run.json", [others[0], result_of(forward_time_mean=1.0).to_json(), *others[1:]])
    file, earlier = ResultsFile.open(path, resume=True, force=False)
    # A record without a key is no row of a sweep.
    assert earlier == [result_of(forward_time_mean=1.0), full_result(key="other")]
    file.save([result_of("New", key="n")])
    assert [record["block_name"] for record in read_records(path)] == ["TheirBlock", "BLADE", "B", "TheirBlock", "New"]
    file.save([result_of(forward_time_mean=2.0), result_of("New", key="n")])
    records = json.loads(path.read_text())
    assert records[:3] == others
    assert read_results(path)[3:] == [result_of(forward_time_mean=2.0), result_of("New", key="n")]


def test_resume_goes_before_force(tmp_path):
    path = write(tmp_path / "run.json", [result_of().to_json()])
    _, earlier = ResultsFile.open(path, resume=True, force=True)
    assert earlier == [result_of()]


def test_rows_of_one_key_and_two_names_are_two_rows(tmp_path):
    rows = [result_of("BLADE"), result_of("BLADE:chunk_size=512")]
    file, _ = ResultsFile.open(tmp_path / "run.json", resume=True, force=False)
    file.save(rows)
    file, earlier = ResultsFile.open(tmp_path / "run.json", resume=True, force=False)
    assert earlier == rows
    file.save(rows[1:])
    assert read_results(tmp_path / "run.json") == rows


STRANGE = ['"x": 1e400', '"x": [NaN]', '"key": []', '"key": {"a": 1}', '"key": 3', '"x": "\\ud800"']


@pytest.mark.parametrize("hostile", STRANGE)
def test_a_strangers_record_does_not_keep_a_sweep_from_saving(tmp_path, hostile):
    path = tmp_path / "run.json"
    path.write_text(f'[{{"block_name": "B", "sequence_length": 8, {hostile}}}]')
    file, earlier = ResultsFile.open(path, resume=True, force=False)
    assert earlier == []
    file.save([result_of()])
    records = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert [record["block_name"] for record in records] == ["B", "BLADE"]
    assert "1e400" not in path.read_text()


@pytest.mark.parametrize("data", [b"", b"{}", b'[{"block_name": "B"', b"[1]", b"\x80"])
def test_a_damaged_file_is_not_resumed_and_not_touched(tmp_path, data):
    path = tmp_path / "run.json"
    path.write_bytes(data)
    with pytest.raises(ResultsError, match=r"run\.json"):
        ResultsFile.open(path, resume=True, force=False)
    assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_refused_before_there_is_anything_to_lose(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ResultsError, match="cannot write results to") as caught:
            ResultsFile.open(folder / "run.json", resume=True, force=False)
        assert "--results-dir" in caught.value.hint
    assert (tmp_path / "file").read_text() == "in the way"

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    # A test that runs as root may write anywhere.
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ResultsError, match="Permission denied"):
        ResultsFile.open(tmp_path / "run.json", resume=False, force=False)


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path):
    for resume, force in ((False, False), (True, False), (False, True)):
        with pytest.raises(ResultsError, match="is a folder"):
            ResultsFile.open(tmp_path, resume=resume, force=force)


# -- saving --------------------------------------------------------------------------------------------------------


def test_a_reader_sees_whole_files_only(tmp_path):
    path = tmp_path / "run.json"
    file = ResultsFile(path)
    file.save([])
    seen, faults, done = set(), [], threading.Event()

    def read():
        while not done.is_set():
            try:
                seen.add(len(json.loads(path.read_text())))
            except Exception as error:
                faults.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for count in range(1, 40):
        file.save([result_of(command="x" * 3000, key=str(number)) for number in range(count)])
    done.set()
    reader.join()
    assert faults == []
    assert len(seen) > 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("place", "name"),
    [(os, "fsync"), (os, "fdopen"), (os, "replace"), (tempfile, "mkstemp")],
    ids=["fsync", "fdopen", "replace", "mkstemp"],
)
@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk is full"), (errno.EIO, "Input/output error")],
)
def test_a_disk_that_takes_no_more_leaves_the_old_file_whole(tmp_path, monkeypatch, place, name, code, words):
    path = tmp_path / "run.json"
    file = ResultsFile(path)
    file.save([result_of(forward_time_mean=1.0)])
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as broken:
        broken.setattr(place, name, fail)
        with pytest.raises(ResultsError) as caught:
            file.save([result_of(forward_time_mean=2.0), result_of("More")])
    assert str(path) in caught.value.message
    assert words in caught.value.message
    assert "room" in caught.value.hint
    assert "--resume" in caught.value.hint
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    file.save([result_of(forward_time_mean=2.0)])
    assert read_results(path)[0].forward_time_mean == 2.0


def test_a_write_that_breaks_off_in_the_middle_leaves_the_old_file_whole(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "run.json"
    file = ResultsFile(path)
    file.save([result_of()])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel then really takes a part and refuses the rest.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ResultsError, match="cannot save"):
            file.save([result_of(command="x" * 200_000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_results(path) == [result_of()]
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_while_saving_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    file = ResultsFile(path)
    file.save([result_of()])

    def interrupt(handle):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            file.save([])
    assert read_results(path) == [result_of()]
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link_and_what_it_points_to_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    target = write(tmp_path / "there" / "real.json", [FOREIGN])
    link, dangling = tmp_path / "link.json", tmp_path / "dangling.json"
    link.symlink_to(target)
    dangling.symlink_to(tmp_path / "there" / "new.json")
    for path in (link, dangling):
        file, _ = ResultsFile.open(path, resume=True, force=False)
        file.save([result_of()])
        assert path.is_symlink()
    assert [result.block_name for result in read_results(target)] == ["TheirBlock", "BLADE"]
    assert read_results(tmp_path / "there" / "new.json") == [result_of()]
    assert len(list((tmp_path / "there").iterdir())) == 2


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        ResultsFile(tmp_path / "run.json").save([result_of()])
        # Saving has not changed it.
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "run.json").stat().st_mode) == mode


def test_the_last_file_is_the_one_that_was_written_last(tmp_path):
    assert last_results_path(tmp_path / "missing") is None
    assert last_results_path(tmp_path) is None
    for age, name in enumerate(["newest.txt", ".hidden.json", "new.json", "middle.json", "old.json"]):
        path = write(tmp_path / name, [])
        os.utime(path, (10_000 - age, 10_000 - age))
    (tmp_path / "folder.json").mkdir()
    assert last_results_path(tmp_path) == tmp_path / "new.json"
    assert last_results_path(str(tmp_path)) == tmp_path / "new.json"
    assert last_results_path(tmp_path / "new.json") is None


# -- the schema ----------------------------------------------------------------------------------------------------

BLOCKS = """
from torch import nn

class Raises(nn.Module):
    def forward(self, x):
        raise ValueError("what is this?")

class TooLarge(nn.Module):
    def forward(self, x):
        raise MemoryError

class NotFinite(nn.Module):
    def forward(self, x):
        return x / 0

class Priced(nn.Module):
    causal = True

    def __init__(self, width=2.5, name="é"):
        super().__init__()

    def forward(self, x):
        return x.cumsum(1) / 7

    def cost(self, cell, options):
        return {"flops": 1e3, "bytes": 1e3, "state_bytes": 8}
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The file of a real sweep with rows of many kinds."""
    folder = tmp_path_factory.mktemp("schema")
    (folder / "mine.py").write_text(BLOCKS)
    config = longctx.BenchmarkConfig(
        d_model=32,
        n_heads=2,
        sequence_lengths=[16, 24],
        rounds=1,
        warmup_runs=1,
        benchmark_runs=6,
        fixed_runs=True,
        threads=1,
        isolation="none",
        results_dir=str(folder),
        output_file="run.json",
    )
    names = ["Raises", "TooLarge", "NotFinite", "Priced", "Priced:width=1"]
    with pytest.MonkeyPatch.context() as patch:
        # The lock on the device is another one then, and the warm-up is short.
        patch.setattr(tempfile, "tempdir", str(folder))
        from longctx.engine import timing

        patch.setattr(timing, "MIN_WARM_S", {"cpu": 0.0})
        patch.setattr(timing, "MAX_WARM_S", {"cpu": 0.05})
        longctx.benchmark(["Identity", *(f"{folder}/mine.py:{name}" for name in names)], config)
    return folder / "run.json"


@pytest.fixture
def validator():
    schema = json.loads(Path(longctx.__file__).with_name("results.schema.json").read_text(encoding="utf-8"))
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    assert schema["items"]
    return kind(schema)


def test_every_record_of_a_sweep_is_as_the_schema_says(swept, validator):
    records = json.loads(swept.read_text(), parse_constant=pytest.fail)
    assert {record["status"] for record in records} == {"ok", "failed", "oom", "skipped", "wrong"}
    assert [error.message for error in validator.iter_errors(records)] == []
    assert all(list(record)[: len(PUBLISHED)] == PUBLISHED for record in records)


def test_the_schema_tells_a_record_from_what_is_none(swept, validator):
    record = json.loads(swept.read_text())[0]
    assert validator.is_valid([])
    assert not validator.is_valid(record)
    assert not validator.is_valid([3])
    for damage in ({"status": "fine"}, {"forward_time_mean": "fast"}, {"sequence_length": 0}, {"samples": [1.0]}):
        assert not validator.is_valid([{**record, **damage}])
    assert not validator.is_valid([{name: value for name, value in record.items() if name != "block_name"}])
