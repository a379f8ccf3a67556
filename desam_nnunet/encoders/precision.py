"""In which precision the frozen encoder computes on a device."""

from __future__ import annotations

import torch

# What torch.cpu.get_capabilities() calls bfloat16 products that are faster than float32's: x86, then ARM. Those of
# AVX-512 alone are not, measured on an Intel Xeon: half to seven tenths as fast (docs/performance.md).
_BFLOAT16 = ("amx_bf16", "bf16", "sve_bf16")


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` rather than ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


@torch.compiler.disable
def encoder_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device is faster in it, float16 on older CUDA devices, float32 elsewhere."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # an older PyTorch does not tell
    is_faster = device.type == "cpu" and any(capabilities.get(name) for name in _BFLOAT16)
    return torch.bfloat16 if is_faster else torch.float32
