"""Runs the benchmarks, on the CPU and on a CUDA device where there is one, and writes benchmarks/results/.

Every figure is a ratio of two procedures measured in turn in one run, after their outputs were compared.
"""

from __future__ import annotations

import argparse
import sys

import torch

import building
import cache
import encoder
import epoch
import estimates
import folds
import grid
import parts
import precision
import pretraining
import scores
import slabs
import startup
import trainers
import training
import whole
from measure import compute_exactly

SECTIONS = {"encoder": encoder.run, "grid": grid.run, "scores": scores.run, "training": training.run,
            "folds": folds.run, "cache": cache.run, "building": building.run, "trainers": trainers.run,
            "parts": parts.run, "precision": precision.run, "pretraining": pretraining.run, "slabs": slabs.run,
            "estimates": estimates.run, "whole": whole.run, "epoch": epoch.run}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=(*SECTIONS, "startup"), default=[*SECTIONS, "startup"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-device", choices=("cpu", "cuda"), help="default: both, where there are both")
    args = parser.parse_args()
    compute_exactly()
    devices = [args.device] if args.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    passed = True
    for name in args.only:
        if name == "startup":
            passed &= startup.run()
            continue
        for device in devices:
            print(f"-- {name}, {device}", flush=True)
            passed &= SECTIONS[name](torch.device(device), args.repeats).passed
    print("All that is required is reached." if passed else "Something that is required was not reached: see FAIL.")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
