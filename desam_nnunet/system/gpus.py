"""Several GPUs of one machine, shared out among processes."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_VARIABLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus() -> list[str]:
    """By the names that CUDA_VISIBLE_DEVICES has for them. CUDA is not initialised."""
    import torch

    given = os.environ.get(_VARIABLE)
    return given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]


@contextmanager
def one_gpu(folder: Path) -> Iterator[None]:
    """Shows this process one of several GPUs, which no other process has that came here with this folder; all of them
    where each is taken."""
    gpus = visible_gpus()
    for gpu in gpus if len(gpus) > 1 else []:
        lock = FileLock(folder / f"gpu {platform.node()} {gpu}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        os.environ[_VARIABLE] = gpu
        try:
            yield
        finally:
            os.environ[_VARIABLE] = ",".join(gpus)
            lock.release()
        return
    yield
