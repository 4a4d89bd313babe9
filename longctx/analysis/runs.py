"""The results files that a command was given, each under a short label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longctx.analysis.plausibility import mark_suspects
from longctx.errors import ResultsError
from longctx.results import BenchmarkResult, last_results_path, read_results


def load_runs(paths: Sequence[str | Path], *, results_dir: str | Path) -> dict[str, list[BenchmarkResult]]:
    """label -> rows of each file in `paths`, or of the newest file under `results_dir` if none is named.

    Rows whose time does not grow get the warning `suspect`, whoever wrote them, and those of an older source of a block
    its first digits in their name. Raises ResultsError for a file that cannot be read or holds no rows, and when there
    is no sweep yet.
    """
    runs = {}
    for label, path in run_paths(paths, results_dir=results_dir).items():
        rows = read_results(path)
        if not rows:
            raise ResultsError(f"{path} holds no results", "its sweep ended before the first cell was done")
        name_older_sources(rows)
        mark_suspects(rows)
        runs[label] = rows
    return runs


def name_older_sources(rows: Sequence[BenchmarkResult]) -> None:
    """`Mine` becomes `Mine@0a1b2c3` in the rows of a source that is not that of the last row of this name."""
    newest = {row.block_name: row.source_hash for row in rows if row.source_hash}
    for row in rows:
        if row.source_hash and row.source_hash != newest[row.block_name]:
            row.block_name += _mark(row)


def is_of_older_source(row: BenchmarkResult) -> bool:
    """Whether `name_older_sources` has named it."""
    return bool(row.source_hash) and str(row.block_name).endswith(_mark(row))


def _mark(row: BenchmarkResult) -> str:
    return f"@{str(row.source_hash)[:7]}"


def run_paths(paths: Sequence[str | Path], *, results_dir: str | Path) -> dict[str, Path]:
    """label -> file, of the files that `load_runs` reads. A label is the file's stem, with its folder where two stems
    are alike."""
    chosen = [named_file(path, results_dir=results_dir) for path in paths]
    if not chosen:
        newest = last_results_path(results_dir)
        if newest is None:
            raise ResultsError(
                f"there are no results under {str(results_dir)!r} yet",
                "run `longctx sweep` first, or name a results file",
            )
        chosen = [Path(newest)]
    chosen = list(dict.fromkeys(chosen))
    return dict(zip(_labels(chosen), chosen, strict=True))


def named_file(name: str | Path, *, results_dir: str | Path) -> Path:
    """The file that is meant by a name: a bare one that is none here may be where `--output-file` puts it."""
    path = Path(name)
    saved = Path(results_dir, path)
    return saved if path.name == str(path) and not path.exists() and saved.exists() else path


def _labels(paths: Sequence[Path]) -> list[str]:
    stems = [path.stem for path in paths]
    labels: list[str] = []
    for path, stem in zip(paths, stems, strict=True):
        label = stem if stems.count(stem) == 1 else f"{path.resolve().parent.name}/{stem}"
        number = 2
        while label in labels:
            label = f"{label} ({number})"
            number += 1
        labels.append(label)
    return labels
