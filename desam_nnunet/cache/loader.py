"""Batches of cached tiles, drawn as nnU-Net draws its patches."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import blosc2
import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from desam_nnunet.cache.entry import DamagedEntryError
from desam_nnunet.cache.store import CaseRecord, ChangedCaseError, Store
from desam_nnunet.encoders.base import Features
from desam_nnunet.nnunet.datasets import foreground_of
from desam_nnunet.system.machine import free_memory, memory_limit

MISSING = -1
_AHEAD = 4  # batches at most that are read ahead: they are large
_RESERVE = 10  # no tile is kept where less than one part in so many of the memory is free


class Draw(NamedTuple):
    """One tile of a batch: the case, the tile's number and its view; the number is MISSING where a slab has none."""

    case: str
    number: int
    view: int


@dataclass(eq=False, repr=False)
class CachedLoader:
    """Endless batches ``{"features": Features, "target": Tensor, "keys": list}``.

    As in nnU-Net, cases are drawn uniformly, and the last samples of a batch are sure to hold foreground: a class
    is drawn uniformly from those of the case, then a tile in proportion to the class's pixels in it. Where there is
    an ignore label, other samples are drawn in proportion to their labelled pixels. The draws come from numpy's
    global generator, in order, whatever the number of workers.

    Of slabs, a batch has the slices in a row. What is drawn so is one of a slab's slices; the slab lies around it,
    anywhere within the volume with equal chances. Where the volume has fewer slices, features and target of the missing
    ones are zero.

    Attributes:
        records: Of the cases to draw from.
        oversample: Share of a batch that is sure to hold foreground.
        probabilistic: Whether that share is drawn per sample.
        batch_size: Tiles or slabs.
        transforms: nnU-Net's for targets (regions, ignore label).
        workers: Threads that read ahead; 0 reads when asked.
        pin_memory: For copies to a GPU.
        in_memory: Keep the tiles that were read, while memory is free.
        views: How many views of a tile are drawn from, the first as it is.
        depth: Slices of a slab; 1 for tiles.
    """

    store: Store
    records: Mapping[str, CaseRecord]
    label_manager: LabelManager
    batch_size: int
    oversample: float
    probabilistic: bool
    transforms: BasicTransform
    workers: int
    pin_memory: bool
    in_memory: bool
    views: int
    depth: int = 1

    def __post_init__(self) -> None:
        self.cases = sorted(self.records)
        self._shares = {case: _Shares(record, self.label_manager, self.views) for case, record in self.records.items()}
        self._kept: dict[Draw, tuple[Features, Tensor]] = {}
        self._reserve = memory_limit() // _RESERVE
        self._pool = ThreadPoolExecutor(self.workers, "cached-tiles") if self.workers else None
        self._lent: deque[Features] = deque()
        self._free: deque[Features] = deque()
        self._coming: deque[Future[dict[str, Any]]] = deque()
        self._ahead = min(_AHEAD, 2 * self.workers)
        blosc2.set_releasegil(True)  # else the threads unpack one after the other

    def __iter__(self) -> CachedLoader:
        return self

    def __next__(self) -> dict[str, Any]:
        if len(self._lent) > 1:
            self._free.append(self._lent.popleft())
        if self._pool is None:
            batch = self.read(self.draw())
        else:
            while len(self._coming) < self._ahead:
                self._coming.append(self._pool.submit(self.read, self.draw()))
            batch = self._coming.popleft().result()
        self._lent.append(batch["features"])
        return batch

    def close(self) -> None:
        """Reads no more, and lets go of the memory."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        for held in (self._coming, self._lent, self._free, self._kept):
            held.clear()

    def draw(self) -> list[Draw]:
        """The next batch's tiles."""
        cases = np.random.choice(self.cases, self.batch_size)
        draws = [Draw(str(case), *self._shares[case].draw(self._wants_foreground(place)))
                 for place, case in enumerate(cases)]
        return draws if self.depth == 1 else [draw for anchor in draws for draw in self._slab_around(anchor)]

    def _slab_around(self, anchor: Draw) -> list[Draw]:
        """The tiles of a slab that holds `anchor`, at the same place of each slice."""
        tiles = self.records[anchor.case].tiles
        slices = tiles[-1].slice + 1
        in_plane = len(tiles) // slices
        here, place = divmod(anchor.number, in_plane)
        if slices < self.depth:
            first = (slices - self.depth) // 2
        else:
            first = np.random.randint(max(0, here - self.depth + 1), min(here, slices - self.depth) + 1)
        return [anchor._replace(number=z * in_plane + place if 0 <= z < slices else MISSING)
                for z in range(first, first + self.depth)]

    def read(self, draws: list[Draw]) -> dict[str, Any]:
        """The batch of `draws`."""
        batch: Features | None = None
        with contextlib.suppress(IndexError):  # none is free yet
            batch = self._free.popleft()
        targets = []
        for place, draw in enumerate(draws):
            features, target = self._sample(draw, batch and batch.sample(place))
            targets.append(target)
            if batch is None:
                batch = features.map(
                    lambda x: torch.empty((len(draws), *x.shape), dtype=x.dtype, pin_memory=self.pin_memory))
            elif not self.in_memory:
                continue  # the store has filled its place in the batch
            for there, feature in zip(batch.sample(place).tensors, features.tensors, strict=True):
                there.copy_(feature)
        return {"features": batch, "target": torch.stack(targets), "keys": [draw.case for draw in draws]}

    def _sample(self, draw: Draw, room: Features | None) -> tuple[Features, Tensor]:
        """Features and target of one tile; `room` is filled unless tiles are kept in memory."""
        if not self.in_memory or draw.number == MISSING:
            return self._from_disk(draw, None if self.in_memory else room)
        if draw in self._kept:
            return self._kept[draw]
        sample = self._from_disk(draw, None)
        if free_memory(torch.device("cpu")) > self._reserve:  # other trainings fill it as well
            self._kept[draw] = sample
        return sample

    def _from_disk(self, draw: Draw, room: Features | None) -> tuple[Features, Tensor]:
        if draw.number == MISSING:
            features, target = self._from_disk(draw._replace(number=0), room)
            return features.map(torch.zero_ if room else torch.zeros_like), torch.zeros_like(target)
        try:
            features, labels = self.store.read(*draw, self.records[draw.case].content, room)
        except DamagedEntryError as error:
            with contextlib.suppress(OSError):
                self.store.discard(self.store.path(*draw))
            raise DamagedEntryError(f"{error} Start again with --c: this tile alone is built again.") from error
        except (ChangedCaseError, FileNotFoundError) as error:
            raise ChangedCaseError(f"Tile {draw.number} of {draw.case} in {self.store.folder} was replaced or removed "
                                   "while training ran: start again with --c. If it is said again, desam cache "
                                   "--verify removes such tiles.") from error
        return features, self.transforms(segmentation=torch.from_numpy(labels)[None])["segmentation"]

    def _wants_foreground(self, place: int) -> bool:
        if self.probabilistic:
            return bool(np.random.uniform() < self.oversample)
        return not place < round(self.batch_size * (1 - self.oversample))


class _Shares:
    """With which probability each tile and view of a case is drawn."""

    def __init__(self, record: CaseRecord, label_manager: LabelManager, views: int) -> None:
        self.entries = [(number, view) for number in range(len(record.tiles)) for view in range(views)]
        classes = [label if isinstance(label, list | tuple) else (label,) for label in foreground_of(label_manager)]
        pixels = np.array([[sum(record.labels[number][view].get(label, 0) for label in labels) for labels in classes]
                           for number, view in self.entries], dtype=float)  # entries, classes
        self.of_class = [column / column.sum() for column in pixels.T if column.any()]
        self.anywhere = None
        if label_manager.has_ignore_label:
            # a view has padding that counts as background: what is labelled is what the tile itself has
            labelled = np.array([sum(pixels for label, pixels in record.labels[number][0].items()
                                     if 0 <= label != label_manager.ignore_label) for number, _ in self.entries], float)
            self.anywhere = labelled / labelled.sum() if labelled.any() else None

    def draw(self, foreground: bool) -> tuple[int, int]:
        shares = self.anywhere
        if foreground and self.of_class:
            shares = self.of_class[np.random.randint(len(self.of_class))]
        return self.entries[np.random.choice(len(self.entries), p=shares)]
