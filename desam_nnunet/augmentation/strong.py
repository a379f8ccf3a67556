"""The recipe ``strong``: nnU-Net's own augmentation with intensities as a scanner elsewhere might give them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from torch import Tensor

from desam_nnunet.augmentation.acquisition import (
    bias_field,
    in_k_space,
    random_curves,
    random_network,
    rician_noise,
)
from desam_nnunet.augmentation.randomness import BATCHES, SEEDS, Randomness

_ROTATION = math.radians(20)
_SCALING = (0.75, 1.3)
_MOVED = 0.7  # how probable rotation and scaling are, each
_PERCENTILES = (0.005, 0.995)


def strengthened(stock: ComposeTransforms) -> ComposeTransforms:
    """nnU-Net's training transforms with :class:`OtherScanner` in the place of their changes of intensity.

    Rotation and scaling happen more often and reach less far; mirroring, masks and labels stay as they are.
    """
    transforms: list[BasicTransform] = []
    for transform in stock.transforms:
        if isinstance(transform, SpatialTransform):
            moved = copy.copy(transform)
            moved.p_rotation = moved.p_scaling = _MOVED
            reach = min(_ROTATION, transform.rotation[1])  # nnU-Net's own is less in elongated patches
            moved.rotation, moved.scaling = (-reach, reach), _SCALING
            transforms += [moved, OtherScanner()]
        elif not isinstance(transform, RandomTransform):  # those change intensities
            transforms.append(transform)
    return ComposeTransforms(transforms)


@dataclass
class OtherScanner(ImageOnlyTransform):
    """Shows each channel of a tile (C, H, W) as another scanner might, and the same anatomy.

    In turn, each with its probability: a random shallow network, a random monotone curve, inversion, a bias field,
    blur and limited resolution (which rings), noise. The range of intensities, outliers apart, stays about what it was,
    and a channel of one value stays as it is.

    Attributes:
        network, curve, inversion, blur, limit, noise: How probable each is.
        bias: The largest deviation of the bias field's logarithm.
        noise_level: The largest deviation of the noise, of the intensities' range.
        version: Of what is drawn; part of the recipe of stored views.
    """

    network: float = 0.2
    curve: float = 0.8
    inversion: float = 0.2
    bias: float = 0.35
    blur: float = 0.3
    limit: float = 0.3
    noise: float = 0.3
    noise_level: float = 0.08
    version: int = 1

    def _apply_to_image(self, img: Tensor, **_params: object) -> Tensor:
        number, (height, width) = len(img), img.shape[1:]
        # numpy's generator: nnU-Net's workers share the state of PyTorch's
        random = Randomness(img.device, int(np.random.randint(SEEDS)), int(np.random.randint(BATCHES)))
        low, high = _range(img)
        span = high - low
        seen = ((img - low) / span.clamp(min=1e-6)).clamp(0, 1)
        for probability, change in ((self.network, random_network), (self.curve, random_curves)):
            seen = torch.where(random.chance(probability, number, 1, 1), change(random, seen), seen)
        seen = torch.where(random.chance(self.inversion, number, 1, 1), 1 - seen, seen)
        seen = seen * bias_field(random, number, max(height, width), self.bias)[:, :height, :width]
        seen = in_k_space(random, seen, blurred=self.blur, limited=self.limit)
        seen = rician_noise(random, seen, strongest=self.noise_level, noisy=self.noise)
        return torch.where(span > 0, low + span * seen, img)


def _range(img: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel, without outliers (C, 1, 1); all of it where nearly every pixel is the same."""
    ends = torch.quantile(img[:, ::2, ::2].flatten(1), img.new_tensor(_PERCENTILES), dim=1)
    whole = torch.stack(torch.aminmax(img.flatten(1), dim=1))
    low, high = torch.where(ends[1] > ends[0], ends, whole)[..., None, None]
    return low, high
