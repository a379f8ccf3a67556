"""What this machine, or the part of it that this process may use, has."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from desam_nnunet.system.cores import usable_cores

_UNLIMITED = 2**60  # control groups without a limit say "max" or a number above this


def device_is_here(device: torch.device) -> bool:
    """Whether PyTorch can compute on a CPU, CUDA or MPS device of this machine."""
    if device.type == "cuda":
        return torch.cuda.is_available()
    return device.type == "cpu" or torch.backends.mps.is_available()


def best_device() -> torch.device:
    """The fastest kind that is here."""
    return next(filter(device_is_here, map(torch.device, ("cuda", "mps", "cpu"))))


def check_device(device: torch.device) -> None:
    """Refuses a device that is not here, before nnU-Net makes folders.

    Raises:
        ValueError: Naming it, and what to do.
    """
    if not device_is_here(device):
        raise ValueError(f"PyTorch finds no {device.type} device here: add -device cpu to go on without a GPU, or "
                         "install PyTorch for your GPU.")


def limit_threads(device: torch.device) -> None:
    """On a CPU, no more threads than usable cores: nnU-Net takes as many as the machine has, and they would wait."""
    if device.type == "cpu":
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))


def memory_limit() -> int:
    """Bytes of main memory that this process may use: the machine's, or its control group's limit."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _groups())])


def free_memory(device: torch.device) -> int:
    """Bytes that a process could still take on `device`; main memory for every device but CUDA."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    return min([psutil.virtual_memory().available, *(limit - used for limit, used in _groups())])


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held: of the GPU on a CUDA device, else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # not getrusage, which keeps the peak of the process that started this one
        return 1024 * int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")))
    memory: Any = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What times and memory depend on."""
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)  # empty where PyTorch is too old to tell
    cpu = capabilities().get("cpu_name", platform.processor() or "CPU")
    description = {
        "device": f"{cpu}, {torch.backends.cpu.get_cpu_capability()}", "threads": torch.get_num_threads(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(), "torch": torch.__version__,
    }
    if device.type == "cuda":
        description |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return description


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
            limit = _numbers(folder / limit_file).get("", _UNLIMITED)
            if limit < _UNLIMITED:
                used = _numbers(folder / used_file).get("", 0) - _numbers(folder / "memory.stat").get(cached, 0)
                yield limit, max(0, used)


def _numbers(file: Path) -> dict[str, int]:
    """The number of each line by the word before it, which is empty where there is none."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return {name: int(number) for name, _, number in (line.rpartition(" ") for line in lines) if number.isdigit()}
