"""A line of the self-test, and when two results are the same."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from desam_nnunet.encoders.precision import dtype_name, encoder_dtype

# Largest error |x - y| / |y| of a result in this type; another answer than the right one is off by about 1.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class Row(NamedTuple):
    """What was done, what came out, and whether that is right."""

    what: str
    result: str
    passed: bool = True


def compared(what: str, found: Iterable[Tensor], expected: Iterable[Tensor], dtype: torch.dtype) -> Row:
    """Whether each tensor is its counterpart, as far as `dtype` allows."""
    worst = max(relative_error(one, other) for one, other in zip(found, expected, strict=True))
    allowed = TOLERANCES[dtype]
    return Row(f"{what}, {dtype_name(dtype)}", f"off by {worst:.1e}, allowed {allowed:.0e}", worst <= allowed)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|x - y| / |y| in float32; infinite where a value is not finite."""
    x, y = (tensor.detach().float().cpu() for tensor in (found, expected))
    error = float((x - y).norm() / y.norm())
    return error if math.isfinite(error) else math.inf


def precisions(device: torch.device) -> list[torch.dtype]:
    """That encoders compute in on devices of this kind, float32 first."""
    if device.type == "mps":
        return [torch.float32]
    if device.type == "cpu":
        return [torch.float32, torch.bfloat16]
    return list(dict.fromkeys([torch.float32, torch.float16, encoder_dtype(device)]))


def in_precision(device: torch.device, dtype: torch.dtype) -> torch.autocast | contextlib.nullcontext[None]:
    """Autocast to `dtype`; nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


@contextlib.contextmanager
def hushed() -> Iterator[io.StringIO]:
    """What nnU-Net prints in this block is kept, not shown."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said
