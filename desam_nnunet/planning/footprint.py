"""How much memory a training step takes, from a rehearsal of the step with tensors that have shapes but no values.

The trainer's own step, from the batch to the gradients, runs without computing anything, while what it holds at once is
counted: no method has to be known here. Not counted is what the C library keeps of memory that tensors have given back,
because the next ones don't fit into its holes: on a CPU a process may become twice as large.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from desam_nnunet.cache.tiles import not_started
from desam_nnunet.encoders.base import Architecture, Features
from desam_nnunet.networks.frame import Outline
from desam_nnunet.planning.choices import MAX_BATCH_SIZE, MIN_BATCH_SIZE
from desam_nnunet.sam.tiles import TileToImage
from desam_nnunet.settings.sections import Method, SamSection
from desam_nnunet.training.base import Batch, SamTrainer

_CONSTANT = 30e6  # bytes that libraries take, whatever the network
_SPARE = 1.05  # of what is counted: what libraries work in, and memory that is not given back at once
_HALF = 0.72  # of float32, under autocast: DeSAM's published 7.8 of 10.9 GB
_CHANNELS = 3  # of one image; a tile with more is encoded as several images


class Footprint(NamedTuple):
    """Bytes of one configuration.

    Attributes:
        weights: Of the network with its encoder.
        optimiser: Adam's two moments.
        update: Gradients and what Adam works in, which is as large where all parameters are changed at once.
        step: Held at once in forward and backward pass of no tiles: gradients.
        per_tile: More, for each tile of the batch.
        encoding: While one image is encoded.
    """

    weights: float
    optimiser: float
    update: float
    step: float
    per_tile: float
    encoding: float

    def training(self, batch_size: int) -> float:
        """Peak of a training step, or of encoding, whichever is larger."""
        step = self.optimiser + max(self.step + batch_size * self.per_tile, self.update)
        return _CONSTANT + self.weights + max(step, self.encoding)


def footprint(
    trainer: type[SamTrainer], architecture: Architecture, image_size: int, patch_size: tuple[int, int], outputs: int,
    *, half: bool, checkpointing: bool = False, images: int = 1,
) -> Footprint:
    """The memory of training with a trainer on an encoder.

    Args:
        outputs: Foreground classes or regions.
        half: Under autocast, as on a GPU.
        checkpointing: Whether the encoder's blocks are computed again in the backward pass, where the method can.
        images: For one tile, where it has many channels; they count where training goes through the encoder.
    """
    size = Size(trainer, architecture, image_size, patch_size, outputs, checkpointing, images)
    rehearsal = rehearse(size)
    share = _SPARE * (_HALF if half else 1.0)
    per_tile = (rehearsal.many - rehearsal.few) / (MAX_BATCH_SIZE - MIN_BATCH_SIZE)
    return Footprint(
        weights=rehearsal.weights, optimiser=8.0 * rehearsal.trained, update=8.0 * rehearsal.trained,
        step=_SPARE * (rehearsal.few - MIN_BATCH_SIZE * per_tile), per_tile=share * per_tile,
        encoding=share * rehearse_encoding(architecture, image_size))


class Size(NamedTuple):
    """What the memory of a step depends on; see :func:`footprint`."""

    trainer: type[SamTrainer]
    architecture: Architecture
    image_size: int
    patch_size: tuple[int, int]
    outputs: int
    checkpointing: bool
    images: int


class Rehearsal(NamedTuple):
    """Attributes:
        few, many: Bytes held at once in a step on the smallest and the largest batch, beside weights and optimiser.
        weights: Bytes of the network with its encoder.
        trained: How many numbers are trained.
    """

    few: int
    many: int
    weights: int
    trained: int


@cache
def rehearse(size: Size) -> Rehearsal:
    """Training steps in float32, as on a CPU, whose attention keeps no attention matrix, like a GPU's."""
    with torch.device("meta"):
        trainer = _rehearsing(size)
    network = trainer.bare_network
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.to_empty(device="cpu")
        network.encoder.dtype = torch.float32
        given = _tensors(network, *network.held)
        few, many = (_rehearse_step(trainer, size, given, batch) for batch in (MIN_BATCH_SIZE, MAX_BATCH_SIZE))
    weights = {id(value): value for value in given}.values()
    trained = sum(value.numel() for value in weights if value.requires_grad)
    return Rehearsal(few, many, sum(value.nbytes for value in weights), trained)


