"""What this machine, or the part of it that this process may use, has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

_UNLIMITED = 2**60  # control groups without a limit say "max" or a number above this


def device_is_here(device: torch.device) -> bool:
    """Whether PyTorch can compute on a CPU, CUDA or MPS device of this machine."""
    if device.type == "cuda":
        return torch.cuda.is_available()
    return device.type == "cpu" or torch.backends.mps.is_available()


def memory_limit() -> int:
    """Bytes of main memory that this process may use: the machine's, or its control group's limit."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _groups())])


def free_memory(device: torch.device) -> int:
    """Bytes that a process could still take on `device`; main memory for every device but CUDA."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    return min([psutil.virtual_memory().available, *(limit - used for limit, used in _groups())])


def _groups(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[tuple[int, int]]:
    """Limit and use of the process's control group and those above it that have a limit; none where there are none.

    File caches count as free: the system gives them up.
    """
    for line in membership.read_text().splitlines() if membership.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        kind, limit_file, used_file, cached = (
            ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file") if controllers
            else ("", "memory.max", "memory.current", "inactive_file")
        )
        group = Path(path.lstrip("/"))
        for level in (group, *group.parents):
            folder = root / kind / level
            limit = _number(folder / limit_file)
            if limit is not None and limit < _UNLIMITED:
                used = (_number(folder / used_file) or 0) - _statistic(folder / "memory.stat", cached)
                yield limit, max(0, used)


def _number(file: Path) -> int | None:
    text = file.read_text().strip() if file.is_file() else ""
    return int(text) if text.isdigit() else None


def _statistic(file: Path, name: str) -> int:
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)
