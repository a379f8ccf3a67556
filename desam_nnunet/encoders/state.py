"""Weights files as states: read without running anything in them, and their keys, shapes and values checked."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from desam_nnunet.encoders.base import State
from desam_nnunet.system.files import damage_told

_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COUNTERS = ".num_batches_tracked"  # of batch norms: the only whole numbers that weights files hold


def read_weights(path: Path) -> State:
    """A state dict in PyTorch's format or ``.safetensors``, read without unpickling code.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, no file of weights, or holds something that no weight can be.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file, but a folder or a device: give a weights file.")
    with damage_told(f"{path} can't be read as weights", ": it is truncated or not a weights file. Fetch it again"):
        is_safe = path.suffix == ".safetensors"
        state = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise ValueError(f"{path} does not hold a state dict (names to tensors) as SAM's files do.")
    return state


def check_state(state: State, expected: dict[str, torch.Size], what: str) -> None:
    """Compares every key and shape, then looks at the values.

    Raises:
        ValueError: Naming up to three keys that are missing, unknown or misshapen, or else whose values are no weights.
    """
    problems = [f"{key} is missing" for key in expected if key not in state]
    problems += [f"{key!r} is unknown" for key in state if key not in expected]
    problems += [f"{key} is {tuple(state[key].shape)}, not {tuple(shape)}" for key, shape in expected.items()
                 if key in state and state[key].shape != shape]
    problems = problems or [f"{key} {wrong}" for key, value in state.items() if (wrong := _wrong_values(key, value))]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{what}: {'; '.join(problems[:3])}{more}.")


def _wrong_values(key: str, value: Tensor) -> str:
    """What keeps a tensor from being a weight; empty where nothing does."""
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        return "is sparse, quantised or without values, but must hold every number"
    if key.endswith(_COUNTERS) and value.dtype == torch.int64:
        return ""
    if value.dtype not in _REAL:
        return f"is of type {str(value.dtype).removeprefix('torch.')}, but must hold real numbers"
    return "" if torch.isfinite(value.float()).all() else "holds NaN or infinite values, or such beyond float32"
