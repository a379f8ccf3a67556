"""The ``desam`` command. What it does lives elsewhere; each command's words are in a file of its own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from desam_nnunet import __version__
from desam_nnunet.commands import boxes, cache, cross_site, doctor, plan, pretrain, trainers, weights
from desam_nnunet.system.files import told


def parser() -> argparse.ArgumentParser:
    """Of all commands."""
    made = argparse.ArgumentParser(prog="desam", description="Frozen foundation encoders inside nnU-Net.")
    made.add_argument("--version", action="version", version=__version__)
    commands = made.add_subparsers(required=True, metavar="command")
    for module in (doctor, trainers, plan, cache, boxes, cross_site, pretrain, weights):
        module.add(commands)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; bad input ends in one sentence on stderr and 1."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, OSError, RuntimeError) as error:
        print("desam: " + "\n".join(map(told, str(error).expandtabs().splitlines())), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
