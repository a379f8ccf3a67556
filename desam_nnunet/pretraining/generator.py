"""Images that nobody took, with their label maps: all that the encoder in the box has seen.

Label maps as scanners would picture them: an intensity and texture for every label, then a random acquisition. After
Billot et al., SynthSeg, Medical Image Analysis 86, 2023 (intensities drawn at random for each label and image, so that
shapes are all there is to learn). Ringing and resolution by a limit in k-space, Rician noise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from desam_nnunet.augmentation.acquisition import bias_field, in_k_space, rician_noise
from desam_nnunet.augmentation.randomness import Randomness
from desam_nnunet.pretraining.shapes import AIR, GROUNDS, LABELS, OBJECTS, draw_labels

VERSION = 1  # of what is drawn for a seed and asked about it: a run is not taken up under another
_PERCENTILES = (0.005, 0.995)  # as the trainers' images


class Generated(NamedTuple):
    """Images with their label maps, see :mod:`~desam_nnunet.pretraining.shapes`."""

    images: Tensor  # B 1 S S, 0 to 255
    labels: Tensor  # B S S


def generate(number: int, size: int, device: torch.device, seed: int, batch: int) -> Generated:
    """One batch. The same arguments draw the same images, on every machine with the same kind of device.

    Args:
        size: Side of the images in pixels, a multiple of 64.
        batch: Number of the batch among those of the seed.
    """
    random = Randomness(device, seed, batch)
    labels = draw_labels(random, number, size)
    return Generated(255 * _acquired(random, _intensities(random, labels))[:, None], labels)


def _intensities(random: Randomness, labels: Tensor) -> Tensor:
    """(B, S, S), about 0 to 1."""
    number, size = len(labels), labels.shape[-1]
    level = random.uniform(0, 1, number, LABELS)
    level[:, AIR] *= random.chance(0.2, number)  # mostly black
    strength = random.uniform(0, 0.15, number, LABELS) * random.chance(0.6, number, 1)
    strength[:, AIR] = 0
    for table in (level, strength):  # twins look alike
        table[:, GROUNDS + OBJECTS // 2:] = table[:, GROUNDS: GROUNDS + OBJECTS // 2]
    texture = random.smooth(number, 1, size, coarsest=8, finest=64)[:, 0]
    return _looked_up(level, labels) + _looked_up(strength, labels) * texture


def _acquired(random: Randomness, picture: Tensor) -> Tensor:
    """(B, S, S), 0 to 1."""
    number, size = len(picture), picture.shape[-1]
    picture = picture * bias_field(random, number, size, strongest=0.35)
    picture = in_k_space(random, picture, blurred=0.6, limited=0.5)
    picture = rician_noise(random, picture, strongest=0.08, noisy=0.8)
    sample = picture[:, ::2, ::2].flatten(1)  # of every second pixel: sorting is most of the work
    low, high = torch.quantile(sample, picture.new_tensor(_PERCENTILES), dim=1)[..., None, None]
    picture = ((picture - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    picture = picture ** torch.exp(random.uniform(-0.5, 0.5, number, 1, 1))
    return torch.where(random.chance(0.3, number, 1, 1), 1 - picture, picture)


def _looked_up(table: Tensor, labels: Tensor) -> Tensor:
    """Each pixel's entry of its own image's table (B, N): (B, S, S)."""
    return torch.gather(table, 1, labels.flatten(1)).view(labels.shape)
