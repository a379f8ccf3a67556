"""Prostate MRI from two hospitals: train on one, segment the other, next to plain nnU-Net.

    python examples/promise12.py DATA WORK

DATA holds one folder per site (RUNMC to train on, UCL unseen) with CaseNN.nii.gz and CaseNN_segmentation.nii.gz, as
in PROMISE12 (Litjens et al., Medical Image Analysis 18(2):359-373, 2014; research use). Everything that follows the
conversion is nnU-Net's own commands. All trainers see the same plans, fold, batch size and number of iterations.

A run that was stopped continues: what is there already is not done again, so trainers can be added to it with -tr.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from desam_nnunet.cache.store import open_stores

DATASET, NAME, PLANS = 512, "Dataset512_RUNMC", "Promise12Plans"
SOURCE, TARGET = "RUNMC", "UCL"
TRAINERS = ("DeSAMTrainer", "DeSAMTrainerWholeBox", "nnUNetTrainer")
BATCH_SIZE, VALIDATION_ITERATIONS = 8, 5


class Row(NamedTuple):
    """Mean whole-volume Dice of one trainer, on all slices.

    `minutes` are of training, its validation included; `step` is the median epoch over its iterations, in seconds.
    """

    trainer: str
    source: float
    target: float
    minutes: float
    step: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DATA", help=f"folder with {SOURCE} and {TARGET}")
    parser.add_argument("work", type=Path, metavar="WORK", help="folder to work in")
    parser.add_argument("-tr", nargs="+", default=TRAINERS, metavar="TRAINER", help=f"default: {' '.join(TRAINERS)}")
    parser.add_argument("--encoder", default="vit_tiny", help="default: vit_tiny, whose weights are random")
    parser.add_argument("--image-size", type=int, default=256, help="SAM's input in pixels (default: 256)")
    parser.add_argument("--features", default="cached", choices=["cached", "online"], help="default: cached")
    parser.add_argument("--views", type=int, default=1, help="versions of each cached tile (default: 1)")
    parser.add_argument("--cache-dtype", default="float16", choices=["float16", "int8"], help="default: float16")
    parser.add_argument("--epochs", type=int, default=6, help="default: 6")
    parser.add_argument("--iterations", type=int, default=50, help="per epoch (default: 50)")
    parser.add_argument("--lr", type=float, default=5e-4, help="DeSAM's learning rate (default: 5e-4)")
    parser.add_argument("--disable_tta", action="store_true",
                        help=f"predict {TARGET} without mirroring, in a quarter of the time")
    parser.add_argument("-device", default="cpu", choices=["cpu", "cuda", "mps"], help="default: cpu")
    options = parser.parse_args()
    for site in (SOURCE, TARGET):
        if not (options.data / site).is_dir():
            parser.error(f"{options.data / site} does not exist: DATA must hold the folders {SOURCE} and {TARGET}")
    work = options.work.resolve()
    remember_settings(parser, options, work)
    prepare(options, work)
    cached = options.features == "cached" and any(trainer.startswith("DeSAM") for trainer in options.tr)
    cache = encode(options, work) if cached else "none: tiles are encoded as training goes"
    rows = [evaluate(options, work, trainer) for trainer in options.tr]
    text = report(options, cache, rows)
    (work / "promise12.md").write_text(text)
    print(text)


def remember_settings(parser: argparse.ArgumentParser, options: argparse.Namespace, work: Path) -> None:
    """A folder holds one run: figures of other settings must not come under these."""
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("data", "work", "tr")}
    noted = work / "settings.json"
    if noted.is_file() and json.loads(noted.read_text()) != settings:
        parser.error(f"{work} holds a run with other settings ({noted}): choose another WORK or the same settings")
    work.mkdir(parents=True, exist_ok=True)
    noted.write_text(json.dumps(settings, indent=4))


def prepare(options: argparse.Namespace, work: Path) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (work / name).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(work / name)
    os.environ.setdefault("nnUNet_n_proc_DA", "1" if options.device == "cpu" else "4")
    raw = work / "nnUNet_raw" / NAME
    convert(options.data / SOURCE, raw / "imagesTr", raw / "labelsTr")
    convert(options.data / TARGET, work / TARGET / "images", work / TARGET / "labels")
    description = {"channel_names": {"0": "T2"}, "labels": {"background": 0, "prostate": 1},
                   "numTraining": len(list((raw / "labelsTr").iterdir())), "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(description, indent=4))
    preprocessed = work / "nnUNet_preprocessed" / NAME
    if not (preprocessed / "nnUNetPlans_2d").is_dir():
        run("nnUNetv2_plan_and_preprocess", "-d", DATASET, "-c", "2d", "--verify_dataset_integrity")
    write_plans(preprocessed, options)


def convert(site: Path, images: Path, labels: Path) -> None:
    """Copies a site's volumes under nnU-Net's names."""
    for folder in (images, labels):
        folder.mkdir(parents=True, exist_ok=True)
    for label in sorted(site.glob("*_segmentation.nii.gz")):
        case = label.name.removesuffix("_segmentation.nii.gz")
        shutil.copyfile(site / f"{case}.nii.gz", images / f"{case}_0000.nii.gz")
        shutil.copyfile(label, labels / f"{case}.nii.gz")


def write_plans(preprocessed: Path, options: argparse.Namespace) -> None:
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    plans["plans_name"] = PLANS
    sam = {"encoder": options.encoder, "image_size": options.image_size, "features": options.features,
           "views": options.views, "cache_dtype": options.cache_dtype, "epochs": options.epochs,
           "iterations_per_epoch": options.iterations, "val_iterations_per_epoch": VALIDATION_ITERATIONS}
    plans["configurations"]["2d"] |= {"batch_size": BATCH_SIZE, "sam": sam, "desam": {"lr": options.lr}}
    (preprocessed / f"{PLANS}.json").write_text(json.dumps(plans, indent=4))


def encode(options: argparse.Namespace, work: Path) -> str:
    """Builds the embedding cache of all cases, and says how long that took and how large it is."""
    done = work / "encoded"
    minutes = minutes_of(
        lambda: run("desam", "cache", "-d", DATASET, "-p", PLANS, "-device", options.device),
        work / "encoding_minutes.txt", done=done.exists())
    done.touch()
    store = max(open_stores(work / "nnUNet_preprocessed" / NAME), key=lambda store: store.folder.stat().st_mtime)
    tiles = sum(len(store.entries(case)) for case in store.cases())
    return f"{tiles} tiles in {minutes:.1f} minutes, {store.size() / 1e9:.2f} GB as {options.cache_dtype}"


def evaluate(options: argparse.Namespace, work: Path, trainer: str) -> Row:
    """Trains fold 0, predicts the target site, scores both."""
    model = work / "nnUNet_results" / NAME / f"{trainer}__{PLANS}__2d"
    out = work / TARGET / trainer
    minutes = train(options, model, trainer)
    if not (out / "summary.json").is_file():
        run("nnUNetv2_predict", "-i", work / TARGET / "images", "-o", out, "-d", DATASET, "-c", "2d", "-f", 0,
            "-tr", trainer, "-p", PLANS, "-device", options.device, "-npp", 1, "-nps", 1,
            *["--disable_tta"] * options.disable_tta)
        run("nnUNetv2_evaluate_folder", work / TARGET / "labels", out, "-djfile", out / "dataset.json",
            "-pfile", out / "plans.json", "-np", 1)
    return Row(trainer, dice(model / "fold_0" / "validation"), dice(out), minutes, step_seconds(options, model))


def train(options: argparse.Namespace, model: Path, trainer: str) -> float:
    """Minutes that training took, noted beside the model."""
    model.mkdir(parents=True, exist_ok=True)
    command = ("nnUNetv2_train", DATASET, "2d", 0, "-tr", trainer, "-p", PLANS, "-device", options.device, "--c")
    return minutes_of(
        lambda: train_plain(options) if trainer == "nnUNetTrainer" else run(*command),
        model / "minutes.txt", done=(model / "fold_0" / "validation" / "summary.json").is_file())


def minutes_of(work: Callable[[], None], noted: Path, *, done: bool) -> float:
    """How long `work` takes, earlier attempts that were stopped counted in."""
    before = float(noted.read_text()) if noted.is_file() else 0.0
    if done:
        return before
    started = time.monotonic()
    try:
        work()
    finally:
        minutes = before + (time.monotonic() - started) / 60
        noted.write_text(str(minutes))
    return minutes


def train_plain(options: argparse.Namespace) -> None:
    """nnU-Net's own 2D trainer for as many iterations."""
    words = ["-m", "desam_nnunet.cross_site.budget", str(DATASET), "0", "-tr", "nnUNetTrainer", "-p", PLANS,
             "-device", options.device, f"--epochs={options.epochs}", f"--iterations_per_epoch={options.iterations}",
             f"--val_iterations_per_epoch={VALIDATION_ITERATIONS}"]
    subprocess.run([sys.executable, *words], check=True)


