"""Builds a store again and again, each time in a process that dies at a chosen point. Run by test_cache_kills.py.

    python killed_builds.py DATASET PLANS FOLDER

For every number on standard input one process builds and dies at that point of what it does in FOLDER, or comes to its
end; how it ended is written on standard output: 0, or the signal's number, negative. Here nothing is encoded and torch
has one thread, so that the process can be forked safely.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from contextlib import redirect_stdout
from typing import Any

import torch
from killing import die_at

from desam_nnunet.training import dataset_cache as manage


def main() -> None:
    dataset, plans, folder = sys.argv[1:]
    torch.set_num_threads(1)
    with redirect_stdout(sys.stderr):
        prepared = prepare(dataset, plans)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            build(prepared, int(line), folder)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def prepare(dataset: str, plans: str) -> tuple[Any, ...]:
    """What the command gives to the building of what is missing."""
    given: list[tuple[Any, ...]] = []
    build_missing, manage.build_missing = manage.build_missing, lambda *arguments: given.append(arguments)
    manage.build_dataset(dataset, plans, "2d", "DeSAMTrainer", torch.device("cpu"), 1, 0)
    manage.build_missing = build_missing
    return given[0]


def build(prepared: tuple[Any, ...], point: int, folder: str) -> None:
    """Ends the process in any case."""
    os.getpid = lambda: 0  # builds begin at different cases, by their processes' numbers: here all at the first
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    die_at(point, re.escape(folder))
    try:
        manage.build_missing(*prepared)
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
