"""``desam doctor`` and ``desam weights list``: how things stand on this machine, and the remedy for what is wrong."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from desam_nnunet import __version__
from desam_nnunet._startup import VARIABLE, listed_folders, shipped_folder
from desam_nnunet.encoders.precision import dtype_name, encoder_dtype
from desam_nnunet.encoders.registry import ENCODERS, TIMM, EncoderRow
from desam_nnunet.encoders.weights import find_row, find_weights, search_folders, wrong_hash
from desam_nnunet.nnunet.lookup import look_up
from desam_nnunet.nnunet.names import FOLDERS
from desam_nnunet.nnunet.trainer_files import classes_in_folders
from desam_nnunet.system.cores import usable_cores
from desam_nnunet.system.machine import best_device, memory_limit
from desam_nnunet.training.base import SamTrainer
from desam_nnunet.training.registry import TRAINERS


class Finding(NamedTuple):
    """One line of the report; `remedy` is empty where nothing is to be done, `wrong` where something must be."""

    what: str
    state: str
    remedy: str = ""
    wrong: bool = False


def examine() -> Iterator[Finding]:
    """Looks at everything in turn."""
    yield Finding("desam_nnunet", __version__)
    yield from map(_trainer, TRAINERS)
    yield from _others_trainers()
    yield from examine_weights()
    yield _device()
    yield _threads()
    yield Finding("memory", f"{memory_limit() / 2**30:.0f} GiB")
    yield from map(_nnunet_folder, FOLDERS)


def examine_weights() -> Iterator[Finding]:
    """Looks at folders and files of weights: of every encoder with a row of its own, and of timm's that are here."""
    yield from map(_weights_folder, search_folders())
    yield from map(_weights, ENCODERS.values())
    files = {path.stem for folder in search_folders() for path in folder.glob("*.safetensors")}
    for name in sorted(files):
        with contextlib.suppress(ValueError):  # of other files, and of models that no decoder here can read
            yield _weights(find_row(f"{TIMM}{name}"))


def report(findings: Iterable[Finding]) -> int:
    """Prints findings and counts those that are wrong."""
    wrong = 0
    for finding in findings:
        mark = "!!" if finding.wrong else "--" if finding.remedy else "ok"
        print(f"{mark}  {finding.what:<24}{finding.state}")
        if finding.remedy:
            print(f"    {'':<24}-> {finding.remedy}")
        wrong += finding.wrong
    return wrong


def _trainer(name: str) -> Finding:
    try:
        trainer = look_up(name)
    except Exception as error:  # the look-up imports files of others
        folder = shipped_folder("trainers")
        remedy = f"export nnUNet_extTrainer=$nnUNet_extTrainer:{folder}"
        if folder in listed_folders():
            remedy = (f"a file in {os.environ[VARIABLE]} fails to be imported: repair it or take its folder out of "
                      "nnUNet_extTrainer")
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Finding(name, f"not found by nnU-Net: {reason}", remedy, wrong=True)
    return Finding(name, f"{trainer.__module__}.{trainer.__qualname__}")


def _others_trainers() -> Iterator[Finding]:
    """Trainers of this package's kind in the folders that nnU-Net searches."""
    for name in classes_in_folders():
        try:
            trainer = look_up(name)
        except Exception:  # said already of our own, which the same file hides
            continue
        method = getattr(trainer, "method", None)  # a base class has none
        if issubclass(trainer, SamTrainer) and name not in TRAINERS and method is not None:
            yield Finding(name, f"method {method.name}, of a folder in nnUNet_extTrainer")


def _weights_folder(folder: Path) -> Finding:
    if not folder.is_dir():
        return Finding("weights folder", f"{folder} (does not exist)")
    files = sorted(path.name for path in folder.iterdir() if path.suffix in (".pth", ".safetensors"))
    state = f"{folder}: {', '.join(files) or 'no weights file'}"
    if not os.access(folder, os.W_OK):
        return Finding("weights folder", f"{state} (not writable)", "to download, set DESAM_WEIGHTS to another folder")
    return Finding("weights folder", state)


def _weights(row: EncoderRow) -> Finding:
    what = f"weights {row.name}"
    facts = f"{row.architecture.family}, {row.licence}, trained on {row.trained_on}"
    try:
        path = find_weights(row.name)
    except FileNotFoundError:
        return Finding(what, f"not here; {facts}", f"{row.remedy} ({row.megabytes} MB)")
    if path is None:
        return Finding(what, f"RANDOM, not pretrained ({row.random_identity}): to compare with")
    if wrong_hash(path, row):
        return Finding(what, f"{path} is not the published file", f"remove it; {row.remedy}", wrong=True)
    state = f"verified; {row.megabytes} MB" if row.md5 or row.sha256 else "not published with a hash"
    return Finding(what, f"{path}, {state}, {facts}")


def _device() -> Finding:
    device = best_device()
    state = device.type
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        state = f"cuda: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    elif device.type == "cpu":
        state = f"cpu, {usable_cores()} of {os.cpu_count()} cores"
    precision = dtype_name(encoder_dtype(device))
    remedy = "" if device.type == "cuda" else f"add -device {device.type} to nnU-Net's commands"
    return Finding("device", f"{state}; the encoder runs in {precision}", remedy)


def _threads() -> Finding:
    """nnU-Net's own trainers and its prediction compute with a thread for each core of the machine, whatever this
    process may use; this package's trainers and its cache do not."""
    here, usable = os.cpu_count() or 1, usable_cores()
    if usable == here:
        return Finding("threads", f"{here}, one for each core")
    return Finding("threads", f"our training takes {usable}, but nnU-Net's own and its prediction {here}",
                   f"export nnUNet_def_n_proc={usable} OMP_WAIT_POLICY=passive (threads without a core then sleep)")


def _nnunet_folder(variable: str) -> Finding:
    value = os.environ.get(variable)
    if not value:
        return Finding(variable, "not set", f"export {variable}=/where/you/keep/it", wrong=True)
    if not Path(value).is_dir():
        return Finding(variable, f"{value} does not exist", f"mkdir -p {value}", wrong=True)
    if not os.access(value, os.W_OK):
        return Finding(variable, f"{value} is not writable", "choose a folder that you can write", wrong=True)
    return Finding(variable, f"{value}, {shutil.disk_usage(value).free / 1e9:.0f} GB free")
