"""Encodes the tiles that a store does not have yet. It can be stopped at any moment and goes on where it was."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset

from desam_nnunet.cache.store import Store, Tile, entry_bytes
from desam_nnunet.cache.tiles import content_of, crop, tiles_of
from desam_nnunet.cache.views import Augmentation
from desam_nnunet.encoders.base import Features
from desam_nnunet.networks.frame import FrozenSamNetwork
from desam_nnunet.sam.tiles import images_per_tile
from desam_nnunet.system.progress import progress

_MARGIN = 0.05  # of the disk, kept free
_BATCH_PIXELS = 8 * 1024 * 1024  # of the encoder's input, encoded at once on a GPU: eight images of 1024


class Todo(NamedTuple):
    """Of one case its content, its tiles, and the numbers and views that are missing."""

    content: str
    tiles: tuple[Tile, ...]
    missing: list[tuple[int, int]]


class Plan(NamedTuple):
    """What a build will do.

    Attributes:
        todo: Per case of this process's share that is not complete.
        tiles: How many tiles are missing in its share.
        needed: Bytes on disk that all shares together will take.
    """

    todo: dict[str, Todo]
    tiles: int
    needed: int


class Share(NamedTuple):
    """Every `parts`-th case, from the `part`-th on."""

    part: int = 0
    parts: int = 1


@dataclass
class Builder:
    """Encodes with a network what a store lacks of a data set.

    Another process may build the same store: what it has written meanwhile is not encoded again.

    Attributes:
        augmentation: Makes the views after the first.
    """

    store: Store
    dataset: nnUNetBaseDataset
    network: FrozenSamNetwork
    device: torch.device
    augmentation: Augmentation | None = None

    def plan(self, share: Share) -> Plan:
        """Looks at every case, without encoding. The disk must hold what all shares together lack.

        Raises:
            OSError: The disk can't hold what is missing; the message has the numbers and the remedies.
        """
        store, recipe = self.store, self.store.recipe
        per_tile = entry_bytes(self.network.encoder.spec, recipe.image_size, recipe.patch_size, recipe.dtype)
        todo, needed, total = {}, 0, 0
        for place, case in enumerate(sorted(self.dataset.identifiers)):
            content = content_of(Path(self.dataset.source_folder), case)
            if store.complete(case, content) is not None:
                continue
            tiles = tiles_of(self.dataset.load_case(case)[0].shape[1:], recipe.patch_size)
            missing = store.missing(case, content, tiles)
            total += len(missing)
            needed += sum(max(0, per_tile - store.bytes_of(case, *tile)) for tile in missing)  # stale ones are replaced
            if place % share.parts == share.part:
                todo[case] = Todo(content, tiles, missing)
        free = usable_bytes(store.folder)
        if needed > free:
            raise OSError(f"The cache needs {needed / 1e9:.1f} GB for {total} tiles, but {store.folder} has "
                          f"{free / 1e9:.1f} GB (with {_MARGIN:.0%} of the disk kept free): make room, set "
                          "sam.cache_dtype to 'int8' for half of it, or set sam.features to 'online' to train without "
                          "a cache.")
        return Plan(todo, sum(len(row.missing) for row in todo.values()), needed)

    def seconds(self, plan: Plan) -> float:
        """About how long it takes: one blank batch is encoded, and timed once the device is warm."""
        at_once = min(plan.tiles, self.at_once)
        blank = [np.zeros((self.network.num_channels, *self.store.recipe.patch_size), np.float32)] * at_once
        for _ in range(1 if self.device.type == "cpu" else 2):
            begin = time.perf_counter()
            self._encode(blank)[0].neck.cpu()
            seconds = time.perf_counter() - begin
        return seconds * plan.tiles / at_once

    @property
    def at_once(self) -> int:
        """Tiles that are encoded together; each has as many images as it has groups of three channels."""
        pixels = images_per_tile(self.network.num_channels) * self.store.recipe.image_size**2
        return max(1, _BATCH_PIXELS // pixels) if self.device.type == "cuda" else 1

    def build(self, plan: Plan) -> None:
        """Encodes what `plan` found missing, with progress.

        Raises:
            OSError: The disk is full or not writable. What is stored stays valid.
            ValueError: An image holds NaN, or its features do not stay finite; case and slice are named.
        """
        try:
            self.store.create()
            self._build(plan)
        except OSError as error:
            raise OSError(f"The cache {self.store.folder} can't be written: {error.strerror or error}. What is stored "
                          "stays valid. Make room or get the right to write there and start again, or set sam.features "
                          "to 'online' to train without a cache.") from error

    def _build(self, plan: Plan) -> None:
        cases = list(plan.todo.items())
        begin = os.getpid() % max(1, len(cases))  # processes that build one store together begin at different cases
        with progress(None, f"Encoding for {self.store.folder.name}", "tiles", plan.tiles) as done:
            for case, todo in cases[begin:] + cases[:begin]:
                data, seg, *_ = self.dataset.load_case(case)
                for first in range(0, len(todo.missing), self.at_once):
                    batch = todo.missing[first : first + self.at_once]
                    if here := [tile for tile in batch if not self.store.has(case, *tile, todo.content)]:
                        self._store_batch(case, todo, here, data, seg)
                    done.update(len(batch))
                self.store.finish(case, todo.content, todo.tiles)

    def _store_batch(self, case: str, todo: Todo, here: list[tuple[int, int]], data: Any, seg: Any) -> None:
        samples = [self._sample(data, seg, todo.tiles[number], case, number, view) for number, view in here]
        try:
            features = self._encode([image for image, _ in samples])
        except ValueError as error:
            slices = sorted({todo.tiles[number].slice for number, _ in here})
            raise ValueError(f"Case {case}, slice {', '.join(map(str, slices))}: {error}") from error
        totals = [torch.stack([x.sum(dtype=torch.float32) for x in feature.tensors]).sum() for feature in features]
        finite = torch.stack(totals).isfinite().tolist()  # a sum is not where one of its values is not
        if not all(finite):
            number, view = here[finite.index(False)]
            raise ValueError(f"Case {case}, slice {todo.tiles[number].slice}: of tile {number}, view {view}, the "
                             f"encoder {self.store.recipe.encoder}, in {self.store.recipe.precision}, makes features "
                             "that are not finite. They are not stored: look for extreme intensities in the image, or "
                             "set sam.encoder to another one.")
        for (number, view), feature, (_, target) in zip(here, features, samples, strict=True):
            if not self.store.has(case, number, view, todo.content):
                self.store.write(case, number, view, feature, target, todo.content)

    def _sample(self, data: Any, seg: Any, tile: Tile, case: str, number: int, view: int) -> tuple[np.ndarray, ...]:
        """Image (C, H, W) and labels (H, W) of one view; the first is the tile as it is."""
        if self.augmentation is not None and view > 0:
            return self.augmentation(data, seg, tile, case, number, view)
        patch_size = self.store.recipe.patch_size
        return crop(data, tile, patch_size, 0), crop(seg, tile, patch_size, -1)[0]

    @torch.inference_mode()
    def _encode(self, images: list[np.ndarray]) -> list[Features]:
        """Features of each image."""
        features = self.network.encode_in_parts(torch.from_numpy(np.stack(images)).float().to(self.device))
        return [features.sample(index) for index in range(len(images))]


def usable_bytes(folder: Path) -> int:
    """What is free on the disk of `folder`, which need not exist, but for a margin."""
    disk = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists()))
    return max(0, disk.free - int(_MARGIN * disk.total))
