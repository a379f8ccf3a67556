"""The ``desam`` command. What it does lives elsewhere; here are its words."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from desam_nnunet import __version__
from desam_nnunet._startup import trainers_folder
from desam_nnunet.commands.cross_site import add_arguments as add_cross_site
from desam_nnunet.commands.pretrain import add_arguments as add_pretrain

if TYPE_CHECKING:
    import torch


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; bad input ends in one sentence on stderr and exit code 1."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"desam: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="desam", description="Segment Anything inside nnU-Net.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    _add(commands, "doctor", _doctor, "say how trainers, weights, device and folders stand, and what to do")
    _add(commands, "trainers", _trainers, "print the folder for the environment variable nnUNet_extTrainer")
    _add_plan(_add(commands, "plan", _plan, "fit nnU-Net's plans to the data set and this machine"))
    _add_cache(_add(commands, "cache", _cache, "encode a data set once, so that training reads features from disk"))
    _add_boxes(_add(commands, "boxes", _boxes, "evaluate a DBSAMTrainerBoxes model with boxes from the reference"))
    add_cross_site(_add(commands, "cross-site", _cross_site, "train at each site, test at the others, report"))
    add_pretrain(_add(commands, "pretrain", _pretrain, "pretrain a small encoder on generated images"))
    weights = commands.add_parser("weights", help="SAM's weights files and published checkpoints")
    _add_weights(weights.add_subparsers(required=True, metavar="action"))
    return parser


def _add(commands: argparse._SubParsersAction, name: str, run: object, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def _add_weights(actions: argparse._SubParsersAction) -> None:
    _add(actions, "list", _list, "the encoders, and which weights are here")
    get = _add(actions, "get", _get, "download an encoder's published weights, continuing a partial download")
    get.add_argument("encoder", help="vit_b, vit_l or vit_h")
    verify = _add(actions, "verify", _verify, "say what a weights file holds, and whether it is a published one")
    verify.add_argument("file", type=Path)
    load = _add(actions, "import", _import, "turn a published DeSAM or SAMed checkpoint into a model of nnU-Net's")
    load.add_argument("file", type=Path, help="the published checkpoint")
    load.add_argument("-d", required=True, help="data set, name or id: gives labels and geometry")
    load.add_argument("-p", default="nnUNetPlans", help="plans (default: nnUNetPlans)")
    load.add_argument("-c", default="2d", help="configuration (default: 2d)")
    load.add_argument("-tr", help="DeSAMTrainerWholeBox for a whole-box checkpoint of DeSAM (default: from the file)")
    load.add_argument("-o", type=Path, help="model folder to write (default: nnU-Net's own in nnUNet_results)")
    save = _add(actions, "export", _export, "write a trained SAMed in the published format")
    save.add_argument("model", type=Path, help="model folder, .../SAMedTrainer__<plans>__2d")
    save.add_argument("file", type=Path, help="file to write")
    save.add_argument("-f", default="0", metavar="FOLD", help="default: 0")
    save.add_argument("-chk", default="checkpoint_final.pth", help="default: checkpoint_final.pth")


def _add_boxes(boxes: argparse.ArgumentParser) -> None:
    boxes.add_argument("model", type=Path, help="model folder, .../DBSAMTrainerBoxes__<plans>__2d")
    boxes.add_argument("-i", type=Path, required=True, metavar="IMAGES", help="folder, as for nnUNetv2_predict")
    boxes.add_argument("-l", type=Path, required=True, metavar="LABELS", help="folder with a reference of every case")
    boxes.add_argument("-o", type=Path, required=True, metavar="OUT", help="folder to write")
    boxes.add_argument("-f", default="0", metavar="FOLD", help="default: 0")
    boxes.add_argument("-chk", default="checkpoint_final.pth", help="default: checkpoint_final.pth")
    boxes.add_argument("-device", default="cuda", choices=["cuda", "cpu", "mps"], help="default: cuda, as nnU-Net")


def _add_cache(cache: argparse.ArgumentParser) -> None:
    cache.add_argument("-d", required=True, help="data set, name or id")
    cache.add_argument("-p", default="nnUNetPlans", help="plans (default: nnUNetPlans)")
    cache.add_argument("-c", default="2d", help="configuration (default: 2d)")
    cache.add_argument("-tr", default="DeSAMTrainer", help="whose augmentation sam.views show (default: DeSAMTrainer)")
    cache.add_argument("-device", default="cuda", choices=["cuda", "cpu", "mps"], help="default: cuda, as nnU-Net")
    cache.add_argument("-num_parts", type=int, default=1, help="share the cases among so many machines or GPUs")
    cache.add_argument("-part_id", type=int, default=0, help="which share this is, from 0")
    other = cache.add_mutually_exclusive_group()
    other.add_argument("--list", action="store_true", help="say which stores there are, and how large")
    other.add_argument("--verify", action="store_true", help="read every byte; remove what is damaged")
    other.add_argument("--delete", nargs="?", const="", metavar="STORE", help="remove one store, or all of them")


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("-d", metavar="DATASET", help="number or name of the data set")
    plan.add_argument("--trainer", default="DeSAMTrainer", metavar="NAME", help="to plan for (default: DeSAMTrainer)")
    plan.add_argument("-gpu_memory_target", type=float, metavar="GB",
                      help="memory that training may take (default: from this machine)")
    plan.add_argument("-disk_target", type=float, metavar="GB",
                      help="what the embedding cache may take (default: half of what is free)")
    plan.add_argument("--encoder", metavar="NAME",
                      help="vit_b, vit_l, vit_h, vit_tiny or a weights file (default: what is here and fits)")
    plan.add_argument("--preset", metavar="NAME", help="settings to start from, see --list")
    plan.add_argument("-overwrite_plans_name", metavar="NAME",
                      help="default: DeSAMPlans, SAMedPlans or DBSAMPlans, by the trainer")
    plan.add_argument("-device", choices=["cuda", "cpu", "mps"], help="to train on (default: cuda where there is one)")
    plan.add_argument("--list", action="store_true", help="list the presets")


def _plan(options: argparse.Namespace) -> int:
    from desam_nnunet.planning.presets import preset_names, read_preset

    if options.list:
        for name in preset_names():
            print(f"{name:<14}{read_preset(name)['description']}")
        return 0
    if options.d is None:
        raise ValueError("Which data set? Give its number or name with -d.")
    import torch

    from desam_nnunet.planning.plan import plan_dataset
    from desam_nnunet.planning.request import Wishes
    from desam_nnunet.settings.sections import METHODS
    from desam_nnunet.training.registry import find_trainer

    trainer = find_trainer(options.trainer)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    wishes = Wishes(options.gpu_memory_target, options.disk_target, options.encoder, options.preset,
                    trainer)
    name = options.overwrite_plans_name or METHODS[trainer.method].plans_name
    planned = plan_dataset(options.d, name, wishes, device)
    for line in planned.lines:
        print(f"{line.key:<17} {line.value:<23} {line.reason}")
    print(f"\nWritten to {planned.path}. Next:")
    for command in planned.commands:
        print(f"    {command}")
    return 0


def _cache(options: argparse.Namespace) -> int:
    from desam_nnunet.cache import manage

    if options.list:
        print("\n".join(manage.describe_stores(options.d)) or "There is no store of this data set.")
    elif options.verify:
        print("\n".join(manage.verify_stores(options.d)) or "There is no store of this data set.")
    elif options.delete is not None:
        for folder in manage.delete_stores(options.d, options.delete or None):
            print(f"Removed {folder}")
    else:
        device = _device(options.device)
        store = manage.build_dataset(
            options.d, options.p, options.c, options.tr, device, options.num_parts, options.part_id)
        print(f"{store.folder}: {store.size() / 1e9:.2f} GB, {len(store.cases())} case(s)")
    return 0


def _boxes(options: argparse.Namespace) -> int:
    from desam_nnunet.evaluation.boxes import NOTE, evaluate_with_boxes

    device = _device(options.device)
    dice = evaluate_with_boxes(options.model, options.f, options.chk, options.i, options.l, options.o, device)
    print(f"{NOTE}\nMean Dice with boxes: {dice:.4f}. Everything else: {options.o / 'summary.json'}")
    return 0


def _cross_site(options: argparse.Namespace) -> int:
    from desam_nnunet.commands.cross_site import run

    _device(options.device)
    return run(options)


def _pretrain(options: argparse.Namespace) -> int:
    from desam_nnunet.commands.pretrain import run

    _device(options.device)
    return run(options)


def _device(name: str) -> torch.device:
    import torch

    from desam_nnunet.system.machine import device_is_here

    device = torch.device(name)
    if not device_is_here(device):
        raise ValueError(f"PyTorch finds no {name} device here: add -device cpu.")
    return device


def _doctor(_: argparse.Namespace) -> int:
    from desam_nnunet.commands.doctor import report

    return 1 if report() else 0


def _trainers(_: argparse.Namespace) -> int:
    print(trainers_folder())
    return 0


def _list(_: argparse.Namespace) -> int:
    from desam_nnunet.commands.doctor import report_weights

    report_weights()
    return 0


def _get(options: argparse.Namespace) -> int:
    from desam_nnunet.encoders.download import download

    print(f"{download(options.encoder)}, verified")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from desam_nnunet.encoders.registry import VARIANTS
    from desam_nnunet.encoders.weights import file_md5, read_sam_file, variant_of

    variant = variant_of(read_sam_file(options.file), options.file)
    md5 = file_md5(options.file)
    known = next((row for row in VARIANTS.values() if row.md5 == md5), None)
    what = "not one of the published SAM files"
    if known is not None:
        what = f"{known.name} of this package" if known.packaged else f"SAM's published {known.name}"
    print(f"{options.file}: {variant.name}, MD5 {md5}, {what}")
    return 0


def _import(options: argparse.Namespace) -> int:
    from desam_nnunet.published.importing import Target, import_official

    imported = import_official(options.file, Target(options.d, options.p, options.c, options.tr), options.o)
    print(f"For nnUNetv2_train -tr {imported.trainer} -pretrained_weights: {imported.pretrained}")
    if imported.model is None:
        print("The data set has other classes than the checkpoint, so there is no model folder: fine-tune first.")
    else:
        print(f"For nnUNetv2_predict -tr {imported.trainer} -f all: {imported.model}")
    print(imported.preparation)
    return 0


def _export(options: argparse.Namespace) -> int:
    from desam_nnunet.published.exporting import export_samed

    export_samed(options.model, options.f, options.chk, options.file)
    print(f"Written to {options.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
