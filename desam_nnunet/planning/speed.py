"""About how long encoding takes here: operations, counted, over the rate of a matrix product, measured."""

from __future__ import annotations

import time
from functools import cache

import torch

from desam_nnunet.encoders.base import Architecture
from desam_nnunet.encoders.precision import encoder_dtype
from desam_nnunet.system.machine import device_is_here

_SHARE = 0.6  # of the rate of a large matrix product that the encoder reaches; 0.8 was measured on a CPU
_SIDE = {"cpu": 1024, "cuda": 8192, "mps": 2048}
_NOMINAL = {"cuda": 5e13, "mps": 5e12}  # of a device that is planned for, but is not here


def hours_to_encode(images: int, architecture: Architecture, image_size: int, device: torch.device) -> float:
    """That encoding `images` images takes."""
    return images * architecture.operations(image_size) / (_SHARE * matrix_rate(device)) / 3600


@cache
def matrix_rate(device: torch.device) -> float:
    """Operations per second of a large matrix product in the encoder's precision, the best of three."""
    if not device_is_here(device):
        return _NOMINAL[device.type]
    side = _SIDE[device.type]
    matrix = torch.ones(side, side, dtype=encoder_dtype(device), device=device)
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return 2 * side**3 / min(seconds[1:])
