"""The words of ``desam weights``: encoders' files, and published checkpoints in and out."""

from __future__ import annotations

import argparse
from pathlib import Path

from desam_nnunet.commands.words import Commands, add_command


def add(commands: Commands) -> None:
    """Adds the command with its actions."""
    weights = commands.add_parser("weights", help="encoders' weights files and published checkpoints")
    actions = weights.add_subparsers(required=True, metavar="action")
    add_command(actions, "list", _list, "the encoders: family, licence, what they were trained on, and which are here")
    get = add_command(actions, "get", _get, "download an encoder's published weights, continuing a partial download")
    get.add_argument("encoder", help="vit_b, vit_l, vit_h, mobile_sam or timm/<model>")
    verify = add_command(actions, "verify", _verify, "say what a weights file holds, and whether it is a published one")
    verify.add_argument("file", type=Path)
    load = add_command(
        actions, "import", _import, "turn a published DeSAM or SAMed checkpoint into a model of nnU-Net's")
    load.add_argument("file", type=Path, help="the published checkpoint")
    load.add_argument("-d", required=True, help="data set, name or id: gives labels and geometry")
    load.add_argument("-p", default="nnUNetPlans", help="plans (default: nnUNetPlans)")
    load.add_argument("-c", default="2d", help="configuration (default: 2d)")
    load.add_argument("-tr", help="DeSAMTrainerWholeBox for a whole-box checkpoint of DeSAM (default: from the file)")
    load.add_argument("-o", type=Path, help="model folder to write (default: nnU-Net's own in nnUNet_results)")
    save = add_command(actions, "export", _export, "write a trained SAMed in the published format")
    save.add_argument("model", type=Path, help="model folder, .../SAMedTrainer__<plans>__2d")
    save.add_argument("file", type=Path, help="file to write")
    save.add_argument("-f", default="0", metavar="FOLD", help="default: 0")
    save.add_argument("-chk", default="checkpoint_final.pth", help="default: checkpoint_final.pth")
    slabs = add_command(actions, "expand", _expand, "make a model of slabs from a 2D one, which predicts the same")
    slabs.add_argument("model", type=Path, help="model folder, .../<trainer>__<plans>__2d")


def _list(_: argparse.Namespace) -> None:
    from desam_nnunet.commands.findings import examine_weights, report

    report(examine_weights())


def _get(options: argparse.Namespace) -> None:
    from desam_nnunet.encoders.download import download

    print(f"{download(options.encoder)} is here")


def _verify(options: argparse.Namespace) -> None:
    from desam_nnunet.encoders.weights import describe_file

    print(describe_file(options.file))


def _import(options: argparse.Namespace) -> None:
    from desam_nnunet.published.exchange import import_official

    imported = import_official(options.file, options.d, options.p, options.c, options.tr, options.o)
    print(f"For nnUNetv2_train -tr {imported.trainer} -pretrained_weights: {imported.pretrained}")
    if imported.model is None:
        print("The data set has other classes than the checkpoint, so there is no model folder: fine-tune first.")
    else:
        print(f"For nnUNetv2_predict -tr {imported.trainer} -f all: {imported.model}")
    print(imported.preparation)


def _export(options: argparse.Namespace) -> None:
    from desam_nnunet.published.exchange import export_samed

    export_samed(options.model, options.f, options.chk, options.file)
    print(f"Written to {options.file}")


def _expand(options: argparse.Namespace) -> None:
    from desam_nnunet.training.expand import expand

    print(f"Written to {expand(options.model)}")
