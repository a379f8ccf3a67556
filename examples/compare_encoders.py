"""Are pretrained weights worth having? Compared with random ones and with nnU-Net, at the same time for training.

    python examples/compare_encoders.py DATA WORK random run/weights.safetensors --baselines 1 10

DATA holds one folder per site (RUNMC to train on, UCL unseen), as ``desam cross-site`` reads them, here of
PROMISE12 (Litjens et al., Medical Image Analysis 18(2):359-373, 2014; research use). Everything runs through
``desam cross-site``: five folds, so that each case of RUNMC is segmented once by a model that has not seen it, and the
five models together segment UCL. Whole volumes, all slices.

A weights file, of vit_tiny's size, brings the encoder, the prompt encoder and the start of PRIM; nothing of PDMM. How
many iterations the time allows is measured first, with random weights, and is the same for all weights. nnU-Net has its
own plans' batch size and its own learning rate. A run that was stopped continues. Choose by RUNMC; UCL is there to be
reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from desam_nnunet.encoders.registry import ENCODERS
from desam_nnunet.encoders.state import read_weights
from desam_nnunet.encoders.weights import find_weights, identify, row_of_state
from desam_nnunet.evaluation.statistics import Summary, summarise
from desam_nnunet.nnunet.model_folder import read_checkpoint
from desam_nnunet.nnunet.sites import read_sites
from desam_nnunet.system.files import replace_file
from desam_nnunet.training.registry import check_trainers

SOURCE, TARGET = "RUNMC", "UCL"
TRAINERS = ("DeSAMTrainer", "DeSAMTrainerWholeBox")
BASELINE, RANDOM, TINY, UNTRAINED = "nnUNetTrainer", "random", "vit_tiny", "vit_tiny_random"
FOLDS = ("0", "1", "2", "3", "4")
EPOCHS, TRIAL_EPOCHS, TRIAL_ITERATIONS = 10, 4, 20
OFF = 0.1  # of the time that was wanted: said where it is more


class Row(NamedTuple):
    """One model: who trained it from what, what it took, and each case's Dice at both sites."""

    trainer: str
    name: str
    iterations: int
    wanted: float
    minutes: float
    source: pd.Series
    target: pd.Series


class Pace(NamedTuple):
    """Seconds of an iteration, and the batch size that they hold for."""

    seconds: float
    batch_size: int


def main() -> None:
    options = parse()
    paces = {trainer: measure_pace(options, trainer, options.batch_size) for trainer in options.tr}
    if options.baselines:
        planned = planned_batch_size(options, options.tr[0])
        paces[BASELINE] = measure_pace(options, BASELINE, planned)
    rows = [study(options, trainer, name, encoder, options.minutes, paces[trainer])
            for trainer in options.tr for name, encoder in options.encoders.items()]
    rows += [study(options, BASELINE, f"{times}x", UNTRAINED, times * options.minutes, paces[BASELINE])
             for times in options.baselines]
    text = report(options, rows, paces)
    (options.work / "encoders.md").write_text(text)
    print(text)


