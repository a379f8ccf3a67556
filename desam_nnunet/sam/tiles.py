"""nnU-Net's tile to the encoder's image, and mask logits back to the tile.

Source of the geometry: Kirillov et al., Segment Anything, ICCV 2023 (longest side to the input size,
padding at the bottom and right). Sides are rounded to whole mask pixels, so that the padding can be cut
from the mask logits exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from desam_nnunet.encoders.base import ImageSpec

_PERCENTILES = (0.005, 0.995)
_UNIT_SCHEMES = {"RescaleTo01Normalization", "RGBTo01Normalization"}
_GROUP = 3  # channels of an RGB image
MASK_STRIDE = 4  # of SAM's and DeSAM's masks: a tile's sides are whole multiples of it in the input


@dataclass(frozen=True)
class Geometry:
    """Where a tile (height, width) lies in the encoder's square input, `mask_stride` of whose pixels are one of a mask.

    The stride is a power of two.
    """

    tile: tuple[int, int]
    image_size: int
    mask_stride: int = MASK_STRIDE

    @property
    def scaled(self) -> tuple[int, int]:
        """Height and width of the tile inside the encoder's input; the rest is padding."""
        scale = self.image_size / max(self.tile)
        step = max(MASK_STRIDE, self.mask_stride)
        height, width = (max(1, round(side * scale / step)) * step for side in self.tile)
        return height, width

    @property
    def mask(self) -> tuple[int, int]:
        """Height and width of the tile inside the mask logits."""
        height, width = self.scaled
        return height // self.mask_stride, width // self.mask_stride


class TileToImage(nn.Module):
    """Turns nnU-Net's preprocessed tiles (B, C, H, W) into images (B, G, 3, S, S) as `spec` has them, G channel groups.

    Args:
        image_size: S.
        intensity: One of ``percentile`` (0.5 to 99.5 of each tile and channel), ``window`` (fixed) and
            ``unit`` ([0, 1] data).
        window: For ``window`` only: per channel the lower and upper bound in the data's own units.
    """

    mean: Tensor
    std: Tensor
    bounds: Tensor
    percentiles: Tensor

    def __init__(
        self, spec: ImageSpec, image_size: int, intensity: str, window: tuple[tuple[float, float], ...] = ()
    ) -> None:
        super().__init__()
        self.spec = spec
        self.image_size = image_size
        self.intensity = intensity
        self.window = window
        constants = {"mean": spec.mean, "std": spec.std, "bounds": window, "percentiles": _PERCENTILES}
        for name, values in constants.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)

    @property
    def settings(self) -> tuple[object, ...]:
        """All that the images of a tile depend on."""
        return self.spec, self.image_size, self.intensity, self.window

    def forward(self, tiles: Tensor) -> Tensor:
        images = torch.stack(channel_groups(self._to_unit(tiles.float()) * self.spec.highest), dim=1)
        batch, groups = images.shape[:2]
        height, width = Geometry((tiles.shape[-2], tiles.shape[-1]), self.image_size).scaled
        images = self._resize(images.flatten(0, 1), (height, width))  # B G 3 H W -> BG 3 h w
        if self.spec.rescale:
            extremes = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
            images = _stretched(images, *extremes) * self.spec.highest
        images = (images - self.mean[:, None, None]) / self.std[:, None, None]
        padding = (0, self.image_size - width, 0, self.image_size - height)
        return F.pad(images, padding).unflatten(0, (batch, groups))

    def _resize(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Means of areas can't enlarge: there every rule is bilinear."""
        if self.spec.resize == "area" and size[0] <= images.shape[-2] and size[1] <= images.shape[-1]:
            return F.interpolate(images, size=size, mode="area")
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)

    def _to_unit(self, tiles: Tensor) -> Tensor:
        """Maps intensities to [0, 1]; a constant channel maps to 0."""
        if self.intensity == "unit":
            return tiles.clamp(0, 1)
        bounds = self.bounds.T if self.intensity == "window" else self._percentiles(tiles)  # 2 C or 2 B C
        return _stretched(tiles, *bounds[..., None, None])

    def _percentiles(self, tiles: Tensor) -> Tensor:
        """Bounds per tile and channel, (2, B, C); the extremes where the percentiles fall together.

        They do so in a tile that is mostly padding, whose few pixels would else disappear.
        """
        pixels = tiles.flatten(2)
        bounds = torch.quantile(pixels, self.percentiles, dim=2)
        return torch.where(bounds[1] > bounds[0], bounds, torch.stack(pixels.aminmax(dim=2)))


def _stretched(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """What lies between two bounds as 0 to 1; 0 where these are equal."""
    return torch.where(high > low, (x - low) / (high - low), 0.0).clamp(0, 1)


def images_per_tile(channels: int) -> int:
    """How many groups :func:`channel_groups` makes."""
    return -(-channels // _GROUP)


def channel_groups(tiles: Tensor) -> list[Tensor]:
    """Splits (B, C, H, W) into RGB images of (B, 3, H, W), as few as the channels need.

    One channel is repeated; two give both and their mean; three stay as they are; more are taken in
    groups of up to three, which the encoder sees one by one.
    """
    return [_to_rgb(group) for group in tiles.split(_GROUP, dim=1)]


def cut_padding(masks: Tensor, geometry: Geometry) -> Tensor:
    """Mask logits (B, K, S / stride, S / stride) of the tile alone, (B, K, h, w)."""
    height, width = geometry.mask
    return masks[..., :height, :width]


def logits_to_tile(masks: Tensor, geometry: Geometry) -> Tensor:
    """Mask logits (B, K, S / stride, S / stride) without padding, bilinearly brought to the tile: (B, K, H, W).

    In float32: on a GPU, autocast would enlarge in the type of the masks.
    """
    masks = cut_padding(masks, geometry).float()
    return F.interpolate(masks, size=geometry.tile, mode="bilinear", align_corners=False)


def intensity_rule(normalization_schemes: list[str]) -> str:
    """The intensity rule that fits nnU-Net's normalisation of all channels."""
    schemes = set(normalization_schemes)
    if schemes == {"CTNormalization"}:
        return "window"
    return "unit" if schemes <= _UNIT_SCHEMES else "percentile"


def ct_window(intensity_properties: dict[str, dict[str, Any]], num_channels: int) -> tuple[tuple[float, float], ...]:
    """Per channel, the range of data after nnU-Net's CT normalisation: the clipped percentiles, z-scored.

    Args:
        intensity_properties: The plans' ``foreground_intensity_properties_per_channel``.
    """
    window = []
    for channel in range(num_channels):
        row = intensity_properties[str(channel)]
        std = max(row["std"], 1e-8)  # as nnU-Net's CTNormalization
        window.append(((row["percentile_00_5"] - row["mean"]) / std, (row["percentile_99_5"] - row["mean"]) / std))
    return tuple(window)


def _to_rgb(group: Tensor) -> Tensor:
    if group.shape[1] == 1:
        return group.expand(-1, 3, -1, -1)
    if group.shape[1] == 2:
        return torch.cat([group, group.mean(1, keepdim=True)], dim=1)
    return group
