"""In which precision the frozen encoder computes on a device."""

from __future__ import annotations

import torch

# What torch.cpu.get_capabilities() calls native bfloat16 products: x86, then ARM.
_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


@torch.compiler.disable
def encoder_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has it natively, float16 on older CUDA devices, float32 elsewhere."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu" and any(_cpu_capabilities().get(name) for name in _BFLOAT16):
        return torch.bfloat16
    return torch.float32


def _cpu_capabilities() -> dict[str, object]:
    """Empty where PyTorch is too old to tell."""
    tell = getattr(torch.cpu, "get_capabilities", dict)
    return dict(tell())
