"""Says where the time of a command goes that runs in this process. Importing this imports nothing heavy."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any


def watched(work: Callable[..., Any], spent: dict[str, float], part: str) -> Callable[..., Any]:
    """A function that also adds its seconds to a part of what was spent."""

    @functools.wraps(work)
    def run(*args: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return work(*args, **options)
        finally:
            spent[part] = spent.get(part, 0.0) + time.perf_counter() - begin

    return run


def watch(owner: Any, name: str, spent: dict[str, float], part: str) -> None:
    """Watches a method of a class."""
    setattr(owner, name, watched(getattr(owner, name), spent, part))
