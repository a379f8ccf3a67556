"""One encoder of each family, with random weights, on a device against float32 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from desam_nnunet.encoders.base import Encoder
from desam_nnunet.encoders.random_weights import RANDOM_IDENTITY
from desam_nnunet.encoders.weights import find_row
from desam_nnunet.selftest.rows import Row, compared, precisions

_NAMES = ("vit_tiny", "mobile_sam", "timm_random/test_vit")
_SIZE = 256


def check_encoders(device: torch.device) -> Iterator[Row]:
    """Every family in every precision."""
    for name in _NAMES:
        architecture = find_row(name).architecture
        encoder = architecture.load(architecture.random_state(), _SIZE, RANDOM_IDENTITY).encoder
        for dtype in precisions(device):
            yield compare_encoder(name, copy.deepcopy(encoder).to(device), encoder, device, dtype)


def compare_encoder(
    name: str, ours: Encoder, reference: Encoder, device: torch.device, dtype: torch.dtype
) -> Row:
    """All maps of a random image, those of `reference` in float32."""
    images = torch.randn(1, 3, _SIZE, _SIZE)
    reference.dtype, ours.dtype = torch.float32, dtype
    expected, found = reference(images), ours(images.to(device))
    return compared(f"encoder {name}", found.tensors, expected.tensors, dtype)
