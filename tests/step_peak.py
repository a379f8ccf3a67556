"""The peak memory of two training steps in float32, in a process of its own: prints bytes above the network's own.

    python step_peak.py METHOD VARIANT IMAGE_SIZE BATCH OUTPUTS PATCH [checkpointing]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from desam_nnunet.encoders.attention import use_exact_attention
from desam_nnunet.encoders.base import Features, FrozenEncoder
from desam_nnunet.encoders.registry import VARIANTS, Variant, build_sam
from desam_nnunet.encoders.weights import LoadedSam
from desam_nnunet.networks.dbsam.network import build_dbsam
from desam_nnunet.networks.desam.network import build_desam
from desam_nnunet.networks.samed.network import build_samed
from desam_nnunet.sam.prompts import Prompts
from desam_nnunet.sam.tiles import TileToImage, cut_padding
from desam_nnunet.system.machine import peak_memory
from desam_nnunet.training.losses import DiceCELoss


def main() -> None:
    method, name = sys.argv[1:3]
    variant = VARIANTS[name]
    size, batch, outputs, patch = map(int, sys.argv[3:7])
    manager = LabelManager({"background": 0} | {f"c{k}": k for k in range(1, outputs + 1)}, None)
    network = build(method, variant, size, outputs)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = peak_memory(torch.device("cpu"))
    for _ in range(2):
        target = torch.randint(0, outputs + 1, (batch, 1, patch, patch))
        optimizer.zero_grad()
        STEPS[method](network, variant, size, batch, target, manager).backward()
        optimizer.step()
    print(peak_memory(torch.device("cpu")) - before)


def build(method: str, variant: Variant, size: int, outputs: int) -> Any:
    if method == "desam":  # its encoder is not needed
        with torch.device("meta"):
            sam = build_sam(variant, size)
            encoder = FrozenEncoder(sam.image_encoder, variant.global_blocks[:-1], "")
        prompt_encoder = build_sam(variant, size).prompt_encoder
        return build_desam(
            sam=LoadedSam(variant, encoder, prompt_encoder, sam.mask_decoder, random=True),
            to_image=TileToImage(size, "unit"), num_channels=1, num_classes=outputs, background=True, grid=9,
            iou_threshold=0.5)
    sam = build_sam(variant, size)
    encoder = FrozenEncoder(use_exact_attention(sam.image_encoder), variant.global_blocks[:-1], "")
    encoder.dtype = torch.float32  # also where the CPU has bfloat16
    loaded = LoadedSam(variant, encoder, sam.prompt_encoder, sam.mask_decoder, random=True)
    settings: dict[str, Any] = {"sam": loaded, "num_channels": 1, "checkpointing": "checkpointing" in sys.argv,
                                "to_image": TileToImage(size, "unit", normalise=method == "dbsam")}
    if method == "samed":
        return build_samed(outputs=outputs + 1, rank=4, targets="qv", adapt_decoder=False, **settings)
    return build_dbsam(num_classes=outputs, background=True, **settings)


def step_of_desam(
    network: Any, variant: Variant, size: int, batch: int, target: Tensor, manager: LabelManager
) -> Tensor:
    side = size // 16
    features = Features(tuple(torch.randn(batch, variant.embed_dim, side, side) for _ in range(3)),
                        torch.randn(batch, variant.prompt_dim, side, side))
    masks, scores = network(features, Prompts(points=torch.full((batch, 1, 2), 50.0)))
    loss = DC_and_CE_loss({"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}, {},
                          dice_class=MemoryEfficientSoftDiceLoss)
    return loss(network.tile_logits(masks, network.geometry(target)), target) + scores.mean()


def step_of_samed(
    network: Any, variant: Variant, size: int, batch: int, target: Tensor, manager: LabelManager
) -> Tensor:
    tiles, geometry = torch.rand(target.shape), network.geometry(target)
    masks = network(tiles, low_resolution=True)
    small = torch.nn.functional.interpolate(target.float(), size=geometry.mask)
    network.tile_logits(masks, geometry)
    return DiceCELoss(manager, ce=0.2, dice=0.8, background=True)(cut_padding(masks, geometry), small)


def step_of_dbsam(
    network: Any, variant: Variant, size: int, batch: int, target: Tensor, manager: LabelManager
) -> Tensor:
    return DiceCELoss(manager, ce=1.0, dice=1.0, background=False)(network(torch.rand(target.shape)), target)


STEPS = {"desam": step_of_desam, "samed": step_of_samed, "dbsam": step_of_dbsam}


if __name__ == "__main__":
    main()
