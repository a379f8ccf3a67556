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

from desam_nnunet.cache.views import not_started
from desam_nnunet.encoders.base import Architecture, Features
from desam_nnunet.networks.frame import Outline
from desam_nnunet.planning.choices import MAX_BATCH_SIZE, MIN_BATCH_SIZE
from desam_nnunet.sam.tiles import TileToImage
from desam_nnunet.settings.sections import SamSection
from desam_nnunet.training.base import Batch, SamTrainer

_CONSTANT = 30e6  # bytes that libraries take, whatever the network
_SPARE = 1.05  # of what is counted: what libraries work in, and memory that is not given back at once
_HALF = 0.72  # of float32, under autocast: DeSAM's published 7.8 of 10.9 GB
_CHANNELS = 3  # of one image; a tile with more is encoded as several images


class Footprint(NamedTuple):
    """Bytes of one configuration.

    Attributes:
        weights: Of the network with its encoder; in half precision a frozen one also has a copy of half the size.
        moments: Adam's two. Gradients and what it works in are as large where all parameters are changed at once.
        step: Held at once in forward and backward pass of no tiles: gradients.
        per_tile: More, for each tile or slab of the batch.
        encoding: While one image is encoded; a GPU takes more at once, as far as its memory goes.
    """

    weights: float
    moments: float
    step: float
    per_tile: float
    encoding: float

    def training(self, batch_size: int) -> float:
        """Peak of a training step, or of encoding, whichever is larger."""
        step = self.moments + max(self.step + batch_size * self.per_tile, self.moments)
        return _CONSTANT + self.weights + max(step, self.encoding)


@cache
def footprint(
    trainer: type[SamTrainer], architecture: Architecture, image_size: int, patch_size: tuple[int, int], outputs: int,
    *, half: bool, checkpointing: bool = False, images: int = 1, depth: int = 1,
) -> Footprint:
    """The memory of training with a trainer on an encoder.

    The steps are rehearsed in float32, as on a CPU, whose attention keeps no attention matrix, like a GPU's.

    Args:
        outputs: Foreground classes or regions.
        half: Under autocast, as on a GPU.
        checkpointing: Whether the encoder's blocks are computed again in the backward pass, where the method can.
        images: For one tile, where it has many channels; they count where training goes through the encoder.
        depth: Slices of a slab; 1 for tiles.
    """
    with torch.device("meta"):
        rehearsed = trainer_to_rehearse(
            trainer, architecture, image_size, outputs, checkpointing=checkpointing, images=images, depth=depth)
    network = rehearsed.bare_network
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.to_empty(device="cpu")
        network.encoder.dtype = torch.float32
        few, many = (_step_peak(rehearsed, patch_size, depth * size) for size in (MIN_BATCH_SIZE, MAX_BATCH_SIZE))
        tensors = _tensors(network, *network.held)
        copied = sum(tensor.nbytes for tensor in _tensors(network.encoder)) / 2
    per_tile = (many - few) / (MAX_BATCH_SIZE - MIN_BATCH_SIZE)
    share = _SPARE * (_HALF if half else 1.0)
    return Footprint(
        weights=sum(tensor.nbytes for tensor in tensors) + copied * (half and trainer.method.frozen_features),
        moments=8.0 * sum(tensor.numel() for tensor in tensors if tensor.requires_grad),
        step=_SPARE * (few - MIN_BATCH_SIZE * per_tile), per_tile=share * per_tile,
        encoding=share * _encoding_peak(architecture, image_size))


def _step_peak(trainer: SamTrainer, patch_size: tuple[int, int], tiles: int) -> int:
    """Bytes held at once from the batch of so many tiles or slices to the gradients, beside the network."""
    network = trainer.bare_network
    with PeakMemory(_tensors(network, *network.held)) as memory:
        batch = empty_batch(trainer, patch_size, tiles)
        loss, _ = trainer.compute_loss(*trainer._on_device(batch))
        loss.backward()
    network.zero_grad()
    return memory.peak


@cache
def _encoding_peak(architecture: Architecture, image_size: int) -> int:
    """Bytes held at once while one image is encoded in float32, each block as a whole, as on a GPU.

    It runs as if gradients were wanted, since else it would go in a CPU's small steps; what they need is dropped.
    """
    with torch.device("meta"):
        encoder = architecture.blank(image_size).encoder
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autograd.graph.saved_tensors_hooks(_drop, _drop):
        encoder.to_empty(device="cpu")
        with PeakMemory(_tensors(encoder)) as memory:
            encoder.run(torch.empty(1, 3, image_size, image_size, requires_grad=True))
    return memory.peak


def _drop(_: Any) -> Any:
    """Instead of keeping a tensor for the backward pass."""


def _tensors(*modules: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    together = nn.ModuleList(modules)
    return [*together.parameters(), *together.buffers()]


class PeakMemory(TorchDispatchMode):
    """Counts the memory of tensors that are made within it. Whatever is decided by a value is answered with yes.

    Args:
        before: Tensors that were there before, views of which are no new memory.

    Attributes:
        peak: Bytes held at once, at most.
    """

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in before}

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


def trainer_to_rehearse(
    kind: type[SamTrainer], architecture: Architecture, image_size: int, outputs: int, *, checkpointing: bool,
    images: int, depth: int,
) -> SamTrainer:
    """A trainer with a network and a loss, and nothing else of a training; arguments as :func:`footprint`."""
    sam = SamSection("", "", 0, "unit", False)
    options = kind.method.defaults(sam)
    if any(row.name == "checkpointing" for row in fields(kind.method.section)):
        options = options | {"checkpointing": checkpointing}
    loaded = architecture.blank(image_size)
    to_image = TileToImage(kind.image_of(loaded.encoder.spec.image), image_size, "unit")
    trainer: Any = not_started(kind, SimpleNamespace(batch_dice=True), sam)  # type: ignore[arg-type]
    trainer.own = kind.method.section(**options)
    trainer.network = kind.build_network(
        Outline(loaded, to_image, _CHANNELS * images, outputs + 1, True, trainer.own, depth)).train()
    trainer.device = torch.device("cpu")
    trainer.is_ddp, trainer.enable_deep_supervision, trainer.local_rank = False, False, 0
    trainer.label_manager = LabelManager({"background": 0} | {str(k): k for k in range(1, outputs + 1)}, None)
    trainer.loss = trainer._build_loss()
    return trainer


def empty_batch(trainer: SamTrainer, patch_size: tuple[int, int], tiles: int) -> Batch:
    """What a loader gives: tiles, or features where these never change; no value means anything."""
    network = trainer.bare_network
    batch: Batch = {"target": torch.zeros(tiles, 1, *patch_size), "keys": []}
    if not trainer.method.frozen_features:
        return batch | {"data": torch.empty(tiles, network.num_channels, *patch_size)}
    sides = [(level.channels, network.to_image.image_size // level.stride) for level in network.encoder.spec.maps]
    *levels, neck = (torch.empty(tiles, channels, side, side) for channels, side in sides)
    return batch | {"features": Features(tuple(levels), neck)}
