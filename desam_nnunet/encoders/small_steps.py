"""Work in steps whose memory a CPU uses again and keeps in its cache."""

from __future__ import annotations

import torch
from torch import Tensor


def in_small_steps(x: Tensor, devices: tuple[str, ...] = ("cpu",)) -> bool:
    """Whether to compute so: gradients need all memory anyway, and a compiler divides the work itself."""
    wants_gradient = torch.is_grad_enabled() and x.requires_grad
    return x.device.type in devices and not wants_gradient and not torch.compiler.is_compiling()


def join(steps: list[Tensor], dim: int) -> Tensor:
    """One step is handed on as it is: a copy of it would be for nothing."""
    return steps[0] if len(steps) == 1 else torch.cat(steps, dim)
