"""DeSAM on a phantom, from nothing to pictures: train on one site, segment two that the model never saw.

    make demo

Everything between the phantom and the pictures is nnU-Net's own commands. The encoder is vit_tiny, which comes
with the package and was pretrained on generated images: the demonstration needs no download, and shows the way, not
what SAM's features are worth.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk

import phantom

DATASET, PLANS, TRAINER = 501, "DemoPlans", "DeSAMTrainer"
SECTIONS: dict[str, Any] = {
    # online, since patches that are augmented anew help a small encoder most at a site that it has not seen
    "sam": {"encoder": "vit_tiny", "image_size": 192, "features": "online", "epochs": 18, "iterations_per_epoch": 50,
            "val_iterations_per_epoch": 5},
    # a decoder from scratch in 900 iterations: five times the published rate; 36 points instead of 81 for the time
    "desam": {"grid": 6, "lr": 5e-4},
}
BATCH_SIZE = 8


class Score(NamedTuple):
    """Of one volume. Dice over the whole volume; slices without the organ, and how many of them stayed empty."""

    case: str
    dice: float
    free: int
    empty: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("demo_work"), help="folder to work in (default: demo_work)")
    parser.add_argument("--cases", type=int, default=40, help="training and validation cases (default: 40)")
    options = parser.parse_args()
    work = options.work.resolve()
    started = time.monotonic()
    prepare(work, options.cases)
    step("train on SiteA, fold 0")
    run("nnUNetv2_train", DATASET, "2d", 0, "-tr", TRAINER, "-p", PLANS, "-device", "cpu")
    scores = {site: predict(work, site) for site in ("SiteB", "SiteC")}
    report(work, scores)
    draw(work)
    print(f"\nAll done in {(time.monotonic() - started) / 60:.1f} minutes. See {work / 'demo.png'}")


def prepare(work: Path, cases: int) -> None:
    """The phantom in nnU-Net's raw format, preprocessed, and plans with our sections."""
    folders = {name: work / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for name, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(folder)
    os.environ.setdefault("nnUNet_n_proc_DA", "1")
    os.environ.setdefault("nnUNet_def_n_proc", "2")  # export processes; each imports torch
    step("make the phantom: SiteA to train on, SiteB and SiteC unseen")
    phantom.write_dataset(folders["nnUNet_raw"], dataset_id=DATASET, cases=cases)
    phantom.write_unseen(work / "unseen")
    step("plan and preprocess")
    run("nnUNetv2_plan_and_preprocess", "-d", DATASET, "-c", "2d", "-np", 2, "-npfp", 2)
    write_plans(folders["nnUNet_preprocessed"] / f"Dataset{DATASET}_Phantom")


def write_plans(preprocessed: Path) -> None:
    """A copy of nnU-Net's plans whose 2D configuration holds our sections."""
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    plans["plans_name"] = PLANS
    plans["configurations"]["2d"] |= SECTIONS | {"batch_size": BATCH_SIZE}
    (preprocessed / f"{PLANS}.json").write_text(json.dumps(plans, indent=4))


def predict(work: Path, site: str) -> list[Score]:
    step(f"segment {site}, which the model never saw")
    images, labels, out = (work / "unseen" / site / "images", work / "unseen" / site / "labels",
                           work / "predicted" / site)
    run("nnUNetv2_predict", "-i", images, "-o", out, "-d", DATASET, "-c", "2d", "-f", 0, "-tr", TRAINER, "-p", PLANS,
        "-device", "cpu", "-npp", 1, "-nps", 1)
    run("nnUNetv2_evaluate_folder", labels, out, "-djfile", out / "dataset.json", "-pfile", out / "plans.json",
        "-np", 1)
    summary = json.loads((out / "summary.json").read_text())
    dice = {Path(row["reference_file"]).name: row["metrics"]["1"]["Dice"] for row in summary["metric_per_case"]}
    return [score(path, out / path.name, dice[path.name]) for path in sorted(labels.glob("*.nii.gz"))]


def score(reference: Path, prediction: Path, dice: float) -> Score:
    free = ~read(reference).any((1, 2))
    empty = ~read(prediction).any((1, 2))
    return Score(reference.name.removesuffix(".nii.gz"), dice, int(free.sum()), int((free & empty).sum()))


def report(work: Path, scores: dict[str, list[Score]]) -> None:
    lines = ["| case | Dice, whole volume | organ-free slices | of these predicted empty |", "|---|---|---|---|"]
    for site, rows in scores.items():
        lines += [f"| {row.case} | {row.dice:.3f} | {row.free} | {row.empty} |" for row in rows]
        mean, free, empty = (sum(values) for values in zip(*(row[1:] for row in rows), strict=True))
        lines.append(f"| **{site}** | **{mean / len(rows):.3f}** | {free} | {empty} ({empty / free:.0%}) |")
    text = "\n".join(lines)
    (work / "demo.md").write_text(text + "\n")
    step(f"scores of unseen sites, encoder vit_tiny (also in {work / 'demo.md'})")
    print(text)


def draw(work: Path) -> None:
    """Slices of one volume per unseen site, from end to end, with both contours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = 7
    figure, axes = plt.subplots(2, columns, figsize=(2 * columns, 4.6), facecolor="black")
    for row, site in zip(axes, ("SiteB", "SiteC"), strict=True):
        case = f"{site}_000"
        image = read(work / "unseen" / site / "images" / f"{case}_0000.nii.gz")
        truth = read(work / "unseen" / site / "labels" / f"{case}.nii.gz")
        mask = read(work / "predicted" / site / f"{case}.nii.gz")
        for axis, z in zip(row, np.linspace(1, len(image) - 2, columns).round().astype(int), strict=True):
            axis.imshow(image[z], cmap="gray", vmin=0, vmax=np.percentile(image, 99.5))
            outline(axis, truth[z], "lime", 2.4)
            outline(axis, mask[z], "magenta", 1.2)
            axis.set_title(f"{site}, slice {z}", color="white", fontsize=8)
            axis.axis("off")
    figure.suptitle("Trained on SiteA alone. Green: truth. Magenta: DeSAM (vit_tiny).",
                    color="white", fontsize=10)
    figure.tight_layout()
    figure.savefig(work / "demo.png", dpi=90)


def outline(axis: Any, mask: np.ndarray, colour: str, width: float) -> None:
    if mask.any():
        axis.contour(mask, [0.5], colors=colour, linewidths=width)


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(path))


def step(what: str) -> None:
    print(f"\n=== {what}", flush=True)


def run(command: str, *arguments: object) -> None:
    """One of nnU-Net's own commands, from this Python's environment, its output passed on."""
    words = [str(Path(sys.executable).with_name(command)), *map(str, arguments)]
    print("$", command, *words[1:], flush=True)
    subprocess.run(words, check=True)


if __name__ == "__main__":
    main()
