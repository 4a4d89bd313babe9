"""Results files that strangers wrote, or that are none: nothing in them is obeyed, and nothing happens to them."""

from __future__ import annotations

import dataclasses
import json
import pickle
import unicodedata
from pathlib import Path

import pytest
from made_records import FLOATS, FOREIGN, write

import longctx
from longctx import results
from longctx.errors import ResultsError
from longctx.results import BenchmarkResult, plain_text, read_results


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
