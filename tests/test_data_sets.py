"""Data sets of many kinds: planned, trained for two epochs and predicted by the commands alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import FOLDERS, environment, nnunet

pytestmark = pytest.mark.slow
SHORT = {"epochs": 2, "iterations_per_epoch": 2, "val_iterations_per_epoch": 1, "views": 1, "augmentation": "nnunet"}
PLAIN = {"background": 0, "organ": 1}


@dataclass(frozen=True)
class Kind:
    """A data set in a few words; `shapes` are slices, rows and columns, one case after the other.

    Attributes:
        spacing: In the same order, in mm.
        foreground: Which slices show the organ.
        axis: Of the stored array, along which the slices lie.
    """

    shapes: tuple[tuple[int, int, int], ...] = ((5, 40, 44),) * 5
    spacing: tuple[float, float, float] = (4.0, 1.0, 1.0)
    channels: tuple[str, ...] = ("T2",)
    labels: dict[str, Any] = field(default_factory=lambda: dict(PLAIN))
    order: tuple[int, ...] = ()
    foreground: Callable[[int], bool] = lambda index: index % 5 in (1, 2, 3)
    axis: int = 0
    fold: str = "0"
    ending: str = ".nii.gz"


def has_organ_rarely(index: int) -> bool:
    return index == 7


KINDS = {
    "regions": Kind(labels={"background": 0, "whole": [1, 2], "core": 2}, order=(1, 2)),
    "ignore_label": Kind(labels=PLAIN | {"ignore": 2}),
    "several_classes": Kind(labels={"background": 0, "a": 1, "b": 2}),
    "ct": Kind(channels=("CT",)),
    "two_channels": Kind(channels=("T1", "T2")),
    "five_channels": Kind(channels=("T1", "T2", "CT", "DWI", "ADC")),
    "transposed": Kind(axis=2),
    "foreground_in_three_slices_of_a_hundred": Kind(shapes=((34, 32, 32),) * 5, foreground=has_organ_rarely),
    "two_cases": Kind(shapes=((5, 40, 44),) * 2, fold="all"),
    "eight_sizes": Kind(shapes=tuple((4, 30 + 6 * n, 60 - 4 * n) for n in range(8))),
    "large_slices": Kind(shapes=((2, 1024, 1024),) * 5, foreground=bool),
    "natural_images": Kind(shapes=((1, 48, 40),) * 6, channels=("R", "G", "B"), foreground=lambda _: True,
                           ending=".png"),
}


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kind:
    kind = KINDS[request.param]
    for name in (*FOLDERS, "weights"):
        (tmp_path / name).mkdir()
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    write(kind, tmp_path / "nnUNet_raw" / "Dataset600_Kind", tmp_path / "unseen")
    return kind


def test_plan_train_predict(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nnunet("nnUNetv2_plan_and_preprocess", "-d", 600, "-c", "2d", "-np", 1, "-npfp", 1, "--verify_dataset_integrity")
    output = nnunet("desam", "plan", "-d", 600, "--encoder", "vit_tiny", "-device", "cpu").stdout
    plans = tmp_path / "nnUNet_preprocessed" / "Dataset600_Kind" / "DeSAMPlans.json"
    given = json.loads(plans.read_text())
    given["configurations"]["2d"]["sam"] |= SHORT | {"image_size": 64}
    plans.write_text(json.dumps(given))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    common = ("-tr", "DeSAMTrainer", "-p", "DeSAMPlans", "-device", "cpu")
    output += nnunet("nnUNetv2_train", 600, "2d", kind.fold, *common).stdout
    nnunet("nnUNetv2_predict", "-i", tmp_path / "unseen", "-o", tmp_path / "out", "-d", 600, "-c", "2d",
           "-f", kind.fold, "-npp", 1, "-nps", 1, "--disable_tta", *common)
    assert "!!" not in output
    predicted = sorted((tmp_path / "out").glob(f"*{kind.ending}"))
    assert len(predicted) == 2
    for path in predicted:
        image = next((tmp_path / "unseen").glob(f"{path.name.removesuffix(kind.ending)}_0000*"))
        mask = sitk.ReadImage(path)
        assert mask.GetSize()[:2] == sitk.ReadImage(image).GetSize()[:2]
        assert set(np.unique(sitk.GetArrayFromImage(mask))) <= set(range(classes_of(kind) + 1))


def write(kind: Kind, folder: Path, unseen: Path) -> None:
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    unseen.mkdir()
    rng = np.random.default_rng(0)
    for number, shape in enumerate((*kind.shapes, *kind.shapes[:2])):
        label = draw(kind, shape)
        signal = np.clip(label, 0, 2) * 200.0 + 100
        images = [signal * (1 + channel) + rng.normal(0, 20, shape) for channel in range(len(kind.channels))]
        trained = number < len(kind.shapes)
        into = folder / "imagesTr" if trained else unseen
        save(kind, images, into, f"case_{number:02d}")
        if trained:
            save(kind, [sparse(kind, label)], folder / "labelsTr", f"case_{number:02d}", label=True)
    channels = {str(number): name for number, name in enumerate(kind.channels)}
    description: dict[str, Any] = {"channel_names": channels, "labels": kind.labels, "numTraining": len(kind.shapes),
                                   "file_ending": kind.ending}
    if kind.order:
        description["regions_class_order"] = list(kind.order)
    (folder / "dataset.json").write_text(json.dumps(description))


def classes_of(kind: Kind) -> int:
    return len(kind.labels) - 1 - ("ignore" in kind.labels)


def draw(kind: Kind, shape: tuple[int, int, int]) -> np.ndarray:
    """An ellipse, its core another class where there are two."""
    rows, columns = np.mgrid[: shape[1], : shape[2]]
    distance = np.hypot((rows / shape[1] - 0.45) / 0.3, (columns / shape[2] - 0.55) / 0.25)
    plane = (distance < 1).astype(np.int16) + (classes_of(kind) == 2) * (distance < 0.5)
    return np.stack([plane * kind.foreground(index) for index in range(shape[0])])


def sparse(kind: Kind, label: np.ndarray) -> np.ndarray:
    """Only every other slice is annotated where there is an ignore label."""
    if "ignore" not in kind.labels:
        return label
    scribbled = label.copy()
    scribbled[::2] = kind.labels["ignore"]
    return scribbled


def save(kind: Kind, arrays: list[np.ndarray], folder: Path, case: str, *, label: bool = False) -> None:
    if kind.ending == ".png":
        planes = [array[0].clip(0, 255).astype(np.uint8) for array in arrays]
        image = sitk.GetImageFromArray(planes[0] if label else np.stack(planes, -1), isVector=not label)
        sitk.WriteImage(image, folder / (f"{case}.png" if label else f"{case}_0000.png"))
        return
    spacing = list(kind.spacing)
    for number, array in enumerate(arrays):
        image = sitk.GetImageFromArray(np.moveaxis(array, 0, kind.axis).astype(np.int16))
        moved = spacing[1 : kind.axis + 1] + spacing[:1] + spacing[kind.axis + 1 :]
        image.SetSpacing(moved[::-1])
        sitk.WriteImage(image, folder / (f"{case}.nii.gz" if label else f"{case}_{number:04d}.nii.gz"))
