"""What DB-SAM puts beside and between the blocks of SAM's encoder.

Source: Qin et al., DB-SAM, MICCAI 2024, section 2: channel attention after each block, a convolution branch, bilateral
deformable cross-attention after each stage, and their fusion. Widths of the stems, and that channel attention starts
at zero, are ours, where the paper says nothing.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import SqueezeExcitation, StochasticDepth

from desam_nnunet.networks.dbsam.deformable import DeformableAttention

LEVELS = 4  # the convolution branch sees the image at 1/2, 1/4, 1/8 and 1/16 of its size
_SQUEEZE = 4
_BOTTLENECK = 12
_EXPANSION = 4
_DROP_PATH = 0.3
_DROPOUT = 0.1


class ChannelAttention(nn.Module):
    """``F + Conv(SE(GELU(DWConv(LN(F)))))`` on tokens (B, h, w, D); the last convolution starts at zero."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.squeeze = SqueezeExcitation(dim, dim // _SQUEEZE)
        self.project = nn.Conv2d(dim, dim, 1)
        for parameter in self.project.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        change = self.norm(x).permute(0, 3, 1, 2)  # B h w D -> B D h w
        change = self.project(self.squeeze(F.gelu(self.depthwise(change))))
        return x + change.permute(0, 2, 3, 1)


class Stem(nn.Module):
    """One map of the convolution branch.

    Args:
        level: The image is seen at 1 / 2**level of its size, 1 to 4, and brought to 1/16 by strided convolutions.
    """

    def __init__(self, dim: int, level: int) -> None:
        super().__init__()
        self.level = level
        strided = LEVELS - level
        widths = [3] + [dim // _BOTTLENECK * 2**k for k in range(max(1, strided))]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2 if strided else 1, padding=1, bias=False),
                       nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], dim, 1))
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """The map (B, S/16, S/16, D) of images (B, 3, S, S)."""
        side = images.shape[-1] >> self.level
        small = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
        return self.norm(self.layers(small).permute(0, 2, 3, 1))  # B D h w -> B h w D


class FeedForward(nn.Module):
    """``x + FFN(LN(x))`` with a depthwise convolution inside, on maps (B, h, w, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = _EXPANSION * dim
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.shrink = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(_DROPOUT)
        self.drop_path = StochasticDepth(_DROP_PATH, "row")

    def forward(self, x: Tensor) -> Tensor:
        change = self.expand(self.norm(x)).permute(0, 3, 1, 2)
        change = F.gelu(self.depthwise(change)).permute(0, 2, 3, 1)
        return x + self.drop_path(self.dropout(self.shrink(self.dropout(change))))


class BilateralExchange(nn.Module):
    """The ViT's tokens read the convolution maps, and these read the tokens, both as they were before."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.token_norm = nn.LayerNorm(dim)
        self.map_norm = nn.LayerNorm(dim)
        self.tokens_read = DeformableAttention(dim, heads, LEVELS)
        self.maps_read = DeformableAttention(dim, heads, 1)
        self.dropout = nn.Dropout(_DROPOUT)
        self.drop_path = StochasticDepth(_DROP_PATH, "row")
        self.token_feed = FeedForward(dim)
        self.map_feed = FeedForward(dim)

    def forward(self, tokens: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Both changed, tokens (B, h, w, D) and maps (B, L, h, w, D)."""
        batch, levels, height, width, _ = maps.shape
        places = _pixel_centres(height, width, tokens.device)
        token_values, map_values = self.token_norm(tokens), self.map_norm(maps)
        to_tokens = self.tokens_read(token_values.flatten(1, 2), places, map_values)
        to_maps = self.maps_read(map_values.flatten(1, 3), places.repeat(levels, 1), token_values[:, None])
        tokens = tokens + self.drop_path(self.dropout(to_tokens)).view_as(tokens)
        maps = maps + self.drop_path(self.dropout(to_maps)).view_as(maps)
        maps = self.map_feed(maps.flatten(0, 1)).unflatten(0, (batch, levels))
        return self.token_feed(tokens), maps


class Fusion(nn.Module):
    """A weighted sum of the ViT's map and the convolution maps, the weights a softmax at each pixel and channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        narrow = dim // _BOTTLENECK
        self.scores = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, narrow), nn.SiLU(), nn.LayerNorm(narrow), nn.Linear(narrow, dim))
            for _ in range(1 + LEVELS))
        self.feed = FeedForward(dim)

    def forward(self, tokens: Tensor, maps: Tensor) -> Tensor:
        """One map (B, h, w, D) of tokens (B, h, w, D) and maps (B, L, h, w, D)."""
        together = torch.cat([tokens[:, None], maps], dim=1)
        scores = torch.stack([score(one) for score, one in zip(self.scores, together.unbind(1), strict=True)], dim=1)
        return self.feed((scores.softmax(1) * together).sum(1))


def _pixel_centres(height: int, width: int, device: torch.device) -> Tensor:
    """x and y of each pixel of a map, row by row, as shares of its size: (h·w, 2)."""
    y, x = ((torch.arange(side, device=device) + 0.5) / side for side in (height, width))
    return torch.cartesian_prod(y, x).flip(1)
