"""Builds a store in processes that are killed at random moments. Run by test_cache_build.py.

Arguments: data set, plans, number of kills, and the folder in which tiles appear. A moment is a number of tiles that
a process has written and a little time more: where it dies does not depend on how fast the machine is. The parent only
imports and forks: a process that has computed can't be forked safely.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from desam_nnunet.cache.manage import build_dataset

_MOST = 4  # tiles that one process writes before it is killed


def main() -> None:
    dataset, plans, kills, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    chance = random.Random(0)
    for _ in range(kills):
        before, wanted = tiles(folder), chance.randint(0, _MOST)
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            build_dataset(dataset, plans, "2d", "DeSAMTrainer", torch.device("cpu"), 1, 0)
            os._exit(1)  # it came to its end: there was too little to build
        while tiles(folder) < before + wanted:
            if os.waitpid(child, os.WNOHANG) != (0, 0):
                sys.exit("A process ended before it could be killed.")
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def tiles(folder: Path) -> int:
    return sum(1 for _ in folder.glob("*/*.tile"))


if __name__ == "__main__":
    main()
