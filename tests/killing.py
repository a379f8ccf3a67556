"""Kills its own process at a chosen point of what it does to files: where it dies does not depend on how fast it is.

    python killing.py NUMBER PATTERN COMMAND ARGUMENTS...

runs one of the tested environment's commands up to its `NUMBER`-th point.
"""

from __future__ import annotations

import itertools
import os
import re
import resource
import signal
import sys
from importlib.metadata import entry_points
from typing import Any

FIRST_BYTES = 100  # written of a file that is cut: each file of a store has more
_CHANGES = {"open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate"}


def die_at(number: int, pattern: str) -> None:
    """Lets this process die at the `number`-th point from now on.

    A point is the moment before a file or folder is made, opened to be written, renamed or removed, if `pattern` is
    found in the event and its paths, such as ``os.rename /from /to``. Where a file is opened to be written there are
    two more: when it is made and empty, and when its first bytes are written.
    """
    points = itertools.count(1)

    def watch(event: str, given: tuple[Any, ...]) -> None:
        if event not in _CHANGES or (event == "open" and not given[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if not re.search(pattern, " ".join([event, *(str(word) for word in given[:2])])):
            return
        if next(points) == number:
            signal.raise_signal(signal.SIGKILL)
        if event == "open":
            for size in (0, FIRST_BYTES):
                if next(points) == number:
                    _die_after(size)

    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # here, in the main thread: other threads may write as well
    sys.addaudithook(watch)


def _die_after(size: int) -> None:
    """Lets this process die once a file that it writes has `size` bytes: the system cuts the writing there."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def main() -> None:
    number, pattern, command, *arguments = sys.argv[1:]
    (entry,) = entry_points(group="console_scripts", name=command)
    run = entry.load()
    sys.argv = [command, *arguments]
    die_at(int(number), pattern)
    sys.exit(run())


if __name__ == "__main__":
    main()
