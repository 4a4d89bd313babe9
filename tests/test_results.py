"""A result and its file: the published form, resuming, and a file that is whole at every moment."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import stat
import tempfile
import threading

import pytest
from made_records import FOREIGN, PUBLISHED, full_result, write

import longctx
from longctx.errors import ResultsError
from longctx.results import STATUSES, BenchmarkResult, ResultsFile, last_results_path, read_records, read_results

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


def test_resume_keeps_what_a_newer_version_says_of_a_row_until_it_is_measured_anew(tmp_path):
    row = result_of(samples=[[1.0, 2.0]])
    path = write(tmp_path / "run.json", [row.to_json() | {"humidity": 0.4}])
    file, earlier = ResultsFile.open(path, resume=True, force=False)
    file.save([dataclasses.replace(*earlier, command="another")])
    (record,) = read_records(path)
    assert record["humidity"] == 0.4 and record["command"] == "another"
    file.save([dataclasses.replace(*earlier, samples=[[1.0, 2.0], [3.0]])])
    assert "humidity" not in read_records(path)[0]


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
