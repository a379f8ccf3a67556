"""Encodes the tiles that a store does not have yet. It can be stopped at any moment and goes on where it was."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator
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
from desam_nnunet.encoders.base import Features
from desam_nnunet.networks.frame import FrozenSamNetwork
from desam_nnunet.sam.tiles import images_per_tile

_MARGIN = 0.05  # of the disk, kept free
_BATCH_PIXELS = 8 * 1024 * 1024  # of the encoder's input, encoded at once on a GPU: eight images of 1024
T = TypeVar("T")


class Plan(NamedTuple):
    """What a build will do.

    Attributes:
        todo: Per case of this process's share its content, its tiles, and the numbers and views that are missing.
        tiles: How many tiles are missing in its share.
        needed: Bytes on disk that all shares together will take.
        free: Bytes that the disk has.
    """

    todo: dict[str, tuple[str, tuple[Tile, ...], list[tuple[int, int]]]]
    tiles: int
    needed: int
    free: int


class Share(NamedTuple):
    """Every `parts`-th case, from the `part`-th on."""

    part: int = 0
    parts: int = 1


def plan_build(store: Store, dataset: nnUNetBaseDataset, network: FrozenSamNetwork, share: Share) -> Plan:
    """Looks at every case, without encoding. The disk must hold what all shares together lack.

    Args:
        network: Whose encoder says how large a tile's entry is.

    Raises:
        OSError: The disk can't hold what is missing; the message has the numbers and the remedies.
    """
    patch_size = store.recipe.patch_size
    per_tile = entry_bytes(network.encoder.spec, store.recipe.image_size, patch_size, store.recipe.dtype)
    todo, needed, total = {}, 0, 0
    for place, case in enumerate(sorted(dataset.identifiers)):
        content = content_of(Path(dataset.source_folder), case)
        if store.complete(case, content) is not None:
            continue
        tiles = tiles_of(dataset.load_case(case)[0].shape[1:], patch_size)
        missing = list(store.missing(case, content, tiles))
        total += len(missing)
        needed += sum(max(0, per_tile - store.bytes_of(case, *tile)) for tile in missing)  # stale ones are replaced
        if place % share.parts == share.part:
            todo[case] = (content, tiles, missing)
    free = usable_bytes(store.folder)
    if needed > free:
        raise OSError(
            f"The cache needs {needed / 1e9:.1f} GB for {total} tiles, but {store.folder} has {free / 1e9:.1f} GB "
            f"(with {_MARGIN:.0%} of the disk kept free): make room, set sam.cache_dtype to 'int8' for half of it, "
            "or set sam.features to 'online' to train without a cache."
        )
    return Plan(todo, sum(len(row[2]) for row in todo.values()), needed, free)


def usable_bytes(folder: Path) -> int:
    """What is free on the disk of `folder`, which need not exist, but for a margin."""
    disk = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists()))
    return max(0, disk.free - int(_MARGIN * disk.total))


def seconds_of(plan: Plan, store: Store, network: FrozenSamNetwork, device: torch.device) -> float:
    """About how long a build takes: one blank batch is encoded, and timed once the device is warm."""
    at_once = min(plan.tiles, _at_once(store, network, device))
    blank = [np.zeros((network.num_channels, *store.recipe.patch_size), np.float32)] * at_once
    for _ in range(1 if device.type == "cpu" else 2):
        begin = time.perf_counter()
        _encode(network, blank, device)[0].neck.cpu()
        seconds = time.perf_counter() - begin
    return seconds * plan.tiles / at_once


def build(
    store: Store, dataset: nnUNetBaseDataset, plan: Plan, network: FrozenSamNetwork, device: torch.device,
    augmentation: Augmentation | None,
) -> None:
    """Encodes what `plan` found missing, with progress.

    Another process may build the same store: what it has written meanwhile is not encoded again.

    Args:
        augmentation: Makes the views after the first.

    Raises:
        OSError: The disk is full or not writable. What is stored stays valid.
        ValueError: An image holds NaN; case and slice are named.
    """
    try:
        store.create()
        _build(store, dataset, plan, network, device, augmentation)
    except OSError as error:
        raise OSError(
            f"The cache {store.folder} can't be written: {error.strerror or error}. What is stored stays valid. Make "
            "room or get the right to write there and start again, or set sam.features to 'online' to train without "
            "a cache."
        ) from error


def _build(
    store: Store, dataset: nnUNetBaseDataset, plan: Plan, network: FrozenSamNetwork, device: torch.device,
    augmentation: Augmentation | None,
) -> None:
    at_once = _at_once(store, network, device)
    with tqdm(total=plan.tiles, unit="tile", desc=f"Encoding for {store.folder.name}") as progress:
        for case, (content, tiles, missing) in _rotated(list(plan.todo.items())):
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
                    for (number, view), feature, (_, target) in zip(here, features, samples, strict=True):
                        if not store.has(case, number, view, content):
                            store.write(case, number, view, feature, target, content)
                progress.update(len(batch))
            store.finish(case, content, tiles)


def _at_once(store: Store, network: FrozenSamNetwork, device: torch.device) -> int:
    """Tiles; each has as many images as it has groups of three channels."""
    if device.type != "cuda":
        return 1
    pixels = images_per_tile(network.num_channels) * store.recipe.image_size**2
    return max(1, _BATCH_PIXELS // pixels)


def _rotated(cases: list[T]) -> list[T]:
    """Processes that build one store together begin at different cases."""
    begin = os.getpid() % max(1, len(cases))
    return cases[begin:] + cases[:begin]


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
def _encode(network: FrozenSamNetwork, images: list[np.ndarray], device: torch.device) -> list[Features]:
    """Features of each image; where the GPU's memory is too small for all at once, in halves."""
    try:
        features = network.encode(torch.from_numpy(np.stack(images)).float().to(device))
        return [features.sample(index) for index in range(len(images))]
    except torch.OutOfMemoryError:
        if len(images) == 1:
            raise
    half = len(images) // 2
    return _encode(network, images[:half], device) + _encode(network, images[half:], device)


def _batches(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch
