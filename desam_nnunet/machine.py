"""What this machine, or the part of it that this process may use, has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

_UNLIMITED = 2**60  # control groups without a limit say "max" or a number above this


def memory_limit() -> int:
    """Bytes of main memory that this process may use: the machine's, or its control group's limit."""
    return min([psutil.virtual_memory().total, *_group_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def free_memory(device: torch.device) -> int:
    """Bytes that a process could still take on `device`; main memory for every device but CUDA."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    return min(psutil.virtual_memory().available, memory_limit() - psutil.Process().memory_info().rss)


def _group_limits(membership: Path, root: Path) -> Iterator[int]:
    """The memory limits of the process's control group and those above it, versions 1 and 2; none elsewhere."""
    lines = membership.read_text().splitlines() if membership.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        name = "memory/memory.limit_in_bytes" if controllers else "memory.max"
        folder, _, file = name.rpartition("/")
        group = Path(path.lstrip("/"))
        for level in (group, *group.parents):
            limit = root / folder / level / file
            text = limit.read_text().strip() if limit.is_file() else ""
            if text.isdigit() and int(text) < _UNLIMITED:
                yield int(text)
