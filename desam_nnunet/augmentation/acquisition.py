"""What a scanner does to a picture, drawn at random: intensities, bias field, resolution, noise."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from desam_nnunet.augmentation.randomness import Randomness

_SEGMENTS = 6  # of a curve
_SLOPES = 8.0  # of a curve's segments: the largest to the smallest, at most
_HIDDEN = 2  # channels of a random network
_LAYERS = 4


def random_curves(random: Randomness, pictures: Tensor) -> Tensor:
    """Each of the pictures (B, H, W), 0 to 1, under a monotone curve of its own from 0 to 1, of straight segments."""
    steps = random.log_uniform(1, _SLOPES, len(pictures), _SEGMENTS)
    knots = F.pad((steps / steps.sum(1, keepdim=True)).cumsum(1), (1, 0))
    places = (pictures.flatten(1) * _SEGMENTS).clamp(0, _SEGMENTS)
    below = places.floor().clamp(max=_SEGMENTS - 1).long()
    low, high = knots.gather(1, below), knots.gather(1, below + 1)
    return torch.lerp(low, high, places - below).view_as(pictures)


def random_network(random: Randomness, pictures: Tensor) -> Tensor:
    """Each of the pictures (B, H, W), 0 to 1, through a random shallow network of its own, blended with the picture.

    Four convolutions of 1 or 3 pixels with leaky ReLUs between them; the result spans 0 to 1 again. After Ouyang et
    al., Causality-inspired single-source domain generalization, IEEE TMI 42, 2023, section III-A, whose result keeps
    the picture's norm instead of its range.
    """
    number = len(pictures)
    x, channels = pictures[None], [1, *[_HIDDEN] * (_LAYERS - 1), 1]
    for layer, (before, after) in enumerate(pairwise(channels)):
        kernel = random.normal(number * after, before, 3, 3)
        centre = F.pad(kernel[..., 1:2, 1:2], (1, 1, 1, 1))
        kernel = torch.where(random.chance(0.5, number, 1, 1, 1).repeat_interleave(after, 0), centre, kernel)
        x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, random.normal(number * after), groups=number)
        x = F.leaky_relu(x) if layer < _LAYERS - 1 else x
    return spread(torch.lerp(spread(x[0]), pictures, random.uniform(0, 1, number, 1, 1)))


def spread(pictures: Tensor) -> Tensor:
    """Each of the pictures (B, H, W) stretched to 0 to 1; an even one becomes 0."""
    low, high = pictures.amin((1, 2), keepdim=True), pictures.amax((1, 2), keepdim=True)
    return (pictures - low) / (high - low).clamp(min=1e-6)


def bias_field(random: Randomness, number: int, size: int, strongest: float) -> Tensor:
    """Factors (B, size, size) around 1 that change slowly; `strongest` is the largest deviation of their logarithm."""
    strength = random.uniform(0, strongest, number, 1, 1) * random.chance(0.7, number, 1, 1)
    return torch.exp(strength * random.smooth(number, 1, size, coarsest=2, finest=4)[:, 0])


def in_k_space(random: Randomness, pictures: Tensor, *, blurred: float, limited: float) -> Tensor:
    """Blurred, and of limited resolution, each axis on its own; a sharp limit rings.

    Args:
        pictures: (B, H, W).
        blurred, limited: How probable either is, along an axis.
    """
    number, (height, width) = len(pictures), pictures.shape[1:]
    passed = []
    for frequency in (torch.fft.fftfreq(height, device=pictures.device),
                      torch.fft.rfftfreq(width, device=pictures.device)):
        blur = random.uniform(0, 1.6, number, 1) * random.chance(blurred, number, 1)  # deviation in pixels
        limit = torch.where(random.chance(limited, number, 1), random.uniform(0.12, 0.5, number, 1), 0.5)
        passed.append(torch.exp(-2 * (math.pi * frequency * blur).square()) * (frequency.abs() <= limit))
    spectrum = torch.fft.rfft2(pictures) * passed[0][:, :, None] * passed[1][:, None, :]
    return torch.fft.irfft2(spectrum, s=(height, width))


def rician_noise(random: Randomness, pictures: Tensor, *, strongest: float, noisy: float) -> Tensor:
    """Magnitudes of (B, H, W) with complex noise; `noisy` is how probable it is, `strongest` its largest deviation."""
    strength = random.uniform(0, strongest, len(pictures), 1, 1) * random.chance(noisy, len(pictures), 1, 1)
    real, imaginary = (strength * random.normal(*pictures.shape) for _ in range(2))
    return torch.hypot(pictures + real, imaginary)
