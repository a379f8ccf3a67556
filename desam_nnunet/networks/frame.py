"""What the networks of all three methods share: a tile of nnU-Net's in, logits of its size out, SAM held aside."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from desam_nnunet.sam.tiles import Geometry, TileToImage, logits_to_tile

# nnU-Net sums logits times ten in float16 and gives a volume up where they overflow. No decision changes.
MAX_LOGIT = 100.0
# An absent class gets this logit everywhere in the tile: low enough to lose against a background of 0,
# high enough that other tiles, mirrors and folds can outvote it.
ABSENT_LOGIT = -10.0
# torch.compile leaves these methods as they are, since they decide on values, and compiles what they call.
uncompiled = torch.compiler.disable(recursive=False)


class SamNetwork(nn.Module):
    """Args:
        held: Modules with frozen weights that are known by reference. They are no submodules, so that no
            checkpoint, optimiser or DDP bucket ever sees them, but they move along to another device.
        to_image: Maps nnU-Net's tiles to SAM images.
        num_channels: Channels of the tiles.
        background: Whether a background channel, which is 0 by definition, is put in front of the masks' logits.
    """

    def __init__(
        self, *, held: Iterable[nn.Module], to_image: TileToImage, num_channels: int, background: bool
    ) -> None:
        super().__init__()
        self.held = tuple(held)
        self.to_image = to_image
        self.num_channels = num_channels
        self.background = background

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SamNetwork:
        super()._apply(fn, recurse)
        for module in self.held:
            module._apply(fn, recurse)
        return self

    def geometry(self, tiles: Tensor) -> Geometry:
        return Geometry((tiles.shape[-2], tiles.shape[-1]), self.to_image.image_size)

    def tile_logits(self, masks: Tensor, geometry: Geometry) -> Tensor:
        """Mask logits (B, K, S/4, S/4) as nnU-Net wants them: at tile size, the background's 0 in front if any."""
        return self.with_background(logits_to_tile(masks, geometry))

    def with_background(self, logits: Tensor) -> Tensor:
        if not self.background:
            return logits
        return torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1)

    def images(self, tiles: Tensor) -> Tensor:
        """SAM images (B, G, 3, S, S) of tiles (B, C, H, W), G groups of channels each.

        Raises:
            ValueError: The tiles have another number of channels than planned, or hold NaN or infinity.
        """
        if tiles.shape[1] != self.num_channels:
            raise ValueError(
                f"The image has {tiles.shape[1]} channel(s), but the model was planned for {self.num_channels}: "
                "give one file per planned channel (_0000, _0001, ...)."
            )
        if not torch.isfinite(tiles).all():
            raise ValueError("The image holds NaN or infinite values after preprocessing: repair or remove it.")
        return self.to_image(tiles)


def mean_over_groups(features: Tensor, groups: int) -> Tensor:
    """Averages what was encoded group by group: (B·G, ...) -> (B, ...)."""
    return features if groups == 1 else features.unflatten(0, (-1, groups)).mean(1)
