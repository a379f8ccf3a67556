"""Random numbers of one batch, on its own device, from a seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

BATCHES = 1_000_003  # of one seed, at most
SEEDS = 2**32 // BATCHES  # PyTorch's generator of a CPU knows no more states


class Randomness:
    """What is drawn follows from seed, batch number, kind of device and the order of the calls.

    Args:
        seed: Of a whole run, below :data:`SEEDS`.
        batch: Number of the batch in it, below :data:`BATCHES`.
    """

    def __init__(self, device: torch.device, seed: int, batch: int) -> None:
        assert 0 <= seed < SEEDS, seed
        assert 0 <= batch < BATCHES, batch
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed * BATCHES + batch)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, device=self.device)

    def log_uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return self.uniform(math.log(low), math.log(high), *shape).exp()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def chance(self, probability: float, *shape: int) -> Tensor:
        """Bool, True with this probability."""
        return self.uniform(0, 1, *shape) < probability

    def smooth(self, number: int, channels: int, size: int, *, coarsest: int, finest: int) -> Tensor:
        """Noise of several scales together, (N, C, size, size), mean 0 and deviation about 1 in each image and channel.

        Args:
            coarsest, finest: Cells along a side of the coarsest and the finest scale; the scales double. How much
                each counts is drawn for each image and channel, less for the finer ones.
        """
        side, count = coarsest, 0
        field = torch.zeros(number, channels, side, side, device=self.device)
        while side <= finest:
            share = self.uniform(0, 1, number, channels, 1, 1) * 0.7**count
            field = F.interpolate(field, (side, side), mode="bilinear") + share * self.normal(
                number, channels, side, side)
            side, count = 2 * side, count + 1
        field = field - field.mean((2, 3), keepdim=True)
        field = field / field.std((2, 3), keepdim=True).clamp(min=1e-6)
        return F.interpolate(field, (size, size), mode="bicubic")
