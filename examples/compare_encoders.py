"""Is an encoder worth having? Compared with random weights and with nnU-Net, at the same time for training.

    python examples/compare_encoders.py DATA WORK random weights.safetensors --baselines 1 10

DATA holds one folder per site (RUNMC to train on, UCL unseen) with CaseNN.nii.gz and CaseNN_segmentation.nii.gz, as
in PROMISE12 (Litjens et al., Medical Image Analysis 18(2):359-373, 2014; research use). Everything runs through
``desam cross-site``: five folds, so that each case of RUNMC is segmented once by a model that has not seen it, and the
five models together segment UCL. Whole volumes, all slices.

How many iterations the time allows is measured first, once for each trainer, and is the same for all encoders.
A run that was stopped continues. Choose by RUNMC; UCL is there to be reported.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from desam_nnunet.evaluation.statistics import Summary, summarise

SOURCE, TARGET = "RUNMC", "UCL"
TRAINERS = ("DeSAMTrainer", "DeSAMTrainerWholeBox")
BASELINE, RANDOM = "nnUNetTrainer", "random"
EPOCHS, TRIAL_EPOCHS, TRIAL_ITERATIONS = 10, 3, 15


class Row(NamedTuple):
    """One model: who trained it for how long, and each case's Dice at both sites."""

    name: str
    trainer: str
    iterations: int
    minutes: float
    source: pd.Series
    target: pd.Series


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DATA", help=f"folder with {SOURCE} and {TARGET}")
    parser.add_argument("work", type=Path, metavar="WORK", help="folder to work in")
    parser.add_argument("encoders", nargs="+", metavar="ENCODER",
                        help=f"a weights file, or {RANDOM}: vit_tiny's random weights")
    parser.add_argument("--minutes", type=float, default=3, help="of training for each fold (default: 3)")
    parser.add_argument("--baselines", type=int, nargs="*", default=[1], metavar="TIMES",
                        help=f"{BASELINE} at so many times the minutes (default: 1)")
    parser.add_argument("--image-size", type=int, default=256, help="SAM's input in pixels (default: 256)")
    parser.add_argument("--batch-size", type=int, default=6, help="default: 6")
    parser.add_argument("--lr", type=float, default=5e-4, help="DeSAM's learning rate (default: 5e-4)")
    parser.add_argument("-tr", nargs="+", default=TRAINERS, metavar="TRAINER", help=f"default: {' '.join(TRAINERS)}")
    parser.add_argument("-device", default="cpu", choices=["cpu", "cuda"], help="default: cpu")
    options = parser.parse_args()
    for name in options.encoders:
        if name != RANDOM and not Path(name).is_file():
            parser.error(f"{name} is not a weights file, nor {RANDOM}")
    rows = []
    for trainer in options.tr:
        seconds = seconds_per_iteration(options, trainer)
        rows += [study(options, trainer, encoder, options.minutes, seconds) for encoder in options.encoders]
    if options.baselines:
        seconds = seconds_per_iteration(options, BASELINE)
        rows += [study(options, BASELINE, RANDOM, times * options.minutes, seconds) for times in options.baselines]
    text = report(options, rows)
    (options.work / "encoders.md").write_text(text)
    print(text)


def seconds_per_iteration(options: argparse.Namespace, trainer: str) -> float:
    """Of training alone, from a short run with random weights, without its first epoch."""
    folder = options.work / f"trial_{trainer}"
    note = folder / "seconds.json"
    if not note.is_file():
        cross_site(options, folder, trainer, RANDOM, TRIAL_EPOCHS, TRIAL_ITERATIONS, folds=["0"], targets=[SOURCE])
        minutes = pd.DataFrame(read_report(folder)["costs"])["training_minutes"].sum()
        note.write_text(json.dumps(minutes * 60 / (TRIAL_EPOCHS * TRIAL_ITERATIONS)))
    return json.loads(note.read_text())


def study(options: argparse.Namespace, trainer: str, encoder: str, minutes: float, seconds: float) -> Row:
    """All folds of one trainer on one encoder."""
    iterations = max(1, round(minutes * 60 / seconds / EPOCHS))
    name = RANDOM if encoder == RANDOM else Path(encoder).parent.name
    label = f"{minutes:g} min" if trainer == BASELINE else name
    folder = options.work / f"{trainer}_{label.replace(' ', '')}"
    cross_site(options, folder, trainer, encoder, EPOCHS, iterations, folds=list("01234"), targets=[SOURCE, TARGET])
    scores = pd.read_csv(folder / "scores.csv")
    scores = scores[scores.protocol == "volume"].set_index("case")
    took = pd.DataFrame(read_report(folder)["costs"])["training_minutes"].sum() / 5
    return Row(label, trainer, EPOCHS * iterations, took, *(scores[scores.target == site].dice.sort_index()
                                                           for site in (SOURCE, TARGET)))


def cross_site(
    options: argparse.Namespace, folder: Path, trainer: str, encoder: str, epochs: int, iterations: int, *,
    folds: list[str], targets: list[str],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "batch_size": options.batch_size,
        "sam": {"encoder": "vit_tiny" if encoder == RANDOM else str(Path(encoder).resolve()),
                "image_size": options.image_size, "features": "online", "epochs": epochs,
                "iterations_per_epoch": iterations, "val_iterations_per_epoch": 2},
        "desam": {"lr": options.lr},
    }
    (folder / "settings.json").write_text(json.dumps(settings, indent=1))
    command = [Path(sys.executable).with_name("desam"), "cross-site", options.data, "-o", folder, "-tr", trainer,
               "--sources", SOURCE, "--targets", *targets, "-f", *folds, "--settings", folder / "settings.json",
               "--labels", "prostate=1", "--channels", "T2", "-device", options.device]
    subprocess.run([str(part) for part in command], check=True)


def read_report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def report(options: argparse.Namespace, rows: list[Row]) -> str:
    lines = [
        f"Dice of whole volumes, all slices. {options.minutes:g} minutes of training a fold, batch "
        f"{options.batch_size}, input {options.image_size}.", "",
        f"| trainer | encoder or time | iterations | min a fold | {SOURCE}, 5 folds | {TARGET} |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(f"| {row.trainer} | {row.name} | {row.iterations} | {row.minutes:.1f} | "
                     f"{said(summarise(row.source))} | {said(summarise(row.target))} |")
    lines += ["", "Less random weights, case by case:", "",
              f"| trainer | encoder | {SOURCE} | {TARGET} |", "|---|---|---|---|"]
    for row in rows:
        for other in rows:
            if other.trainer == row.trainer and other.name == RANDOM and row is not other:
                lines.append(f"| {row.trainer} | {row.name} | {said(summarise(row.source - other.source))} | "
                             f"{said(summarise(row.target - other.target))} |")
    lines += ["", "Every case:", ""]
    for site in ("source", "target"):
        table = pd.DataFrame({f"{row.trainer} {row.name}": getattr(row, site) for row in rows})
        lines += [table.round(3).to_csv(sep="|"), ""]
    return "\n".join(lines)


def said(summary: Summary) -> str:
    """Mean and its interval."""
    if np.isnan(summary.low):
        return f"{summary.mean:.3f}"
    return f"{summary.mean:.3f} ({summary.low:.3f} to {summary.high:.3f})"


if __name__ == "__main__":
    main()
