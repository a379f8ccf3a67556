"""How much memory a training step takes, from a network that has shapes but no values.

The network runs once without computing anything, and what autograd would keep for the backward pass is added up.
The few numbers below turn that into a peak; they were fitted to measured peaks on a CPU (docs/planning.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from desam_nnunet.encoders.attention import use_exact_attention
from desam_nnunet.encoders.base import FrozenEncoder
from desam_nnunet.encoders.registry import PATCH, Variant, build_sam
from desam_nnunet.encoders.weights import LoadedSam
from desam_nnunet.networks.dbsam.network import DBSAM, build_dbsam
from desam_nnunet.networks.desam.network import build_desam
from desam_nnunet.networks.frame import SamNetwork, mean_over_groups
from desam_nnunet.networks.samed.network import SAMed, build_samed
from desam_nnunet.sam.prompts import Prompts
from desam_nnunet.sam.tiles import Geometry, TileToImage

_KEPT = {"desam": 1.25, "samed": 1.4, "dbsam": 1.15}  # of what autograd keeps: gradients that live beside it
_RECOMPUTED = 2.4  # of what the largest block keeps, while it is computed again and its gradients are made
_COPIED = {"samed": 0.55, "dbsam": 0.0}  # of the encoder's weights, with checkpointing, whatever the batch
_LOGITS = 3.5  # copies of the logits at tile size that the loss makes
_CONSTANT = 60e6  # bytes
_HALF = 0.72  # of float32, under autocast: DeSAM's published 7.8 of 10.9 GB
_ENCODER_COPIES = 24  # of the tokens, while one image is encoded


class Footprint(NamedTuple):
    """Bytes of one configuration.

    Attributes:
        weights: Of the network with its encoder.
        optimiser: Gradients and Adam's two moments.
        copies: Of weights, while the encoder's blocks are computed again.
        per_tile: Of a training step, for each tile of the batch.
        encoding: While one image is encoded.
    """

    weights: float
    optimiser: float
    copies: float
    per_tile: float
    encoding: float

    def training(self, batch_size: int) -> float:
        """Peak of a training step, or of encoding, whichever is larger."""
        step = _CONSTANT + self.optimiser + self.copies + batch_size * self.per_tile
        return self.weights + max(step, self.encoding)


def footprint(
    variant: Variant, image_size: int, patch_size: tuple[int, int], outputs: int, *, half: bool, method: str = "desam",
    checkpointing: bool = False, images: int = 1,
) -> Footprint:
    """The memory of training one of the methods on this encoder.

    Args:
        outputs: Foreground classes or regions.
        half: Under autocast, as on a GPU.
        method: ``desam``, ``samed`` or ``dbsam``.
        checkpointing: Whether the encoder's blocks are computed again in the backward pass; not of ``desam``.
        images: For one tile, where it has many channels; they count where training goes through the encoder.
    """
    size = Size(variant, image_size, patch_size, outputs, images)
    network, ledger = _desam(size) if method == "desam" else _adapted(size, method)
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    encoder = sum(parameter.numel() for parameter in network.encoder.parameters())
    side = image_size // PATCH
    kept = _KEPT[method] * ledger.total()
    if checkpointing:
        kept = _KEPT[method] * ledger.without_blocks() + _RECOMPUTED * ledger.largest_block()
    features = 4 * network.encoder.channels * side**2 if method == "desam" else 0
    logits = 4 * (outputs + 1) * patch_size[0] * patch_size[1]
    share = _HALF if half else 1.0
    return Footprint(
        weights=4.0 * (trained + encoder), optimiser=12.0 * trained,
        copies=4.0 * _COPIED[method] * encoder if checkpointing else 0.0,
        per_tile=share * kept + features + _LOGITS * logits,
        encoding=share * _ENCODER_COPIES * 4 * side**2 * variant.embed_dim,
    )


class Size(NamedTuple):
    """What a network's memory depends on."""

    variant: Variant
    image_size: int
    patch_size: tuple[int, int]
    outputs: int
    images: int