def parse() -> argparse.Namespace:
    """What was asked for, checked before hours are spent on it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DATA", help=f"folder with {SOURCE} and {TARGET}")
    parser.add_argument("work", type=Path, metavar="WORK", help="folder to work in")
    parser.add_argument("encoders", nargs="+", metavar="WEIGHTS",
                        help=f"a weights file, which its folder names, {TINY}, or {RANDOM}: {UNTRAINED}")
    parser.add_argument("--minutes", type=float, default=3, help="of training for each fold (default: 3)")
    parser.add_argument("--baselines", type=int, nargs="*", default=[1], metavar="TIMES",
                        help=f"{BASELINE} at so many times the minutes (default: 1)")
    parser.add_argument("--image-size", type=int, default=256, help="SAM's input in pixels (default: 256)")
    parser.add_argument("--batch-size", type=int, default=6, help="of our trainers (default: 6)")
    parser.add_argument("--lr", type=float, default=5e-4, help="DeSAM's learning rate (default: 5e-4)")
    parser.add_argument("-tr", nargs="+", default=TRAINERS, metavar="TRAINER", help=f"default: {' '.join(TRAINERS)}")
    parser.add_argument("-device", default="cpu", choices=["cpu", "cuda"], help="default: cpu")
    options = parser.parse_args()
    if not options.minutes > 0 or any(times < 1 for times in options.baselines):
        parser.error("--minutes and --baselines must be positive")
    if BASELINE in options.tr:
        parser.error(f"-tr {BASELINE}: it has no use for these weights, --baselines trains it")
    try:
        if missing := {SOURCE, TARGET} - set(read_sites(options.data)):
            raise ValueError(f"{options.data} has no folder {' and no folder '.join(sorted(missing))}.")
        check_trainers(options.tr)
        options.encoders = name_encoders(options.encoders)
        for encoder in options.encoders.values():
            path = find_weights(encoder)
            if path and (row := row_of_state(read_weights(path), path)).name != TINY:
                raise ValueError(f"{path} holds weights of {row.name}, but only those of {TINY}'s size take the "
                                 "time that is measured.")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    options.work.mkdir(parents=True, exist_ok=True)
    return options


def name_encoders(given: list[str]) -> dict[str, str]:
    """What the plans are to name, by what the report calls it.

    Raises:
        ValueError: Two have the same name.
    """
    named: dict[str, str] = {}
    for word in given:
        path = Path(word).resolve()
        name, encoder = (RANDOM, UNTRAINED) if word in (RANDOM, UNTRAINED) else (
            (word, word) if word in ENCODERS else (path.parent.name, str(path)))
        if name in named or (name == RANDOM and encoder != UNTRAINED):
            raise ValueError(f"{word} would be called {name}, as other weights are, because a file is called after its "
                             "folder: rename the folder.")
        named[name] = encoder
    return named


def measure_pace(options: argparse.Namespace, trainer: str, batch_size: int) -> Pace:
    """From a short run on random weights: the median epoch with its two validation iterations, the first left out."""
    folder = trial(options, trainer, batch_size)
    cross_site(options, folder, trainer, UNTRAINED, TRIAL_EPOCHS, TRIAL_ITERATIONS, batch_size, data=few(options))
    times = epoch_seconds(folder, "0")
    return Pace(statistics.median(times[1:]) / TRIAL_ITERATIONS, batch_size)


def trial(options: argparse.Namespace, trainer: str, batch_size: int) -> Path:
    return options.work / f"trial_{trainer}_{options.device}_{options.image_size}_{batch_size}"


def few(options: argparse.Namespace) -> Path:
    """A manifest of all training cases, and one of the other site."""
    sites = read_sites(options.data.resolve())
    rows = [{"case": case.name, "site": site, "image": ";".join(map(str, case.images)), "label": case.label}
            for site, cases in ((SOURCE, sites[SOURCE]), (TARGET, sites[TARGET][:1])) for case in cases]
    path = options.work / "few.csv"
    replace_file(path, [pd.DataFrame(rows).to_csv(index=False).encode()])
    return path


def planned_batch_size(options: argparse.Namespace, trainer: str) -> int:
    """What nnU-Net planned for the source."""
    folder = trial(options, trainer, options.batch_size) / "nnUNet_preprocessed"
    (plans,) = folder.glob("*/nnUNetPlans.json")
    return json.loads(plans.read_text())["configurations"]["2d"]["batch_size"]


def epoch_seconds(folder: Path, fold: str) -> list[float]:
    (model,) = (folder / "nnUNet_results").glob("*/*")
    log = read_checkpoint(model, fold, "checkpoint_final.pth")["logging"]
    return [end - begin for begin, end in zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=True)]


def study(
    options: argparse.Namespace, trainer: str, name: str, encoder: str, minutes: float, pace: Pace
) -> Row:
    """All folds of one trainer on one file of weights."""
    iterations = max(1, round(minutes * 60 / pace.seconds / EPOCHS))
    folder = options.work / f"{trainer}_{name}"
    cross_site(options, folder, trainer, encoder, EPOCHS, iterations, pace.batch_size, data=options.data, folds=FOLDS)
    scores = pd.read_csv(folder / "scores.csv")
    scores = scores[scores.protocol == "volume"].set_index("case")
    took = statistics.mean(sum(epoch_seconds(folder, fold)) / 60 for fold in FOLDS)
    dice = (scores[scores.target == site].dice.sort_index() for site in (SOURCE, TARGET))
    return Row(trainer, name, EPOCHS * iterations, minutes, took, *dice)


def cross_site(
    options: argparse.Namespace, folder: Path, trainer: str, encoder: str, epochs: int, iterations: int,
    batch_size: int, *, data: Path, folds: tuple[str, ...] = FOLDS[:1],
) -> None:
    settings = {
        "batch_size": batch_size,
        "sam": {"encoder": encoder, "identity": identify(encoder), "image_size": options.image_size,
                "features": "online", "epochs": epochs, "iterations_per_epoch": iterations,
                "val_iterations_per_epoch": 2},
        "desam": {"lr": options.lr},
    }
    path = folder.with_name(f"{folder.name}.json")
    if folder.is_dir() and path.is_file():
        then = flat(json.loads(path.read_text()))
        if differs := [f"{key} {then.get(key)}, not {value}" for key, value in flat(settings).items()
                       if then.get(key) != value]:
            sys.exit(f"{folder} was made with {', '.join(differs)}: give another WORK.")
    replace_file(path, [json.dumps(settings, indent=1).encode()])
    command = [Path(sys.executable).with_name("desam"), "cross-site", data, "-o", folder, "-tr", trainer,
               "--sources", SOURCE, "-f", *folds, "--settings", path, "--labels", "prostate=1", "--channels", "T2",
               "-device", options.device]
    code = subprocess.run([str(part) for part in command]).returncode
    if code:
        sys.exit(code)  # it said why


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Without the sections, whose keys all differ."""
    return {"batch_size": settings["batch_size"]} | settings["sam"] | settings["desam"]


