"""Prompts of the two modes, and how they become SAM's prompt tokens.

Source: Gao et al., DeSAM, MICCAI 2024: one positive point (grid points) or one box around everything
(whole box). Coordinates are (x, y) in pixels of SAM's input, pixel centres at whole numbers, as SAM's
prompt encoder expects them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from segment_anything.modeling import PromptEncoder
from torch import Tensor

from desam_nnunet.sam.tiles import Geometry

_BOX_SHIFT = 20 / 1024  # of the input's side


class Prompts(NamedTuple):
    """Positive points (B, 1, 2), or boxes (B, 4) by x and y of the first and the last corner, or neither (SAMed).

    There is one for each image; in pretraining there are several.
    """

    points: Tensor | None = None
    boxes: Tensor | None = None


class PointTargets(NamedTuple):
    """What the IoU head should say of the points drawn.

    Attributes:
        inside: (B, K), 1 for every foreground class or region in which the point lies.
        valid: (B,), False where a tile had no labelled pixel to draw from.
    """

    inside: Tensor
    valid: Tensor


def prompt_tokens(prompt_encoder: PromptEncoder, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """SAM's sparse (B, T, C) and dense (B, C, h, w) prompt embeddings, in float32; B is 1 where there is no prompt.

    The coordinates' frequencies need float32: under autocast SAM's encoder would round them.
    """
    with _in_float32(prompt_encoder):
        sparse, dense = prompt_encoder(points=None, boxes=prompts.boxes, masks=None)
        if prompts.points is None:
            return sparse, dense
        return _positive_points(prompt_encoder, prompts.points), dense.expand(len(prompts.points), -1, -1, -1)


def _positive_points(prompt_encoder: PromptEncoder, points: Tensor) -> Tensor:
    """SAM's embedding (N, 2, C) of positive points (N, 1, 2), each with the padding that stands for "no box".

    SAM's own way to it looks labels up by value, for which a GPU waits three times.
    """
    embedded = prompt_encoder.pe_layer.forward_with_coords(points + 0.5, prompt_encoder.input_image_size)
    embedded = embedded + prompt_encoder.point_embeddings[1].weight
    padding = prompt_encoder.not_a_point_embed.weight.expand(len(points), 1, -1)
    return torch.cat([embedded, padding], dim=1)


def dense_positions(prompt_encoder: PromptEncoder) -> Tensor:
    """SAM's dense positional encoding (1, C, h, w), in float32."""
    with _in_float32(prompt_encoder):
        return prompt_encoder.get_dense_pe()


def whole_box(geometry: Geometry, batch: int, device: torch.device) -> Prompts:
    """A box around the whole tile, padding excluded."""
    height, width = geometry.scaled
    boxes = torch.zeros(batch, 4, device=device)
    boxes[:, 2].fill_(width)
    boxes[:, 3].fill_(height)
    return Prompts(boxes=boxes)


def point_grid(geometry: Geometry, points_per_side: int, device: torch.device, offset: float = 0.0) -> Tensor:
    """Centres of the cells of a grid over the tile, row by row: points (N, 1, 2), N its square.

    Args:
        offset: Added to the cells' centres, which count from the tile's edge as the published code has them.
    """
    height, width = geometry.scaled
    steps = (torch.arange(points_per_side, device=device) + 0.5) / points_per_side
    y, x = torch.meshgrid(steps * height + offset, steps * width + offset, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 1, 2)


