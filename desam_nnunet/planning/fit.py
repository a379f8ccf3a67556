"""Fits an encoder to data and machine: input size, patch, batch and storage together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from desam_nnunet.cache.store import entry_bytes
from desam_nnunet.encoders.base import Architecture
from desam_nnunet.encoders.weights import find_row, is_here
from desam_nnunet.planning.choices import (
    GOOD_BATCH_SIZE,
    Choice,
    Storage,
    choose_batch_size,
    choose_checkpointing,
    choose_image_size,
    choose_patch,
    choose_storage,
    smaller_image_sizes,
    wanted_batch_size,
)
from desam_nnunet.planning.facts import Facts
from desam_nnunet.planning.footprint import Footprint, footprint
from desam_nnunet.planning.request import Request
from desam_nnunet.planning.speed import hours_to_encode
from desam_nnunet.sam.tiles import images_per_tile
from desam_nnunet.settings.resolve import check_offers
from desam_nnunet.settings.sections import DTYPES

_ONLINE = Choice(Storage("online", 1, "float16", 0.0), "this method changes the encoder's features")
_KEPT = Choice(value=False, reason="what a step keeps fits into the memory")
_RECOMPUTED = Choice(value=True, reason="saves memory, which would hold too few tiles without")


@dataclass(frozen=True)
class Machine:
    """Where training is to run: bytes of memory and disk that it may take, and the device."""

    memory: Choice[float]
    disk: float
    device: torch.device


@dataclass(frozen=True)
class Fit:
    """One encoder fitted to data and machine."""

    encoder: str
    patch: Choice[tuple[int, int]]
    image: Choice[int]
    batch: Choice[int]
    storage: Choice[Storage]
    checkpointing: Choice[bool]
    tiles: int


def fit_encoder(encoder: str, facts: Facts, request: Request, machine: Machine) -> Fit:
    """Input size, patch, batch and storage for one encoder; the input shrinks where two tiles do not fit.

    Raises:
        ValueError: Not even the smallest input fits.
    """
    row, method = find_row(encoder), request.method
    check_offers(encoder, row.architecture, method)
    native = min(row.image_size, method.image_size or row.image_size)
    given = request.sam.get("image_size")  # for the preset's own encoder, which may be a larger one
    for size in [min(given, native)] if given else _image_sizes(facts, native):
        patch = choose_patch(facts.planes, facts.divisor, size)
        tiles = facts.tiles(patch.value)
        need = partial(footprint, request.trainer, row.architecture, size, patch.value, facts.outputs,
                       half=machine.device.type == "cuda", images=images_per_tile(facts.channels))
        batch = _choose_batch(request, tiles, partial(_fits, need(), machine.memory.value))
        checkpointing = _KEPT
        if not method.frozen_features:
            less = _choose_batch(request, tiles, partial(_fits, need(checkpointing=True), machine.memory.value))
            batch, recomputed = choose_checkpointing(batch, less) or (None, False)
            checkpointing = _RECOMPUTED if recomputed else _KEPT
        if batch is not None:
            image = choose_image_size(patch.value, size)
            reason = image.reason
            if given:
                reason = f"preset {request.preset}" + (f", at most {row.name}'s own" if given > native else "")
            storage = _choose_storage(facts, request, row.architecture, size, patch.value, tiles, machine)
            return Fit(encoder, patch, Choice(size, reason), batch, storage, checkpointing, tiles)
    least = need(checkpointing=not method.frozen_features).training(2)
    raise ValueError(
        f"Training {row.name} at {size} on tiles of {patch.value[0]} x {patch.value[1]} takes "
        f"{least / 1e9:.1f} GB, but {machine.memory.value / 1e9:.1f} GB are there: give -gpu_memory_target "
        "a larger value or --encoder a smaller encoder."
    )


def choose_encoder(facts: Facts, request: Request, machine: Machine) -> tuple[Fit, str]:
    """The largest whose weights are here, with a good batch and a cache.

    On a CPU, and for methods that train through the encoder, ViT-B, which is slow enough.
    """
    given = request.sam.get("encoder")
    if given is not None:
        reason = "as asked" if request.encoder else f"preset {request.preset}"
        return fit_encoder(given, facts, request, machine), reason + ("" if is_here(given) else f", {_missing(given)}")
    if machine.device.type == "cpu":
        return fit_encoder("vit_b", facts, request, machine), "on a CPU" + (
            "" if is_here("vit_b") else f"; {_missing('vit_b')}")
    if not request.method.frozen_features:
        return fit_encoder("vit_b", facts, request, machine), "the published one" + (
            "" if is_here("vit_b") else f"; {_missing('vit_b')}")
    here = [name for name in ("vit_h", "vit_l", "vit_b") if is_here(name)]
    if not here:
        return fit_encoder("vit_b", facts, request, machine), _missing("vit_b")
    for name in here[:-1]:
        try:
            fit = fit_encoder(name, facts, request, machine)
        except ValueError:
            continue
        is_roomy = fit.batch.value >= min(GOOD_BATCH_SIZE, wanted_batch_size(fit.tiles))
        if is_roomy and fit.storage.value.features == "cached":
            return fit, "the largest whose weights are here, which memory and disk hold"
    return fit_encoder(here[-1], facts, request, machine), "the smallest whose weights are here"


def _image_sizes(facts: Facts, native: int) -> list[int]:
    """From the size that the data wants down."""
    patch = choose_patch(facts.planes, facts.divisor, native).value
    size = choose_image_size(patch, native).value
    return [size, *smaller_image_sizes(size)]


def _choose_batch(request: Request, tiles: int, fits: Callable[[int], bool]) -> Choice[int] | None:
    wanted = request.fragment.get("batch_size")
    if wanted is not None and fits(wanted):
        return Choice(wanted, f"preset {request.preset}")
    batch = choose_batch_size(tiles, fits)
    if wanted is None or batch is None:
        return batch
    return Choice(batch.value, f"{batch.reason}; preset {request.preset} asks for {wanted}")


def _fits(need: Footprint, memory: float, batch_size: int) -> bool:
    return need.training(batch_size) <= memory


def _choose_storage(
    facts: Facts, request: Request, architecture: Architecture, image_size: int, patch: tuple[int, int], tiles: int,
    machine: Machine,
) -> Choice[Storage]:
    if not request.method.frozen_features:
        return _ONLINE
    sizes = {dtype: entry_bytes(architecture.spec(image_size), image_size, patch, dtype) for dtype in DTYPES}
    hours = hours_to_encode(tiles * images_per_tile(facts.channels), architecture, image_size, machine.device)
    return choose_storage(tiles, sizes, machine.disk, hours, request.sam.get("views"))


def _missing(encoder: str) -> str:
    """Only weights with a name can be missing: a path is read at once."""
    return f"whose weights are not here yet (--encoder vit_tiny comes with this package): {find_row(encoder).remedy}"
