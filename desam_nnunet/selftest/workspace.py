"""A small data set of nnU-Net's, drawn at random in a folder that goes again, and trainers on it."""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

from desam_nnunet.nnunet.names import FOLDERS
from desam_nnunet.training.base import SamTrainer

PATCH, SLICES = 96, 4
_SIZE = 128  # of the encoder's input
_PLANS: dict[str, Any] = {
    "dataset_name": "Dataset001_SelfTest", "plans_name": "SelfTestPlans", "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2], "foreground_intensity_properties_per_channel": {}, "continue_training": False,
    "configurations": {"2d": {
        "data_identifier": "selftest_2d", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
        "patch_size": [PATCH, PATCH], "spacing": [1.0, 1.0], "normalization_schemes": ["ZScoreNormalization"],
        "batch_dice": True,
        "architecture": {"network_class_name": "", "arch_kwargs": {}, "_kw_requires_import": []},  # nnU-Net's, not read
        "sam": {"encoder": "vit_tiny_random", "image_size": _SIZE}}},
}
_DATASET = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "organ": 1}, "numTraining": 2,
            "file_ending": ".nii.gz"}


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """nnU-Net's three folders, with two preprocessed cases; the user's own are not touched."""
    before = {name: os.environ.get(name) for name in FOLDERS}
    with tempfile.TemporaryDirectory(prefix="desam_selftest_") as root:
        for name in FOLDERS:
            os.environ[name] = str(Path(root) / name)
        folder = Path(root) / "nnUNet_preprocessed" / _PLANS["dataset_name"]
        data = folder / _PLANS["configurations"]["2d"]["data_identifier"]
        data.mkdir(parents=True)
        try:
            for number in range(2):
                _write_case(data / f"case{number}", *draw_case(number))
            yield Path(root)
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def draw_case(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and labels (1, slices, rows, columns): a bright disc in noise, in all slices but the first."""
    generator = np.random.default_rng(number)
    row, column = np.ogrid[:PATCH, :PATCH]
    disc = (row - 40 - 8 * number) ** 2 + (column - 48) ** 2 < 20**2
    labels = np.zeros((1, SLICES, PATCH, PATCH), np.int16)
    labels[:, 1:] = disc
    noise = generator.normal(0, 0.5, labels.shape)
    return (noise + 2 * labels).astype(np.float32), labels


def _write_case(path: Path, image: np.ndarray, labels: np.ndarray) -> None:
    blocks, chunks = comp_blosc2_params(image.shape, (1, PATCH, PATCH))
    properties = {"class_locations": {1: np.argwhere(labels == 1)[:100]}}
    nnUNetDatasetBlosc2.save_case(image, labels, properties, str(path), chunks=chunks, blocks=blocks)


def make_trainer(kind: type[SamTrainer], device: torch.device) -> SamTrainer:
    """A trainer on all cases, as nnU-Net makes it; inside :func:`workspace`."""
    trainer = kind(copy.deepcopy(_PLANS), "2d", "all", dict(_DATASET), device)
    trainer.initialize()
    return trainer


def tiles() -> dict[str, Any]:
    """A batch as nnU-Net's loader gives it: a slice with the disc of either case."""
    cases = [draw_case(number) for number in range(2)]
    data, target = (torch.from_numpy(np.stack([case[kind][:, 1] for case in cases])) for kind in range(2))
    return {"data": data, "target": target, "keys": ["case0", "case1"]}