def sample_points(target: Tensor, labelled: Tensor, geometry: Geometry) -> tuple[Prompts, PointTargets]:
    """Draws one point per tile as DeSAM trains: half of them background where a tile has foreground.

    The foreground class is drawn uniformly from those present, the pixel uniformly from the class; a
    tile without background gets a foreground point. A tile without foreground gets a background point,
    and every other of those lies where another tile of the batch has foreground: drawn from anywhere, it
    would rarely lie where organs are, and a score of the position alone would nearly always be right.

    Args:
        target: (B, K, H, W) bool, one channel per foreground class or region.
        labelled: (B, H, W) bool, False on the ignore label: no point is drawn there.
    """
    target = target & labelled[:, None]
    present = target.flatten(2).any(2)  # B K
    background = labelled & ~target.any(1)
    has_background = background.flatten(1).any(1)
    chosen = target[torch.arange(len(target), device=target.device), random_place(present)]  # B H W
    coin = torch.rand(len(target), device=target.device) < 0.5
    foreground = present.any(1) & (coin | ~has_background)
    tempting = background & target.flatten(0, 1).any(0)  # foreground elsewhere in the batch
    tempted = ~present.any(1) & coin & tempting.flatten(1).any(1)
    background = torch.where(tempted[:, None, None], tempting, background)
    candidates = torch.where(foreground[:, None, None], chosen, background)
    index = random_place(candidates)
    inside = target.flatten(2).gather(2, index[:, None, None].expand(-1, target.shape[1], 1))[..., 0]
    return _to_prompts(index, geometry), PointTargets(inside.float(), candidates.flatten(1).any(1))


def sample_boxes(
    target: Tensor, geometry: Geometry, generator: torch.Generator | None = None
) -> tuple[Prompts, Tensor]:
    """Boxes around one of the classes present in each tile, their sides moved at random, and its masks (B, H, W).

    A side moves by at most 20 pixels of an input of 1024, and at most a quarter of the box, in either direction, and
    stays in the tile. A tile without foreground gets a box around all of it.

    Args:
        target: (B, K, H, W) bool, one channel per foreground class or region, False on the ignore label.
        generator: On the target's device; PyTorch's own where None.
    """
    batch, device = torch.arange(len(target), device=target.device), target.device
    chosen = target[batch, random_place(target.flatten(2).any(2), generator)]  # B H W
    height, width = geometry.scaled
    rows, columns = (extent(chosen.any(axis)) for axis in (2, 1))  # B 2 each, in pixels of the tile
    (left, right), (top, bottom) = (columns * (width / geometry.tile[1])).T, (rows * (height / geometry.tile[0])).T
    boxes = torch.stack([left, top, right, bottom], dim=1)
    sides = torch.stack([right - left, bottom - top] * 2, dim=1)
    largest = (sides / 4).clamp(max=_BOX_SHIFT * geometry.image_size)
    boxes = boxes + largest * (2 * torch.rand(boxes.shape, device=device, generator=generator) - 1)
    x, y = boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)
    return Prompts(boxes=torch.stack([x, y], dim=2).flatten(1)), chosen


def extent(occupied: Tensor) -> Tensor:
    """Outer edges (B, 2) of the True places of (B, N); all of it where there are none."""
    length = occupied.shape[1]
    occupied = occupied | ~occupied.any(1, keepdim=True)
    first = occupied.float().argmax(1)
    return torch.stack([first, length - occupied.flip(1).float().argmax(1)], dim=1).float()


def random_place(candidates: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Flat index (B,) of a uniformly drawn True place of (B, ...); any place where there is none."""
    noise = torch.rand(candidates.shape, device=candidates.device, generator=generator)
    return torch.where(candidates, noise, noise - 1).flatten(1).argmax(1)


def _to_prompts(index: Tensor, geometry: Geometry) -> Prompts:
    """Pixel centres of the tile as points of SAM's input."""
    tile_height, tile_width = geometry.tile
    height, width = geometry.scaled
    x = (index % tile_width + 0.5) * (width / tile_width) - 0.5
    y = (index // tile_width + 0.5) * (height / tile_height) - 0.5
    return Prompts(points=torch.stack([x, y], dim=-1)[:, None])


def _in_float32(prompt_encoder: PromptEncoder) -> torch.autocast:
    return torch.autocast(prompt_encoder.no_mask_embed.weight.device.type, enabled=False)