def _rehearse_step(trainer: Any, size: Size, given: list[Tensor], batch_size: int) -> int:
    """Bytes held at once, from the batch to the gradients. Args: given: What was there before."""
    network = trainer.bare_network
    with Held(given) as held:
        batch = _batch(size, network.encoder.spec.maps, batch_size)
        loss, _ = trainer.compute_loss(*trainer._on_device(batch))
        loss.backward()
    network.zero_grad()
    return held.peak


@cache
def rehearse_encoding(architecture: Architecture, image_size: int) -> int:
    """Bytes held at once while one image is encoded in float32, each block as a whole, as on a GPU.

    It runs as if gradients were wanted, since else it would go in a CPU's small steps; what they need is let go.
    """
    with torch.device("meta"):
        encoder = architecture.blank(image_size).encoder
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autograd.graph.saved_tensors_hooks(_let_go, _let_go):
        encoder.to_empty(device="cpu")
        with Held(_tensors(encoder)) as held:
            encoder.run(torch.empty(1, 3, image_size, image_size, requires_grad=True))
    return held.peak


def _tensors(*modules: nn.Module) -> list[Tensor]:
    return [value for module in modules for value in (*module.parameters(), *module.buffers())]


def _let_go(_: Any) -> Any:
    """Instead of keeping a tensor for the backward pass."""


class Held(TorchDispatchMode):
    """Counts the memory of tensors that are made within it. Whatever is decided by a value is answered with yes.

    Args:
        given: Tensors that were there before, views of which are no new memory.

    Attributes:
        peak: Bytes held at once, at most.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True
        return tree_map_only(Tensor, self._count, func(*args, **(kwargs or {})))

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self._now += size
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._forget, key, size)
        return tensor

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def _rehearsing(size: Size) -> Any:
    """A trainer with a network and a loss, and nothing else of a training."""
    loaded = size.architecture.blank(size.image_size)
    to_image = TileToImage(size.trainer.image_of(loaded.encoder.spec.image), size.image_size, "unit")
    section = default_section(size.trainer.method, checkpointing=size.checkpointing)
    network = size.trainer.build_network(
        Outline(loaded, to_image, _CHANNELS * size.images, size.outputs + 1, True, section))
    trainer: Any = not_started(size.trainer, SimpleNamespace(batch_dice=True))  # type: ignore[arg-type]
    trainer.network = network.train()
    trainer.device = torch.device("cpu")
    trainer.is_ddp, trainer.enable_deep_supervision, trainer.local_rank = False, False, 0
    trainer.label_manager = LabelManager({"background": 0} | {str(k): k for k in range(1, size.outputs + 1)}, None)
    trainer.own = section
    trainer.loss = trainer._build_loss()
    return trainer


def default_section(method: Method, *, checkpointing: bool = False) -> Any:
    """A method's section as it is without any wish, of the type that the method says."""
    given = method.defaults(SamSection("", "", 0, "unit", False))
    if any(row.name == "checkpointing" for row in fields(method.section)):
        given = given | {"checkpointing": checkpointing}
    return method.section(**given)


def _batch(size: Size, maps: tuple[Any, ...], batch_size: int) -> Batch:
    target = torch.zeros(batch_size, 1, *size.patch_size)
    if not size.trainer.method.frozen_features:
        tiles = torch.empty(batch_size, _CHANNELS * size.images, *size.patch_size)
        return {"data": tiles, "target": target, "keys": []}
    *levels, neck = (
        torch.empty(batch_size, level.channels, *(2 * (size.image_size // level.stride,))) for level in maps)
    return {"features": Features(tuple(levels), neck), "target": target, "keys": []}
