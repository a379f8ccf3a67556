"""Inputs that nobody would write: each is accepted and means what it says, or is refused in one sentence.

`make fuzz` tries ten thousand of each kind, the suite a few dozen. What failed once is tried first the next time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

_COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}  # machines differ in speed
settings.register_profile("suite", max_examples=30, derandomize=True, database=None, **_COMMON)
settings.register_profile("long", max_examples=10_000, **_COMMON)
settings.load_profile(os.environ.get("FUZZ_PROFILE", "suite"))

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 300), st.floats(), st.text(max_size=8),
    st.sampled_from([2**31, 2**63, -1, 0, 1, 0.5, "", "cached", "vit_tiny", "\x1b[31m", "../x", "=1"]))
JSON = st.recursive(SCALARS, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)), max_leaves=6)


def outcome(work: Callable[[], Any], *refusals: type[Exception]) -> Any:
    """What `work` gives, or None where it refuses in one sentence: anything else that it raises is a failure."""
    try:
        return work()
    except (ValueError, FileNotFoundError, *refusals) as error:
        text = str(error)
        assert text, "an empty message"
        assert text.isprintable(), f"not one line of plain text: {text!r}"
        assert len(text) < 2000, f"{len(text)} characters"
        return None
