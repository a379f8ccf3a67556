"""The words of ``desam doctor``."""

from __future__ import annotations

import argparse

from desam_nnunet.commands.words import Commands, add_command


def add(commands: Commands) -> None:
    """Adds the command."""
    add_command(commands, "doctor", _run, "say how trainers, weights, device and folders stand, and what to do")


def _run(_: argparse.Namespace) -> int:
    from desam_nnunet.commands.findings import examine, report

    wrong = report(examine())
    print(f"{wrong} thing(s) marked !! must be mended first." if wrong else "Nothing is wrong.")
    return 1 if wrong else 0
