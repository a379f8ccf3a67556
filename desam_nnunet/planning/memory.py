"""How much memory a training step takes, from a network that has shapes but no values.

The decoder runs once on PyTorch's ``meta`` device, and what autograd would keep for the backward pass is added up.
The few numbers below turn that into a peak; they were fitted to measured peaks on a CPU (docs/planning.md).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from desam_nnunet.networks.desam import DeSAM, build_desam
from desam_nnunet.sam.attention import use_exact_attention
from desam_nnunet.sam.encoder import FrozenEncoder
from desam_nnunet.sam.tiles import Geometry, TileToImage
from desam_nnunet.sam.variants import PATCH, Variant, build_sam
from desam_nnunet.sam.weights import LoadedSam

_KEPT = 1.25  # of what autograd keeps: gradients that live beside it
_LOGITS = 3.5  # copies of the logits at tile size that nnU-Net's loss makes
_CONSTANT = 60e6  # bytes
_HALF = 0.72  # of float32, under autocast: DeSAM's published 7.8 of 10.9 GB
_ENCODER_COPIES = 24  # of the tokens, while one image is encoded


class Footprint(NamedTuple):
    """Bytes of one configuration.

    Attributes:
        weights: Of the network with its encoder.
        optimiser: Gradients and Adam's two moments.
        per_tile: Of a training step, for each tile of the batch.
        encoding: While one image is encoded.
    """

    weights: float
    optimiser: float
    per_tile: float
    encoding: float

    def training(self, batch_size: int) -> float:
        """Peak of a training step, or of encoding, whichever is larger."""
        step = _CONSTANT + self.optimiser + batch_size * self.per_tile
        return self.weights + max(step, self.encoding)


@cache
def footprint(
    variant: Variant, image_size: int, patch_size: tuple[int, int], outputs: int, *, half: bool
) -> Footprint:
    """The memory of training DeSAM's decoder on this encoder.

    Args:
        outputs: Foreground classes or regions.
        half: Under autocast, as on a GPU.
    """
    network = _without_values(variant, image_size, outputs)
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    encoder = sum(parameter.numel() for parameter in network.encoder.parameters())
    kept = _kept_for_backward(network, variant, image_size, patch_size)
    features = 4 * network.encoder.channels * (image_size // PATCH) ** 2
    logits = 4 * (outputs + 1) * patch_size[0] * patch_size[1]
    share = _HALF if half else 1.0
    tokens = 4 * (image_size // PATCH) ** 2 * variant.embed_dim
    return Footprint(
        weights=4.0 * (trained + encoder), optimiser=12.0 * trained,
        per_tile=share * _KEPT * kept + features + _LOGITS * logits,
        encoding=share * _ENCODER_COPIES * tokens,
    )


def _without_values(variant: Variant, image_size: int, outputs: int) -> DeSAM:
    with torch.device("meta"):
        sam = build_sam(variant, image_size)
        encoder = FrozenEncoder(use_exact_attention(sam.image_encoder), variant.global_blocks[:-1], "")
        return build_desam(
            sam=LoadedSam(variant, encoder, sam.prompt_encoder, sam.mask_decoder, random=True),
            to_image=TileToImage(image_size, "unit"),
            num_channels=1, num_classes=outputs, background=True, grid=9, iou_threshold=0.5)


def _kept_for_backward(network: DeSAM, variant: Variant, image_size: int, patch_size: tuple[int, int]) -> int:
    """Bytes that autograd keeps for one tile, weights left out."""
    side, dim = image_size // PATCH, variant.prompt_dim
    kept: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        levels = tuple(torch.empty(1, variant.embed_dim, side, side) for _ in network.encoder.level_blocks)
        neck, positions = torch.empty(1, dim, side, side), torch.empty(1, dim, side, side)
        output = network.prim(neck, positions, torch.empty(1, 2, dim), score=True)  # a point and its padding
        masks = network.pdmm(output.mask_embedding, network.pdmm.context(levels))
        logits = network.tile_logits(masks, Geometry(patch_size, image_size))
        logits.logsumexp(1)
    for parameter in network.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    return sum(kept.values())
