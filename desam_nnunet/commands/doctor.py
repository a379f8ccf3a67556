"""The words of ``desam doctor``."""

from __future__ import annotations

import argparse

from desam_nnunet.commands.words import Commands, add_command


def add(commands: Commands) -> None:
    """Adds the command."""
    add_command(commands, "doctor", _run, "say how trainers, weights, device and folders stand, and what to do")


def _run(_: argparse.Namespace) -> int:
    from desam_nnunet.commands.findings import report

    return 1 if report() else 0
