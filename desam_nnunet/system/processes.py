"""What a process owes to others: to end with the one that started it, and to do a job alone."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout


def end_with(parent: int) -> None:
    """Lets this process end, with all that it has started, when the process of that number is gone."""

    def watch() -> None:
        while _is_alive(parent):
            time.sleep(0.5)
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has just ended
                child.kill()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _is_alive(number: int) -> bool:
    """A process that ended stays in the table of processes until its own parent looks at it."""
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def alone(lock: Path, patience: float, otherwise: str) -> Iterator[None]:
    """For one process at a time, on all machines that see the file; the system lets go of what a killed one held.

    Raises:
        RuntimeError: `otherwise`, when another has held it for `patience` seconds.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=patience):
            yield
    except Timeout as error:
        raise RuntimeError(otherwise) from error
