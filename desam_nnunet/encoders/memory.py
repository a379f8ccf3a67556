"""Features of the volume that is being predicted, so that an ensemble encodes each tile once.

nnU-Net's predictor runs fold after fold over the tiles of a volume, and the frozen encoder says the same of a
tile in every fold.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from desam_nnunet.encoders.base import Features
from desam_nnunet.system.machine import free_memory

_SHARE = 4  # at most one part in so many of the memory that is free when a volume begins


class FeatureMemory:
    """Keeps as many tiles' features as the budget allows, and admits no more when it is full.

    It never drops one tile for another: a pass over more tiles than fit would then find none of them in the
    next fold. Where slabs overlap, each slice comes again soon, in one fold too: there the one that was asked for
    longest ago makes room.

    Nothing tells a network that a new volume has begun, so it is inferred: weights come back that were loaded before,
    or the first tile after weights were loaded is a new one. Where a volume was seen with one set of weights alone,
    there is no ensemble, and nothing is kept any more.

    Args:
        budget: Bytes; None for a quarter of what is free on the features' device when a volume begins.
        overlapping: Whether what a network is shown overlaps.
    """

    def __init__(self, budget: int | None = None, *, overlapping: bool = False) -> None:
        self.budget = budget
        self.overlapping = overlapping
        self._kept: dict[bytes, Features] = {}
        self._left: int | None = None  # bytes; None before the first tile of a volume
        self._weights: set[int] = set()
        self._just_loaded = False
        self._single = False

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def is_open(self) -> bool:
        """Whether anything is kept or can be: else no key is worth making."""
        may_keep = self.budget != 0 and (self.overlapping or not self._single)
        return may_keep or bool(self._kept)

    @torch.compiler.disable
    def find(self, key: bytes) -> Features | None:
        """The features kept under `key`."""
        known = self._kept.get(key)
        if known is None and self._just_loaded:
            self._forget_tiles()
        self._just_loaded = False
        if known is not None:
            self._kept[key] = self._kept.pop(key)  # the last to be dropped
        return known

    @torch.compiler.disable
    def keep(self, key: bytes, features: Features) -> None:
        """Keeps `features` under `key` if they still fit and another fold may ask for them."""
        if self._left is None:
            self._left = free_memory(features.neck.device) // _SHARE if self.budget is None else self.budget
        size = features.nbytes
        while self.overlapping and self._kept and size > self._left:
            self._left += self._kept.pop(next(iter(self._kept))).nbytes
        if size <= self._left and (self.overlapping or not self._single):
            self._kept[key] = features
            self._left -= size

    def weights_loaded(self, weights: int) -> None:
        """Infers where in a prediction we are from `weights`, which tells one fold's from another's."""
        if weights in self._weights:
            self._single = len(self._weights) == 1 and (self._single or self._left is not None)
            self.clear()
        self._weights.add(weights)
        self._single &= len(self._weights) == 1
        self._just_loaded = True

    def clear(self) -> None:
        self._forget_tiles()
        self._weights.clear()

    def _forget_tiles(self) -> None:
        self._kept.clear()
        self._left = None


@torch.compiler.disable
def content_key(tiles: Tensor, *settings: object) -> bytes:
    """Names a batch of tiles by its values, and everything else that changes its features by `settings`."""
    digest = hashlib.blake2b(digest_size=32)
    digest.update(repr((tuple(tiles.shape), tiles.dtype, *settings)).encode())
    digest.update(tiles.detach().contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.digest()
