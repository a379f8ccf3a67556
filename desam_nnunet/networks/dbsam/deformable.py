"""Multi-scale deformable attention in plain PyTorch.

Source: Zhu et al., Deformable DETR, ICLR 2021, section 4.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DeformableAttention(nn.Module):
    """Each head of a query reads a few `points` around the query's place on each map, where the query tells it to."""

    def __init__(self, dim: int, heads: int, levels: int, points: int = 4) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(dim, heads * levels * points * 2)
        self.weights = nn.Linear(dim, heads * levels * points)
        self.values = nn.Linear(dim, dim)
        self.project = nn.Linear(dim, dim)
        self._start()

    def forward(self, queries: Tensor, places: Tensor, maps: Tensor) -> Tensor:
        """What the queries (B, Q, C) read, (B, Q, C).

        Args:
            places: Of the queries, (Q, 2): x and y as shares of width and height, 0 to 1.
            maps: (B, L, h, w, C). Beyond their borders they are zero.
        """
        batch, count, _ = queries.shape
        height, width = maps.shape[2:4]
        shape = (batch, count, self.heads, self.levels, self.points)
        offsets = self.offsets(queries).float().view(*shape, 2) / places.new_tensor([width, height])
        weights = self.weights(queries).float().view(batch, count, self.heads, -1).softmax(-1).view(shape)
        grids = 2 * (places[:, None, None, None] + offsets) - 1  # as grid_sample counts: -1 to 1
        grids = grids.permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # B Q n L P 2 -> L B·n Q P 2
        shares = weights.permute(3, 0, 2, 1, 4).flatten(1, 2)[:, :, None]  # L B·n 1 Q P
        values = self.values(maps).float().unflatten(-1, (self.heads, -1))  # B L h w n d
        values = values.permute(1, 0, 4, 5, 2, 3).flatten(1, 2)  # L B·n d h w
        read = torch.stack([
            (F.grid_sample(value, grid, align_corners=False) * share).sum(-1)
            for value, grid, share in zip(values, grids, shares, strict=True)
        ]).sum(0)  # B·n d Q
        return self.project(read.view(batch, -1, count).transpose(1, 2))  # B n·d Q -> B Q C

    def _start(self) -> None:
        """Head by head another direction, point by point one pixel farther, all with the same weight."""
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1)[:, None]
        offsets = directions[:, None, None] * steps  # n 1 P 2
        nn.init.zeros_(self.offsets.weight)
        with torch.no_grad():
            self.offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        for linear in (self.values, self.project):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
