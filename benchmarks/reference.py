"""The straightforward procedure that ours is measured against, and networks to measure.

Stock ``segment_anything`` for the encoder and the two-way transformer; 81 grid prompts, nine at a time, each
through the whole decoder, as the published DeSAM predicts. All weights are RANDOM: they cost the same as
pretrained ones, and the outputs are compared, not looked at.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor
from torch.nn import functional as F

from desam_nnunet.encoders.attention import use_exact_attention
from desam_nnunet.encoders.base import Features, LoadedEncoder
from desam_nnunet.encoders.random_weights import RANDOM_IDENTITY
from desam_nnunet.encoders.sam_vit import SamViT, SamViTEncoder, build_sam, resize_positions
from desam_nnunet.encoders.weights import find_row
from desam_nnunet.networks.desam.network import DeSAM, build_desam
from desam_nnunet.networks.desam.prompters import GridPrompter, WholeBoxPrompter
from desam_nnunet.networks.desam.section import DesamSection
from desam_nnunet.networks.frame import ABSENT_LOGIT, Outline
from desam_nnunet.sam.prompts import Prompts, dense_positions, point_grid, prompt_tokens, whole_box
from desam_nnunet.sam.tiles import TileToImage, logits_to_tile

PUBLISHED_BATCH = 9
TILE = 320


class Subject(NamedTuple):
    """Attributes: stock: SAM's encoder. network: DeSAM on the same weights. tile: (1, 1, 320, 320)."""

    stock: ImageEncoderViT
    network: DeSAM
    tile: Tensor


def build(name: str, size: int, device: torch.device, *, grid: int | None = 9, classes: int = 1) -> Subject:
    """Args: name: Of one of SAM's own encoders."""
    torch.manual_seed(0)
    vit = find_row(name).architecture
    assert isinstance(vit, SamViT)
    sam = build_sam(vit, size)
    sam.load_state_dict(resize_positions(vit.random_state(), vit, size))
    stock = sam.image_encoder.eval().requires_grad_(False)
    encoder = SamViTEncoder(
        use_exact_attention(copy.deepcopy(stock)), vit.spec(size), RANDOM_IDENTITY, vit.global_blocks[:-1])
    loaded = LoadedEncoder(encoder, sam.prompt_encoder.eval(), sam.mask_decoder, trained=False)
    to_image = TileToImage(encoder.spec.image, size, "percentile")
    outline = Outline(loaded, to_image, num_channels=1, num_outputs=classes + 1, background=True,
                      section=DesamSection())
    network = build_desam(outline, WholeBoxPrompter() if grid is None else GridPrompter(grid))
    return Subject(stock.to(device), network.to(device).eval(), smooth_noise(1).to(device))


def smooth_noise(slices: int) -> Tensor:
    """Something with structure at several scales, (slices, 1, 320, 320)."""
    coarse = (torch.randn(slices, 1, side, side) for side in (5, 20, 80))
    return torch.stack([F.interpolate(x, size=(TILE, TILE), mode="bicubic") for x in coarse]).sum(0)


def stock_features(stock: ImageEncoderViT, images: Tensor) -> Features:
    """SAM's own forward, with the intermediate outputs that DeSAM reads: of blocks with global attention but the last.
    """
    levels: list[Tensor] = []
    attending = [block for block in stock.blocks if not block.window_size]
    hooks = [block.register_forward_hook(lambda _m, _i, out: levels.append(out.permute(0, 3, 1, 2)))
             for block in attending[:-1]]
    neck = stock(images)
    for hook in hooks:
        hook.remove()
    return Features(tuple(levels), neck)


def decode(network: DeSAM, features: Features, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Masks and scores of N prompts on one image, each through SAM's own transformer and the whole PDMM."""
    sparse, dense = prompt_tokens(network.prompt_encoder, prompts)
    prim, number = network.prim, len(sparse)
    tokens = torch.cat([torch.cat([prim.iou_token.weight, prim.mask_tokens.weight]).expand(number, -1, -1), sparse], 1)
    image = features.neck.repeat_interleave(number, 0) + dense
    positions = dense_positions(network.prompt_encoder).repeat_interleave(number, 0)
    queries, stream = prim.transformer(image, positions, tokens)
    embedding = stream.transpose(1, 2).unflatten(2, image.shape[-2:])
    levels = tuple(level.expand(number, -1, -1, -1) for level in features.levels)
    return network.pdmm(embedding, network.pdmm.context(levels)), prim.iou_head(queries[:, 0])


def published_grid(network: DeSAM, features: Features, tile: Tensor) -> Tensor:
    """Logits (1, K + 1, H, W) of one tile: every prompt decoded, the best above the threshold kept."""
    geometry, asked = network.geometry(tile), grid_of(network)
    points = point_grid(geometry, asked.side, tile.device)
    decoded = [decode(network, features, Prompts(points=chunk)) for chunk in points.split(PUBLISHED_BATCH)]
    masks, scores = (torch.cat(part) for part in zip(*decoded, strict=True))
    best_score, best_point = scores.max(0)
    channels = torch.arange(len(best_score), device=tile.device)
    logits = logits_to_tile(masks[best_point, channels][None].float(), geometry)
    absent = best_score <= asked.threshold
    logits = torch.where(absent[:, None, None], logits.new_tensor(ABSENT_LOGIT), logits)
    return torch.cat([torch.zeros_like(logits[:, :1]), logits], 1)


def grid_of(network: DeSAM) -> GridPrompter:
    assert isinstance(network.prompter, GridPrompter)
    return network.prompter


def published_box(network: DeSAM, features: Features, tile: Tensor) -> Tensor:
    geometry = network.geometry(tile)
    masks, _ = decode(network, features, whole_box(geometry, 1, tile.device))
    return network.tile_logits(masks.float(), geometry)


def let_points_pass(network: DeSAM, features: Features, tile: Tensor) -> int:
    """Shifts and stretches the random scores so that about half of the points pass and the best one leads clearly.

    Returns:
        How many points pass, the least over the classes.
    """
    threshold = grid_of(network).threshold
    with torch.no_grad():
        last = network.prim.iou_head.seg_layers
        scores = network.scores(features, network.geometry(tile))  # N K
        last.weight /= scores.std(0)[:, None]
        last.bias /= scores.std(0)
        scores = network.scores(features, network.geometry(tile))
        last.bias += threshold - scores.median(0).values + 1e-3
        scores = network.scores(features, network.geometry(tile)).sort(0, descending=True).values
    assert bool((scores[0] - scores[1] > 1e-3).all()), "the best point does not lead clearly"
    return int((scores > threshold).sum(0).min())