def step_seconds(options: argparse.Namespace, model: Path) -> float:
    """From nnU-Net's log: the median epoch, validation iterations counted as training's."""
    logs = "".join(path.read_text() for path in sorted((model / "fold_0").glob("training_log_*.txt")))
    epochs = [float(seconds) for seconds in re.findall(r"Epoch time: ([\d.]+) s", logs)]
    return statistics.median(epochs) / (options.iterations + VALIDATION_ITERATIONS)


def dice(folder: Path) -> float:
    return json.loads((folder / "summary.json").read_text())["foreground_mean"]["Dice"]


def report(options: argparse.Namespace, cache: str, rows: list[Row]) -> str:
    weights = "RANDOM weights" if options.encoder == "vit_tiny" else "weights from its file"
    settings: dict[str, Any] = {
        "encoder": f"{options.encoder}, {weights}", "image size": options.image_size,
        "embedding cache": cache,
        "views of a tile": options.views if options.features == "cached" else "each patch is augmented anew",
        "iterations": f"{options.epochs} epochs of {options.iterations}, batch {BATCH_SIZE}",
        "DeSAM learning rate": f"{options.lr}; SAMed and DB-SAM: as published",
        f"mirroring when predicting {TARGET}": "off" if options.disable_tta else "where training mirrored",
        "device": f"{options.device} ({torch.get_num_threads()} threads, {platform.machine()})",
        "torch": torch.__version__,
    }
    lines = [f"- {name}: {value}" for name, value in settings.items()]
    lines += ["", f"| trainer | {SOURCE}, fold 0 validation | {TARGET}, unseen | minutes | seconds an iteration |",
              "|---|---|---|---|---|"]
    lines += [f"| {row.trainer} | {row.source:.3f} | {row.target:.3f} | {row.minutes:.1f} | {row.step:.3f} |"
              for row in rows]
    return "\n".join(lines) + "\n"


def run(command: str, *arguments: object) -> None:
    words = [str(Path(sys.executable).with_name(command)), *map(str, arguments)]
    print("$", command, *words[1:], flush=True)
    subprocess.run(words, check=True)


if __name__ == "__main__":
    main()
