"""How many cores this process may compute on."""

from __future__ import annotations

import os
import sys

import joblib


def usable_cores() -> int:
    """Cores that this process may compute on: those it is bound to or limited to, and no more than OMP_NUM_THREADS."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return min(joblib.cpu_count(), int(asked) if asked.isdecimal() and int(asked) else sys.maxsize)
