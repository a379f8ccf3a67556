"""Kills its whole group of processes at the N-th of some events, whichever of them it is in; for test_cross_site.py.

Every Python process imports this at its start if this folder is on PYTHONPATH. ``KILLED_AT`` holds the number, a file
that counts, and a pattern of events and paths, such as ``1 /tmp/count os.rename .*\\.json``.
"""

import os
import re
import signal
import sys
from typing import Any

_NUMBER, _COUNT, _PATTERN = os.environ["KILLED_AT"].split(" ", 2)


def _watch(event: str, given: tuple[Any, ...]) -> None:
    if event not in ("open", "os.rename") or given[0] == _COUNT:
        return
    if event == "open" and not given[2] & (os.O_WRONLY | os.O_RDWR):
        return
    if not re.search(_PATTERN, " ".join([event, *(str(word) for word in given[:2])])):
        return
    count = os.open(_COUNT, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(count, b".")
    if os.fstat(count).st_size == int(_NUMBER):
        os.killpg(0, signal.SIGKILL)
    os.close(count)


sys.addaudithook(_watch)
