"""Reading the embedding cache against the published files, and training from it against training online.

The published way: ``np.savez_compressed`` of the four float32 outputs as one object array, read with
``allow_pickle=True`` (DeSAM's precompute_embeddings.py and utils/datasets.py).
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from desam_nnunet.cache.loader import CachedLoader
from desam_nnunet.cache.store import Recipe, Store, Tile
from desam_nnunet.encoders.base import Features
from desam_nnunet.encoders.precision import encoder_dtype
from desam_nnunet.sam.prompts import Prompts
from measure import Report, compare
from reference import TILE, build
from training import backward

TILES, BATCH, THREADS, BATCHES = 32, 8, 2, 24
LEVELS = ("level0", "level1", "level2", "neck")


def run(device: torch.device, repeats: int) -> Report:
    report = Report("cache", "The embedding cache", (
        f"RANDOM features of ViT-B at 1024, {TILES} tiles in the system's file cache, batches of {BATCH}, {THREADS} "
        f"threads for both, a consumer that does nothing, {BATCHES} batches per repeat. Reference: float32, one file "
        "per tile, stacked: as published (a compressed .npz of pickled arrays), and as a plain .npz of four arrays."
    ), device)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        stores = {dtype: _fill(root, dtype, device) for dtype in ("float16", "int8")}
        references = {"published": NpzLoader(root / "published", _save_published, _read_published),
                      "plain .npz": NpzLoader(root / "plain", _save_plain, _read_plain)}
        for reference, dtype, in_memory, required in (
            ("published", "float16", False, 3.0),
            ("published", "int8", False, 3.0),
            ("published", "float16", True, None),
            ("plain .npz", "float16", False, None),
            ("plain .npz", "int8", False, None),
            ("plain .npz", "float16", True, None),
        ):
            what = f"{dtype}{' kept in memory' if in_memory else ''}, against {reference}"
            loader = _loader(stores[dtype], BATCH, in_memory)
            theirs = references[reference]
            for batches, coming in ((theirs, theirs.coming), (loader, loader._coming)):
                _take(batches, coming)
            row = compare(what, lambda loader=theirs: _take(loader, loader.coming),
                          lambda loader=loader: _take(loader, loader._coming), device=device, repeats=repeats,
                          required=required)
            megabytes = BATCHES * BATCH * _bytes_per_tile() / 1e6
            row.notes = {"our batches/s": f"{BATCHES / row.ours:.1f}", "float32 MB/s that we deliver":
                         f"{megabytes / row.ours:.0f}", "theirs": f"{megabytes / row.reference:.0f}"}
            report.add("Reading", row)
            loader.close()
        for dtype, store in stores.items():
            report.fact(f"bytes of a tile on disk, {dtype}", f"{store.size() / TILES / 1e6:.2f} MB")
        _steps(report, stores["float16"], device, repeats)
    return report


def _recipe(dtype: str, device: torch.device) -> Recipe:
    return Recipe(data_identifier="bench", encoder="vit_b", identity="random", image_size=1024, intensity="percentile",
                  window=(), patch_size=(TILE, TILE), step=0.5, views=1, augmentation="",
                  dtype=dtype, precision=str(encoder_dtype(device)))


def _features(number: int) -> Features:
    generator = torch.manual_seed(number)
    return Features(tuple(torch.randn(768, 64, 64, generator=generator) for _ in range(3)),
                    torch.randn(256, 64, 64, generator=generator))


def _bytes_per_tile() -> int:
    return 4 * (3 * 768 + 256) * 64 * 64


def _fill(root: Path, dtype: str, device: torch.device) -> Store:
    store = Store(root, _recipe(dtype, device))
    store.create()
    tiles = [Tile(number, 0, 0) for number in range(TILES)]
    target = np.zeros((TILE, TILE), int)
    target[100:200, 100:200] = 1
    for number in range(TILES):
        store.write("case", number, 0, _features(number), target, "content")
    store.finish("case", "content", tiles)
    return store


def _save_published(path: Path, features: Features) -> None:
    embeddings = np.empty(len(LEVELS), object)
    for place, x in enumerate(features.tensors):
        embeddings[place] = x.numpy()
    np.savez_compressed(path, img_embeddings=embeddings)


def _read_published(path: Path) -> list[Tensor]:
    with np.load(path, allow_pickle=True) as arrays:
        return [torch.tensor(x).float() for x in arrays["img_embeddings"]]


def _save_plain(path: Path, features: Features) -> None:
    np.savez(path, **dict(zip(LEVELS, [x.numpy() for x in features.tensors], strict=True)))


def _read_plain(path: Path) -> list[Tensor]:
    with np.load(path) as arrays:
        return [torch.from_numpy(arrays[name]) for name in LEVELS]


class NpzLoader:
    """Reads ahead in as many threads as ours."""

    def __init__(
        self, folder: Path, save: Callable[[Path, Features], None], read: Callable[[Path], list[Tensor]]
    ) -> None:
        folder.mkdir()
        for number in range(TILES):
            save(folder / f"{number}.npz", _features(number))
        self.folder = folder
        self.read_tile = read
        self.pool = ThreadPoolExecutor(THREADS)
        self.coming: deque[Future[list[Tensor]]] = deque()

    def __next__(self) -> list[Tensor]:
        while len(self.coming) < 2 * THREADS:
            self.coming.append(self.pool.submit(self.read, np.random.choice(TILES, BATCH).tolist()))
        return self.coming.popleft().result()

    def read(self, numbers: list[int]) -> list[Tensor]:
        tiles = [self.read_tile(self.folder / f"{number}.npz") for number in numbers]
        return [torch.stack(column) for column in zip(*tiles, strict=True)]


def _loader(store: Store, batch: int, in_memory: bool) -> CachedLoader:
    record = store.complete("case", "content")
    assert record is not None
    manager = LabelManager({"background": 0, "organ": 1}, None)
    transforms = nnUNetTrainer.get_validation_transforms(None, foreground_labels=manager.foreground_labels)
    return CachedLoader(store, {"case": record}, label_manager=manager, batch_size=batch, oversample=0.33,
                        probabilistic=False, transforms=transforms, workers=THREADS,
                        pin_memory=torch.cuda.is_available(), in_memory=in_memory, views=1)


def _take(batches: Any, coming: deque[Future[Any]]) -> None:
    """Takes batches, and waits until nothing is read ahead any more, so that the other side has the machine."""
    for _ in range(BATCHES):
        next(batches)
    wait(coming)


def _steps(report: Report, store: Store, device: torch.device, repeats: int) -> None:
    """One tile a step: encoded online, or read from the cache; forward and backward of the decoder."""
    _, network, tile = build("vit_b", 1024, device)
    points = Prompts(points=torch.full((1, 1, 2), 500.0, device=device))
    loader = _loader(store, 1, in_memory=False)

    def online() -> None:
        backward(network, *network(network.encode(tile), points))

    def cached() -> None:
        features = next(loader)["features"].map(lambda x: x.to(device).float())
        backward(network, *network(features, points))

    online()
    cached()
    report.add("A training step", compare("cached against online, batch 1, without augmentation", online, cached,
                                          device=device, repeats=repeats))
    loader.close()
