"""Encodes the tiles that a store does not have yet. It can be stopped at any moment and goes on where it was."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
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
from desam_nnunet.system.ahead import Behind, made_ahead
from desam_nnunet.system.cores import usable_cores
from desam_nnunet.system.progress import progress

_MARGIN = 0.05  # of the disk, kept free
_WRITERS = min(4, usable_cores())  # threads: compression and checksums leave Python to the others
_WRITTEN = 4  # files' worth of bytes that the disk is timed with
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


class _Batch(NamedTuple):
    """Tiles of one case to be encoded at once.

    Attributes:
        here: Numbers and views of those that nobody has stored meanwhile.
        samples: Of each, image (C, H, W) and labels (H, W).
        tiles: How many there were to be.
        is_last: Whether the case has no more.
    """

    case: str
    todo: Todo
    here: list[tuple[int, int]]
    samples: list[tuple[np.ndarray, ...]]
    tiles: int
    is_last: bool


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
        """About how long it takes: some tiles are made, encoded, packed and written to a file that vanishes."""
        case, todo = next(item for item in plan.todo.items() if item[1].missing)
        data, seg, *_ = self.dataset.load_case(case)
        here = todo.missing[: max(self.at_once, self.store.recipe.views)]
        for _ in range(2):  # what is slow but once does not count
            times = [time.perf_counter()]
            samples = [self._sample(data, seg, todo.tiles[number], case, number, view) for number, view in here]
            times.append(time.perf_counter())
            features = self._encode([np.nan_to_num(image) for image, _ in samples[: self.at_once]])
            features[0].neck.cpu()
            times.append(time.perf_counter())
            target = samples[0][1]
            parts = [self.store.packed(case, 0, 0, feature, target, todo.content) for feature in features]
            times.append(time.perf_counter())
            _write_away(self.store.folder, parts * -(-_WRITTEN // len(parts)))
            times.append(time.perf_counter())
        counts = len(here), len(features), len(features), len(parts) * -(-_WRITTEN // len(parts))
        spans = (end - begin for begin, end in itertools.pairwise(times))
        return plan.tiles * self._pace(*(span / count for span, count in zip(spans, counts, strict=True)))

    def _pace(self, sample: float, encode: float, pack: float, write: float) -> float:
        """Seconds from tile to tile, of the seconds of each step, which run side by side as far as the cores go."""
        busy = (sample + pack) / usable_cores() + (encode if self.device.type == "cpu" else 0)
        return max(busy, sample, encode, pack / _WRITERS, write)

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
        """One thread makes samples, this one encodes them, others write."""
        total = progress(None, f"Encoding for {self.store.folder.name}", "tiles", plan.tiles)
        with total as done, Behind(_WRITERS, 2 * _WRITERS) as behind:
            written: list[Future[None]] = []
            for batch in made_ahead(self._batches(plan), 2):
                case, todo = batch.case, batch.todo
                for tile, feature, (_, target) in zip(batch.here, self._features(batch), batch.samples, strict=True):
                    written.append(behind.submit(self._write, case, tile, feature, target, todo.content))
                done.update(batch.tiles)
                if batch.is_last:
                    behind.submit(self._finish, case, todo, written)
                    written = []

    def _batches(self, plan: Plan) -> Iterator[_Batch]:
        """Of every case's missing tiles, and an empty one of a case that only wants its record."""
        cases = list(plan.todo.items())
        begin = os.getpid() % max(1, len(cases))  # processes that build one store together begin at different cases
        for case, todo in cases[begin:] + cases[:begin]:
            data, seg, *_ = self.dataset.load_case(case)
            for first in range(0, max(1, len(todo.missing)), self.at_once):
                end = first + self.at_once
                here = [tile for tile in todo.missing[first:end] if not self.store.has(case, *tile, todo.content)]
                samples = [self._sample(data, seg, todo.tiles[number], case, number, view) for number, view in here]
                yield _Batch(case, todo, here, samples, len(todo.missing[first:end]), end >= len(todo.missing))

    def _features(self, batch: _Batch) -> list[Features]:
        """Features of each sample, all of them finite."""
        case, todo, here, samples, *_ = batch
        if not here:
            return []
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
        return features

    def _write(self, case: str, tile: tuple[int, int], feature: Features, target: np.ndarray, content: str) -> None:
        if not self.store.has(case, *tile, content):
            self.store.write(case, *tile, feature, target, content)

    def _finish(self, case: str, todo: Todo, written: list[Future[None]]) -> None:
        for tile in written:
            tile.result()
        self.store.finish(case, todo.content, todo.tiles)

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


def _write_away(folder: Path, parts: list[list[bytes]]) -> None:
    """Brings bytes to the disk of `folder`, in a file without a name. The build tells what a disk refuses."""
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=_nearest(folder)) as stream:
        for part in parts:
            stream.writelines(part)
        stream.flush()
        os.fsync(stream.fileno())


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one around it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def usable_bytes(folder: Path) -> int:
    """What is free on the disk of `folder`, which need not exist, but for a margin."""
    disk = shutil.disk_usage(_nearest(folder))
    return max(0, disk.free - int(_MARGIN * disk.total))
