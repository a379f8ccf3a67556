"""What the commands' parsers share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Commands = argparse._SubParsersAction
Run = Callable[[argparse.Namespace], int | None]


def add_command(commands: Commands, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    """A command's parser; `run` is called with what was typed, and gives the exit code if it is not 0."""
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def add_device(command: argparse.ArgumentParser) -> None:
    """The flag ``-device``, as nnU-Net has it."""
    command.add_argument("-device", default="cuda", choices=["cuda", "cpu", "mps"], help="default: cuda, as nnU-Net")


def device_named(name: str) -> torch.device:
    """The device that was asked for.

    Raises:
        ValueError: There is none of that name here.
    """
    import torch

    from desam_nnunet.system.machine import check_device

    device = torch.device(name)
    check_device(device)
    return device


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row, whose columns are as wide as their longest text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
