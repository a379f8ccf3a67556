"""The words of ``desam boxes``."""

from __future__ import annotations

import argparse
from pathlib import Path

from desam_nnunet.commands.words import Commands, add_command, add_device, device_named


def add(commands: Commands) -> None:
    """Adds the command."""
    boxes = add_command(
        commands, "boxes", _run, "evaluate a DBSAMTrainerBoxes model with boxes from the reference")
    boxes.add_argument("model", type=Path, help="model folder, .../DBSAMTrainerBoxes__<plans>__2d")
    boxes.add_argument("-i", type=Path, required=True, metavar="IMAGES", help="folder, as for nnUNetv2_predict")
    boxes.add_argument("-l", type=Path, required=True, metavar="LABELS", help="folder with a reference of every case")
    boxes.add_argument("-o", type=Path, required=True, metavar="OUT", help="folder to write")
    boxes.add_argument("-f", default="0", metavar="FOLD", help="default: 0")
    boxes.add_argument("-chk", default="checkpoint_final.pth", help="default: checkpoint_final.pth")
    add_device(boxes)


def _run(options: argparse.Namespace) -> None:
    from desam_nnunet.evaluation.boxes import NOTE, evaluate_with_boxes
    from desam_nnunet.system.machine import limit_threads

    device = device_named(options.device)
    limit_threads(device)
    dice = evaluate_with_boxes(options.model, options.f, options.chk, options.i, options.l, options.o, device)
    print(f"{NOTE}\nMean Dice with boxes: {dice:.4f}. Everything else: {options.o / 'summary.json'}")
