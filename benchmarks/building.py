"""Building the embedding cache: tiles made, encoded and written side by side, against one after the other."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from desam_nnunet.cache.build import Builder, Share
from desam_nnunet.cache.store import Recipe, Store
from desam_nnunet.cache.views import Augmentation, not_started
from desam_nnunet.encoders.base import Features, FeatureSpec
from desam_nnunet.encoders.registry import ENCODERS
from desam_nnunet.settings.sections import SamSection
from desam_nnunet.training.desam import DeSAMTrainer
from measure import Report, compare

CASES, SLICES, SIDE = 2, 12, 256
ENCODING = 0.005  # seconds a tile


class Waiting:
    """A network whose encoder takes its time elsewhere, as one on a GPU, and gives noise."""

    num_channels = 1

    def __init__(self, spec: FeatureSpec, size: int) -> None:
        self.encoder = SimpleNamespace(spec=spec)
        *levels, neck = (torch.randn(1, level.channels, *[size // level.stride] * 2) for level in spec.maps)
        self.features = Features(tuple(levels), neck)

    def encode_in_parts(self, tiles: Tensor) -> Features:
        time.sleep(ENCODING * len(tiles))
        return self.features.map(lambda x: x.expand(len(tiles), -1, -1, -1))


class Noise:
    """A data set of noise."""

    identifiers = tuple(f"case_{number}" for number in range(CASES))

    def __init__(self, folder: Path) -> None:
        self.source_folder = folder
        self.data = np.random.default_rng(0).normal(size=(1, SLICES, SIDE, SIDE)).astype(np.float32)
        for case in self.identifiers:
            (folder / f"{case}.npz").write_bytes(b"preprocessed")

    def load_case(self, _case: str) -> tuple[np.ndarray, np.ndarray]:
        return self.data, np.zeros((1, SLICES, SIDE, SIDE), np.int8)


def run(device: torch.device, repeats: int) -> Report:
    report = Report("building", "Building the embedding cache", (
        f"{CASES * SLICES} tiles of {SIDE} x {SIDE} of noise, nnU-Net's augmentation for views; features of "
        f"noise in ViT-B's sizes, float16, an encoder that waits {ENCODING * 1000:.0f} ms a tile, as for a GPU. "
        "Reference: every tile is made, encoded and written, one after the other. Both stores are compared file by "
        "file before timing. The estimate is what is said before the build starts."), device)
    torch.manual_seed(0)
    for size, views, required in ((512, 4, 1.8), (512, 1, None), (256, 4, None), (256, 1, None), (1024, 1, None)):
        with tempfile.TemporaryDirectory() as folder:
            builder = prepare(Path(folder), size, views)
            assert built(builder, one_by_one) == built(builder, Builder.build), "the stores differ"
            shutil.rmtree(builder.store.folder)
            estimate = builder.seconds(builder.plan(Share()))
            row = compare(f"ViT-B at {size}, {views} view(s)", lambda b=builder: timed(b, one_by_one),
                          lambda b=builder: timed(b, Builder.build), device=device, repeats=repeats, required=required)
            row.notes = {"estimate (s)": f"{estimate:.2g}", "estimate / ours": f"{estimate / row.ours:.2f}"}
            report.add("Building", row)
    return report


def prepare(folder: Path, size: int, views: int) -> Builder:
    configuration: Any = SimpleNamespace(patch_size=[SIDE, SIDE], use_mask_for_norm=[False])
    trainer = not_started(DeSAMTrainer, configuration, SamSection("", "", 0, "unit", False))
    augmentation = Augmentation(trainer, by_case=False) if views > 1 else None
    recipe = Recipe(data_identifier="bench", encoder="vit_b", identity="random", image_size=size, intensity="unit",
                    window=(), patch_size=(SIDE, SIDE), step=0.5, views=views, dtype="float16",
                    augmentation=augmentation.name if augmentation else "", precision="float32")
    network: Any = Waiting(ENCODERS["vit_b"].architecture.spec(size), size)
    dataset: Any = Noise(folder)
    return Builder(Store(folder, recipe), dataset, network, torch.device("cpu"), augmentation)


def one_by_one(builder: Builder, plan: Any) -> None:
    store = builder.store
    store.create()
    for case, todo in plan.todo.items():
        data, seg = builder.dataset.load_case(case)
        for number, view in todo.missing:
            image, target = builder._sample(data, seg, todo.tiles[number], case, number, view)
            (feature,) = builder._encode([image])
            store.write(case, number, view, feature, target, todo.content)
        store.finish(case, todo.content, todo.tiles)


def timed(builder: Builder, build: Any) -> None:
    shutil.rmtree(builder.store.folder, ignore_errors=True)
    build(builder, builder.plan(Share()))


def built(builder: Builder, build: Any) -> dict[str, bytes]:
    timed(builder, build)
    folder = builder.store.folder
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
