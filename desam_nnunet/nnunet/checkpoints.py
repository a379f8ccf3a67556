"""nnU-Net's checkpoints, read without running code that they may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from desam_nnunet.system.files import damage_told

# What they hold beside tensors and plain Python values: numpy's numbers.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMBERS: list[Any] = [np.dtype, type(np.dtype("float32")), type(np.dtype("float64")),
                       *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]  # 1.x, 2.x


def read_checkpoint(model: Path, fold: str, name: str) -> dict[str, Any]:
    """One fold's checkpoint, on the CPU.

    Args:
        model: nnU-Net's model folder, ``<trainer>__<plans>__<configuration>``.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It can't be read.
    """
    path = model / f"fold_{fold}" / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the model folder, -f and -chk of a trained fold.")
    told = damage_told(f"{path} can't be read as a checkpoint of nnU-Net's")
    with told, torch.serialization.safe_globals(_NUMBERS):
        return torch.load(path, map_location="cpu", weights_only=True)
