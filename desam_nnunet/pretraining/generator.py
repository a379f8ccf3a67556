"""Images that nobody took, with their label maps: all that the encoder in the box has seen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from desam_nnunet.pretraining.pictures import picture_labels
from desam_nnunet.pretraining.randomness import Randomness
from desam_nnunet.pretraining.shapes import draw_labels

VERSION = 1  # of what is drawn for a seed and asked about it: a run is not taken up under another


class Generated(NamedTuple):
    """Attributes: images: (B, 1, S, S), 0 to 255. labels: (B, S, S), see :mod:`~desam_nnunet.pretraining.shapes`."""

    images: Tensor
    labels: Tensor


def generate(number: int, size: int, device: torch.device, seed: int, batch: int) -> Generated:
    """One batch. The same arguments draw the same images, on every machine with the same kind of device.

    Args:
        size: Side of the images in pixels, a multiple of 64.
        batch: Number of the batch among those of the seed.
    """
    random = Randomness(device, seed, batch)
    labels = draw_labels(random, number, size)
    return Generated(picture_labels(random, labels), labels)
