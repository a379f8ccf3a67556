"""Encodes the tiles that a store does not have yet. It can be stopped at any moment and goes on where it was."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from tqdm import tqdm

from desam_nnunet.cache.store import Store, Tile, entry_bytes
from desam_nnunet.cache.tiles import content_of, crop, tiles_of
from desam_nnunet.cache.views import Augmentation
from desam_nnunet.sam.encoder import Features
from desam_nnunet.sam.variants import PATCH

_MARGIN = 0.05  # of the disk, kept free
_BATCH_TOKENS = 8 * 64 * 64  # image tokens encoded at once on a GPU: eight images of 1024
T = TypeVar("T")


class Plan(NamedTuple):
    """What a build will do.

    Attributes:
        todo: Per case its content, its tiles, and the numbers and views that are missing.
        tiles: How many tiles are missing in all.
        needed, free: Bytes on disk.
    """

    todo: dict[str, tuple[str, tuple[Tile, ...], list[tuple[int, int]]]]
    tiles: int
    needed: int
    free: int


def plan_build(store: Store, dataset: nnUNetBaseDataset, cases: Sequence[str], network: Any) -> Plan:
    """Looks at every case, without encoding.

    Args:
        network: With ``encode`` and ``encoder``, whose widths say how large a tile's entry is.

    Raises:
        OSError: The disk can't hold what is missing; the message has the numbers and the remedies.
    """
    patch_size = store.recipe.patch_size
    todo = {}
    for case in cases:
        content = content_of(Path(dataset.source_folder), case)
        if store.complete(case, content) is not None:
            continue
        tiles = tiles_of(dataset.load_case(case)[0].shape[1:], patch_size)
        todo[case] = (content, tiles, list(store.missing(case, content, tiles)))
    missing = sum(len(row[2]) for row in todo.values())
    side = store.recipe.image_size // PATCH
    needed = missing * entry_bytes(network.encoder.channels, side, patch_size, store.recipe.dtype)
    disk = shutil.disk_usage(_existing(store.folder))
    free = max(0, disk.free - int(_MARGIN * disk.total))
    if needed > free:
        raise OSError(
            f"The cache needs {needed / 1e9:.1f} GB for {missing} tiles, but {store.folder} has {free / 1e9:.1f} GB "
            f"(with {_MARGIN:.0%} of the disk kept free): make room, set sam.cache_dtype to 'int8' for half of it, "
            "or set sam.features to 'online' to train without a cache."
        )
    return Plan(todo, missing, needed, free)


def seconds_of(plan: Plan, store: Store, network: Any, device: torch.device) -> float:
    """About how long a build takes: one blank batch is encoded, and timed once the device is warm."""
    at_once = _at_once(store, device)
    blank = [np.zeros((network.num_channels, *store.recipe.patch_size), np.float32)] * at_once
    for _ in range(1 if device.type == "cpu" else 2):
        begin = time.perf_counter()
        _encode(network, blank, device).neck.cpu()
        seconds = time.perf_counter() - begin
    return seconds * plan.tiles / at_once


def build(
    store: Store, dataset: nnUNetBaseDataset, plan: Plan, network: Any, device: torch.device,
    augmentation: Augmentation | None,
) -> None:
    """Encodes what `plan` found missing, with progress.

    Another process may build the same store: what it has written meanwhile is not encoded again.

    Args:
        augmentation: Makes the views after the first.

    Raises:
        OSError: The disk is full or not writable. What is stored stays valid.
    """
    store.create()
    at_once = _at_once(store, device)
    with tqdm(total=plan.tiles, unit="tile", desc=f"Encoding for {store.folder.name}") as progress:
        for case, (content, tiles, missing) in plan.todo.items():
            data, seg, *_ = dataset.load_case(case)
            for batch in _batches(missing, at_once):
                here = [(number, view) for number, view in batch if not store.has(case, number, view, content)]
                samples = [_sample(data, seg, store, tiles[number], case, number, view, augmentation)
                           for number, view in here]
                if here:
                    try:
                        features = _encode(network, [image for image, _ in samples], device)
                    except ValueError as error:
                        slices = sorted({tiles[number].slice for number, _ in here})
                        raise ValueError(f"Case {case}, slice {', '.join(map(str, slices))}: {error}") from error
                for index, (number, view) in enumerate(here):
                    store.write(case, number, view, features.sample(index), samples[index][1], content)
                progress.update(len(batch))
            store.finish(case, content, tiles)


def _at_once(store: Store, device: torch.device) -> int:
    return max(1, _BATCH_TOKENS // (store.recipe.image_size // PATCH) ** 2) if device.type == "cuda" else 1


def _sample(
    data: Any, seg: Any, store: Store, tile: Tile, case: str, number: int, view: int,
    augmentation: Augmentation | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Image (C, H, W) and labels (H, W) of one view; the first is the tile as it is."""
    if augmentation is not None and view > 0:
        return augmentation(data, seg, tile, case, number, view)
    patch_size = store.recipe.patch_size
    return crop(data, tile, patch_size, 0), crop(seg, tile, patch_size, -1)[0]


@torch.inference_mode()
def _encode(network: Any, images: list[np.ndarray], device: torch.device) -> Features:
    return network.encode(torch.from_numpy(np.stack(images)).float().to(device))


def _batches(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())