class Ledger:
    """Bytes that autograd keeps, weights left out, for each module that checkpointing would compute again.

    Args:
        network: Whose weights are left out.
        blocks: Modules that can be computed again.
    """

    def __init__(self, network: SamNetwork, blocks: Iterable[nn.Module] = ()) -> None:
        self._network = network
        self._blocks = list(blocks)
        self._outside: dict[int, int] = {}
        self._within: list[dict[int, int]] = [{} for _ in self._blocks]
        self._given = 0
        self._now = self._outside

    @contextmanager
    def open(self) -> Iterator[None]:
        """Within it, what is kept is entered by the storage it lies in."""
        handles = [handle for block, kept in zip(self._blocks, self._within, strict=True) for handle in (
            block.register_forward_pre_hook(partial(self._enter, kept)), block.register_forward_hook(self._leave))]
        with torch.autograd.graph.saved_tensors_hooks(self._remember, lambda tensor: tensor):
            yield
        for handle in handles:
            handle.remove()
        weights = {parameter.untyped_storage()._cdata for module in (self._network, *self._network.held)
                   for parameter in module.parameters()}
        for kept in (self._outside, *self._within):
            for storage in weights & kept.keys():
                del kept[storage]

    def total(self) -> int:
        together: dict[int, int] = {}
        for kept in (self._outside, *self._within):
            together |= kept
        return sum(together.values())

    def without_blocks(self) -> int:
        """What stays with checkpointing: all but what the blocks keep, and their inputs."""
        return sum(self._outside.values()) + self._given

    def largest_block(self) -> int:
        return max(sum(kept.values()) for kept in self._within)

    def _remember(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._now[storage._cdata] = storage.nbytes()
        return tensor

    def _enter(self, kept: dict[int, int], _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._now = kept
        self._given += sum(tensor.nbytes for tensor in inputs)

    def _leave(self, *_: Any) -> None:
        self._now = self._outside


@cache
def _desam(size: Size) -> tuple[Any, Ledger]:
    """The network, and what autograd keeps of the decoder for one tile."""
    variant, side, dim = size.variant, size.image_size // PATCH, size.variant.prompt_dim
    with torch.device("meta"):
        network = build_desam(
            sam=_sam(size), to_image=TileToImage(size.image_size, "unit"), num_channels=1, num_classes=size.outputs,
            background=True, grid=9, iou_threshold=0.5)
        levels = tuple(torch.empty(1, variant.embed_dim, side, side) for _ in network.encoder.level_blocks)
        neck, positions = torch.empty(1, dim, side, side), torch.empty(1, dim, side, side)
        ledger = Ledger(network)
        with ledger.open():
            output = network.prim(neck, positions, torch.empty(1, 2, dim), score=True)  # a point and its padding
            masks = network.pdmm(output.mask_embedding, network.pdmm.context(levels))
            network.tile_logits(masks, Geometry(size.patch_size, size.image_size)).logsumexp(1)
    return network, ledger


@cache
def _adapted(size: Size, method: str) -> tuple[Any, Ledger]:
    """The network, and what autograd keeps of encoder and decoder for one tile.

    As on a CPU, whose attention keeps no attention matrix, like a GPU's and unlike the meta device's.
    """
    settings: dict[str, Any] = {"to_image": TileToImage(size.image_size, "unit"), "num_channels": 1}
    with FakeTensorMode():
        images = torch.empty(size.images, 3, size.image_size, size.image_size)
        network: SAMed | DBSAM
        if method == "samed":
            network = build_samed(sam=_sam(size), outputs=size.outputs + 1, rank=4, targets="qv", adapt_decoder=False,
                                  checkpointing=False, **settings)
        else:
            network = build_dbsam(sam=_sam(size), num_classes=size.outputs, background=True, checkpointing=False,
                                  **settings)
        network.encoder.dtype = torch.float32
        exchanges = network.exchanges if isinstance(network, DBSAM) else ()
        ledger = Ledger(network, [*network.encoder.vit.blocks, *exchanges])
        with ledger.open():
            if isinstance(network, SAMed):
                masks = network.decode(mean_over_groups(network.neck(images), size.images))
            else:
                neck = mean_over_groups(network.both_branches(images), size.images)
                masks = network.decode(neck, Prompts(boxes=torch.zeros(1, 4)))
            network.tile_logits(masks, Geometry(size.patch_size, size.image_size)).logsumexp(1)
    return network, ledger


def _sam(size: Size) -> LoadedSam:
    sam = build_sam(size.variant, size.image_size)
    encoder = FrozenEncoder(use_exact_attention(sam.image_encoder), size.variant.global_blocks[:-1], "")
    return LoadedSam(size.variant, encoder, sam.prompt_encoder, sam.mask_decoder, random=True)