def report(options: argparse.Namespace, rows: list[Row], paces: dict[str, Pace]) -> str:
    batches = ", ".join(f"{trainer} {pace.batch_size}" for trainer, pace in paces.items())
    lines = [
        f"Dice of whole volumes, all slices; {options.minutes:g} minutes of training a fold, input "
        f"{options.image_size}, DeSAM's learning rate {options.lr:g}, batch sizes: {batches}. {SOURCE}: each case by "
        "the one model of five "
        f"that has not seen it; {TARGET}: by the five together. In brackets 95 % bootstrap intervals over cases; one "
        "run each, so nothing here says how much another seed would change. Time for pretraining is not counted.", "",
        *table(["trainer", "weights or time", "iterations", "min a fold", SOURCE, TARGET],
               [[row.trainer, row.name, row.iterations, said_minutes(row), said(summarise(row.source)),
                 said(summarise(row.target))] for row in rows]),
    ]
    random = [row for row in rows if row.name == RANDOM]
    baselines = [row for row in rows if row.trainer == BASELINE]
    for title, pairs in (
        ("Less random weights, case by case", [(row, other) for row in rows for other in random
                                               if row.trainer == other.trainer and row is not other]),
        (f"Less {BASELINE}, case by case", [(row, other) for row in rows for other in baselines
                                            if row.trainer != BASELINE]),
    ):
        if pairs:
            lines += ["", f"{title}:", "", *table(
                ["trainer", "weights", "less", SOURCE, TARGET],
                [[row.trainer, row.name, f"{other.trainer} {other.name}", said(summarise(row.source - other.source)),
                  said(summarise(row.target - other.target))] for row, other in pairs])]
    for site, field in ((SOURCE, "source"), (TARGET, "target")):
        cases = pd.DataFrame({f"{row.trainer} {row.name}": getattr(row, field) for row in rows})
        lines += ["", f"Every case of {site}:", "", *table(
            ["case", *cases.columns], [[case, *(f"{value:.3f}" for value in values)] for case, *values in
                                       cases.itertuples()])]
    return "\n".join(lines) + "\n"


def table(head: list[str], rows: list[list[object]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


def said_minutes(row: Row) -> str:
    off = abs(row.minutes / row.wanted - 1) > OFF
    return f"{row.minutes:.1f}" + (f", wanted {row.wanted:g}" if off else "")


def said(summary: Summary) -> str:
    """Mean and its interval."""
    if np.isnan(summary.low):
        return f"{summary.mean:.3f}"
    return f"{summary.mean:.3f} ({summary.low:.3f} to {summary.high:.3f})"


if __name__ == "__main__":
    main()
