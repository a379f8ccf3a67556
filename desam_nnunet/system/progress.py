"""Progress that one can watch, and that does not fill a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_IN_A_FILE = {"mininterval": 60.0, "bar_format": "{desc}: {n_fmt} of {total_fmt}{unit}, {elapsed}, {remaining} left\n"}


def progress(items: Iterable[Any] | None, what: str, unit: str, total: int | None = None, **options: Any) -> tqdm:
    """tqdm's bar on a terminal, and a line a minute where stderr is a file or a pipe.

    Args:
        items: What to go through, or None to count with ``update``.
        what: Is done.
        unit: Of what is counted, in the plural.
        total: How many there are, where `items` don't know it.
        options: More of tqdm's.
    """
    return tqdm(items, desc=what, unit=f" {unit}", total=total, **({} if sys.stderr.isatty() else _IN_A_FILE) | options)
