"""Where Snakemake runs a study's jobs, and what it is told about that. Importing this imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise

from desam_nnunet.system.cores import usable_cores
from desam_nnunet.system.gpus import visible_gpus

THREADS = 8  # of a job that computes, on a cluster
JOBS = 100  # at once, there
_PROFILE, _WORKFLOW_PROFILE = "--profile", "--workflow-profile"


def is_local(more: Sequence[str]) -> bool:
    """Whether jobs run on this machine, as far as Snakemake's arguments say it: profiles may say anything."""
    return not _has_profile(more) and all(_given(more, flag, "local") == "local" for flag in ("--executor", "-e"))


def placed(more: Sequence[str], device: str, cores: int | None) -> tuple[int, list[str]]:
    """Threads of a job that computes, and the arguments that say how many jobs may run at once.

    Args:
        more: Snakemake's own arguments, as typed.
        cores: To use at once, on a cluster in each job; None for all that this process may use, there 8.
    """
    # what lies in `default` or `profiles/default`, where the command is typed, is no profile of ours
    own = [] if _given(more, _WORKFLOW_PROFILE) else [_WORKFLOW_PROFILE, "none"]
    if is_local(more):
        gpus = max(1, len(visible_gpus())) if device == "cuda" else 1
        cores = cores or usable_cores()
        return max(1, cores // gpus), [*own, "--cores", str(cores), "--resources", f"gpu={gpus}"]
    if not _has_profile(more) and not any(_given(more, flag) for flag in ("--jobs", "-j")):
        own += ["--jobs", str(JOBS)]  # which Snakemake wants to know
    return cores or THREADS, own


def _has_profile(more: Sequence[str]) -> bool:
    profile = _given(more, _PROFILE, os.environ.get("SNAKEMAKE_PROFILE", "none"))
    return any(name not in ("", "none") for name in (profile, _given(more, _WORKFLOW_PROFILE)))


def _given(more: Sequence[str], flag: str, otherwise: str = "") -> str:
    """The value of one of Snakemake's flags."""
    words = [part for word in more for part in word.split("=", 1)]
    return dict(pairwise(words)).get(flag, otherwise)
