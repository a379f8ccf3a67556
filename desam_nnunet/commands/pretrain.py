"""The words of ``desam pretrain``. Importing this module imports nothing heavy."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from desam_nnunet.commands.words import Commands, add_command, device_named


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(commands, "pretrain", _run, "pretrain a small encoder on generated images")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the run, new or to go on with")
    parser.add_argument("--encoder", help="size, whose random weights are the start (default: vit_tiny)")
    parser.add_argument("--images", type=int, help="generated in all (default: 200000)")
    parser.add_argument("--batch-size", type=int, help="images of a step (default: 16)")
    parser.add_argument("--prompts", type=int, help="points for each image, and as many boxes (default: 4)")
    parser.add_argument("--lr", type=float, help="highest learning rate (default: 0.001)")
    parser.add_argument("--regions", type=float, help="weight of the descriptions of regions (default: 1)")
    parser.add_argument("--seed", type=int, help="of images and prompts (default: 0)")
    parser.add_argument("--minutes", type=float, default=math.inf,
                        help="put the run down after so many; the same command goes on")
    parser.add_argument("-device", default="cuda", choices=["cuda", "cpu"], help="default: cuda, as nnU-Net")


def _run(options: argparse.Namespace) -> None:
    from dataclasses import fields

    from desam_nnunet.pretraining.recipe import Recipe
    from desam_nnunet.pretraining.run import pretrain
    from desam_nnunet.system.machine import limit_threads

    if not options.minutes > 0:
        raise ValueError(f"--minutes is {options.minutes}, but must be a positive number.")
    settings = {field.name: value for field in fields(Recipe)
                if (value := getattr(options, field.name)) is not None}
    device = device_named(options.device)
    limit_threads(device)
    weights = pretrain(options.folder, Recipe(**settings), device, minutes=options.minutes)
    if weights is not None:
        print(f'To train on it: "sam": {{"encoder": "{weights.resolve()}"}} in the plans, or desam plan --encoder.')
