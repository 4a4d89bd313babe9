"""Units and names: numbers keep their digits, names lose what a terminal would obey."""

from __future__ import annotations

import math

import pytest
from rich.cells import cell_len

from longctx.terminal import format as fmt


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (math.nan, "-"),
        (math.inf, "-"),
        (True, "-"),
        (0, "0"),
        (12345.6, "12,346"),
        (999.4, "999"),
        (12.34, "12.3"),
        (0.01234, "0.0123"),
        (1e-9, "1e-09"),
        (1e15, "1e+15"),
    ],
)
def test_number(value, text: str) -> None:
    assert fmt.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.5, "1.50 s"), (0.0123, "12.3 ms"), (4.5e-6, "4.50 us"), (2e-9, "0.00200 us"), (None, "-")]
)
def test_duration(seconds, text: str) -> None:
    assert fmt.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0802, "0.080x"),
        (0.0819, "0.082x"),
        (0.1019, "0.10x"),
        (1.5, "1.50x"),
        (0.0, "0.00x"),
        (200.4, "200x"),
        (None, "-"),
    ],
)
def test_ratio(value, text: str) -> None:
    assert fmt.ratio(value) == text


def test_memory_and_rate() -> None:
    assert fmt.memory(3 << 30) == "3.00 GiB"
    assert fmt.memory(fmt.from_mib(64.0)) == "64.0 MiB"
    assert fmt.memory(10) == "10.0 B"
    assert fmt.rate(1.05e6) == "1.05 Mtok/s"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (3 * 3600 + 60, "3 h 01 min")]
)
def test_clock(seconds: float, text: str) -> None:
    assert fmt.clock(seconds) == text


@pytest.mark.parametrize(("length", "text"), [(1000, "1000"), (1024, "1K"), (65536, "64K"), (1 << 20, "1M"), (7, "7")])
def test_tokens(length: int, text: str) -> None:
    assert fmt.tokens(length) == text


def test_one_unit_for_a_column() -> None:
    assert fmt.column_unit([0.0031, 5.2]).name == "ms"
    assert fmt.column_unit([0.25, 5.2]).name == "s"
    assert fmt.column_unit([2e-6, None]).name == "us"
    assert fmt.column_unit([]).name == "s"


def test_names_are_one_line_that_no_terminal_obeys() -> None:
    name = fmt.plain("a\x1b[31mb\x07\nc\u202ed\u200be\x9bf\udc80")
    assert name == "a [31mb c d e f"
    assert fmt.plain("[red]x[/]") == "[red]x[/]"


@pytest.mark.parametrize("width", range(1, 14))
def test_a_shortened_name_fits_and_keeps_both_ends(width: int) -> None:
    for name in ("a_long_block_name", "日本語の名前です"):
        short = fmt.shorten(name, width)
        assert cell_len(short) <= width
        if width >= 6:
            assert (short[0], short[-1]) == (name[0], name[-1])
    assert fmt.shorten("short", 5) == "short"


@pytest.mark.parametrize("width", [8, 12, 18, 24])
@pytest.mark.parametrize(
    "names",
    [
        [f"DPASSM:window_size={w},state_dim={s}" for w in (128, 256) for s in (32, 64)],
        ["DPASSM:window_size=128 forward", "DPASSM:window_size=256 forward", "Dense forward"],
        ["some.package:ABlockOfMine", "some.paxxage:ABlockOfMine", "some.p…kOfMine", "Dense"],
        [f"Block:alpha=1,beta={i},gamma=3" for i in range(30)],
    ],
)
def test_short_names_fit_and_stay_apart(names: list[str], width: int) -> None:
    short = fmt.short_names(names, width)
    assert list(short) == names and len(set(short.values())) == len(names)
    assert all(len(said) <= width for said in short.values())
    assert all(short[name] == name for name in names if len(name) <= width)


def test_names_that_would_be_alike_keep_their_values() -> None:
    names = ["DPASSM:window_size=128,state_dim=64", "DPASSM:window_size=256,state_dim=64", "Dense"]
    assert list(fmt.short_names(names, 14).values()) == ["DPASSM:128,64", "DPASSM:256,64", "Dense"]
    assert fmt.short_names(["BLADE:chunk_size=256"], 14) == {"BLADE:chunk_size=256": "BLADE:c…ze=256"}
