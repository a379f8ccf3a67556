"""Prints the peak memory in bytes of two training steps above the network's own. Run by test_plan.py, on Linux.

Arguments: variant, input size, batch size, foreground classes, side of the tiles.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from desam_nnunet.networks.desam import build_desam
from desam_nnunet.sam.encoder import Features, FrozenEncoder
from desam_nnunet.sam.prompts import Prompts
from desam_nnunet.sam.tiles import TileToImage
from desam_nnunet.sam.variants import VARIANTS, build_sam
from desam_nnunet.sam.weights import LoadedSam


def main() -> None:
    variant = VARIANTS[sys.argv[1]]
    size, batch, outputs, patch = map(int, sys.argv[2:])
    with torch.device("meta"):
        sam = build_sam(variant, size)
        encoder = FrozenEncoder(sam.image_encoder, variant.global_blocks[:-1], "")
    network = build_desam(
        sam=LoadedSam(variant, encoder, build_sam(variant, size).prompt_encoder, sam.mask_decoder, random=True),
        to_image=TileToImage(size, "unit"), num_channels=1, num_classes=outputs, background=True, grid=9,
        iou_threshold=0.5)
    loss = DC_and_CE_loss({"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}, {},
                          dice_class=MemoryEfficientSoftDiceLoss)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = highest()
    side = size // 16
    for _ in range(2):
        features = Features(tuple(torch.randn(batch, variant.embed_dim, side, side) for _ in range(3)),
                            torch.randn(batch, variant.prompt_dim, side, side))
        masks, scores = network(features, Prompts(points=torch.full((batch, 1, 2), 50.0)))
        logits = network.tile_logits(masks, network.geometry(torch.empty(batch, 1, patch, patch)))
        target = torch.randint(0, outputs + 1, (batch, 1, patch, patch))
        optimizer.zero_grad()
        (loss(logits, target) + scores.mean()).backward()
        optimizer.step()
    print(highest() - before)


def highest() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


if __name__ == "__main__":
    main()
