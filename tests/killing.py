"""Builds a store in processes that are killed at random moments. Run by test_cache_build.py.

Arguments: data set, plans, number of kills, longest life in seconds. The parent only imports and forks: a process
that has computed can't be forked safely.
"""

import os
import random
import signal
import sys
import time

import torch

from desam_nnunet.cache.manage import build_dataset


def main() -> None:
    dataset, plans, kills, longest = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    chance = random.Random(0)
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            build_dataset(dataset, plans, "2d", "DeSAMTrainer", torch.device("cpu"), 1, 0)
            os._exit(0)
        time.sleep(chance.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
