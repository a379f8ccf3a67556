"""Times as people say them, and as Snakemake writes them."""

from __future__ import annotations

import csv
from collections.abc import Container
from contextlib import suppress
from pathlib import Path


def duration(seconds: float) -> str:
    """In hours and minutes; in seconds where it is less than a minute."""
    if seconds < 59.5:
        return f"{max(1, round(seconds))} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def seconds_of(benchmarks: Path, but: Container[Path] = ()) -> list[float]:
    """What jobs took, by the benchmark files in a folder, but for some of them; one that a kill has left empty says
    nothing."""
    known: list[float] = []
    for path in benchmarks.rglob("*.tsv"):
        if path in but:
            continue
        with open(path, newline="") as stream, suppress(KeyError, ValueError, TypeError):
            known += [float(row["s"]) for row in csv.DictReader(stream, delimiter="\t")]
    return known
