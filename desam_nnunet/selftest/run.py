"""All checks of the self-test in turn, and the verdict."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version

import torch

from desam_nnunet import __version__
from desam_nnunet.selftest.attention import check_attention
from desam_nnunet.selftest.encoders import check_encoders
from desam_nnunet.selftest.rows import Row
from desam_nnunet.selftest.speed import check_memory, check_speed
from desam_nnunet.selftest.trainers import check_trainer
from desam_nnunet.system.machine import describe_machine
from desam_nnunet.training.registry import TRAINERS

Check = Callable[[torch.device], Iterator[Row]]
CHECKS: dict[str, Check] = {
    "attention": check_attention, "encoders": check_encoders,
    **{name: partial(check_trainer, name) for name in TRAINERS},
    "speed": check_speed, "memory": check_memory,
}
_PACKAGES = ("nnunetv2", "timm", "segment-anything")
_CUDNN = "TORCH_CUDNN_SDPA_DEPRIORITIZED=1"


def run_checks(device: torch.device, checks: Mapping[str, Check] | None = None) -> Iterator[Row]:
    """Every row as soon as it is known. A check that ends in an error is a row that did not pass."""
    with exact_products(), torch.random.fork_rng():
        torch.manual_seed(0)
        for name, check in (checks or CHECKS).items():
            try:
                yield from check(device)
            except Exception as error:  # whatever a driver may say
                yield Row(name, f"{type(error).__name__}: {error}".splitlines()[0], False)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Convolutions in float32 keep all their digits on a GPU, where cuDNN would drop 13 bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def header(device: torch.device) -> str:
    """Versions and machine."""
    machine = describe_machine(device) | {name: version(name) for name in _PACKAGES}
    return (f"desam_nnunet {__version__}, self-test on {device.type}\n"
            + ", ".join(f"{key} {value}" for key, value in machine.items()))


def table_line(row: Row) -> str:
    return f"{'ok' if row.passed else '!!'}  {row.what:<52}{row.result}"


def verdict(rows: Sequence[Row], device: torch.device) -> str:
    """One sentence; two where there is something to try."""
    wrong = [row for row in rows if not row.passed]
    if not wrong:
        return f"All {len(rows)} checks passed on {device.type}."
    text = f"{len(wrong)} of {len(rows)} checks FAILED on {device.type}: don't trust results from this device."
    if device.type == "cuda" and any(row.what.startswith("attention") for row in wrong):
        text += f" Try again with {_CUDNN} in the environment: cuDNN's attention has known faults on some GPUs."
    return text
