"""``desam plan``: nnU-Net's plans with our sections, fitted to the data set and to this machine."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset, plan_experiment_dataset
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from desam_nnunet.cache.build import usable_bytes
from desam_nnunet.cache.store import open_stores
from desam_nnunet.encoders.weights import find_row, is_here
from desam_nnunet.nnunet.datasets import dataset_folder, open_cases
from desam_nnunet.nnunet.model_folder import read_description
from desam_nnunet.nnunet.names import CONFIGURATION, FOLDS, SPLITS, STOCK_PLANS
from desam_nnunet.planning.choices import Choice, choose_augmentation, choose_schedule
from desam_nnunet.planning.facts import Facts, read_facts
from desam_nnunet.planning.fit import Fit, Machine, choose_encoder
from desam_nnunet.planning.request import Request
from desam_nnunet.planning.resampling import faster_resampling
from desam_nnunet.sam.slabs import SLABS
from desam_nnunet.sam.tiles import intensity_rule
from desam_nnunet.settings.resolve import SAM, check_keys
from desam_nnunet.settings.sections import AS_BEFORE, DTYPES, Method, SamSection
from desam_nnunet.settings.stock import check_stock_plans
from desam_nnunet.settings.unread import refuse_unread_sections
from desam_nnunet.system.files import read_object, replace_file
from desam_nnunet.system.machine import device_is_here, free_memory, memory_limit

_NAME = re.compile(r"\w[\w.-]{,99}", re.ASCII)


class Line(NamedTuple):
    """One row of the table that is printed."""

    key: str
    value: str
    reason: str


class Planned(NamedTuple):
    """Where the plans are, every choice with its reason, and the commands to type next."""

    path: Path
    lines: list[Line]
    commands: list[str]


def plan_dataset(dataset: str, name: str, request: Request, device: torch.device) -> Planned:
    """Writes ``<name>.json`` next to nnU-Net's plans, which are made first if they are missing.

    Raises:
        ValueError: A preset or wish that is not valid, or a machine on which nothing fits.
        FileNotFoundError: There is no such data set, or no such weights file.
    """
    request.check()
    if not _NAME.fullmatch(name):
        raise ValueError(f"-overwrite_plans_name {name!r} is no name of plans: give letters, digits, '_', '-' and '.', "
                         "at most 100, and a letter or digit first.")
    if "encoder" in request.sam:  # preset and encoder are looked up before any long work
        find_row(request.sam["encoder"])
    folder = dataset_folder(dataset)
    path = folder / f"{name}.json"
    before = _plans_to_replace(path)
    plans, dataset_json = _stock_plans(folder)
    facts = read_facts(plans, dataset_json, read_object(folder / "dataset_fingerprint.json"))
    resolved = PlansManager(plans).get_configuration(CONFIGURATION).configuration
    refuse_unread_sections(plans, resolved, CONFIGURATION, request.method)
    machine = _machine(folder, request, device)
    configuration, slab, lines = choose(facts, request, machine)
    plans["plans_name"] = name
    planned = plans["configurations"][CONFIGURATION]
    planned |= configuration | faster_resampling(planned)
    if slab:
        plans["configurations"][SLABS] = slab
    text = json.dumps(plans, indent=4).encode()
    if before is not None and before != text:
        names = (path.with_name(f"{path.name}.before{number}") for number in count(1))
        kept = next(unused for unused in names if not unused.exists())
        replace_file(kept, [before])
        lines.append(Line("kept", kept.name, "the plans of this name as they were"))
    replace_file(path, [text])
    return Planned(path, lines, list(_commands(folder, plans, len(facts.shapes), request, device)))


def choose(facts: Facts, request: Request, machine: Machine) -> tuple[dict[str, Any], dict[str, Any], list[Line]]:
    """The 2D configuration's keys that differ from nnU-Net's, that of slabs, if any, and a table with reasons."""
    fit, why = choose_encoder(facts, request, machine)
    storage, method = fit.storage.value, request.method
    augmentation = choose_augmentation(storage, frozen=method.frozen_features)
    schedule = choose_schedule(fit.tiles * (FOLDS - 1) // FOLDS, storage.views, fit.batch.value, method.draws)
    sam: dict[str, Any] = _published_procedure(SAM) | {
        "encoder": fit.encoder, "image_size": fit.image.value, "intensity": intensity_rule(list(facts.schemes)),
        "features": storage.features, "views": storage.views, "cache_dtype": storage.dtype,
        "augmentation": augmentation.value, **schedule.value._asdict(),
        **({"view_geometry": "case"} if fit.slab and storage.views > 1 else {}),
    } | {key: value for key, value in request.sam.items() if key not in ("encoder", "image_size", "views")}
    section = _published_procedure(method) | request.fragment.get(method.name, {})
    if fit.checkpointing:
        section["checkpointing"] = True
    check_keys("sam", SamSection, sam)
    check_keys(method.name, method.section, section)
    lines = [
        Line("memory", f"{machine.memory.value / 1e9:.1f} GB", machine.memory.reason),
        Line("sam.encoder", Path(sam["encoder"]).name, why),
        Line("patch_size", " x ".join(map(str, fit.patch.value)), fit.patch.reason),
        Line("sam.image_size", str(sam["image_size"]), fit.image.reason),
        Line("batch_size", str(fit.batch.value), fit.batch.reason),
        Line("sam.intensity", sam["intensity"], f"nnU-Net normalises with {', '.join(sorted(set(facts.schemes)))}"),
        Line("sam.features", sam["features"], fit.storage.reason),
        Line("sam.views", str(sam["views"]), "augmented, but for the first" if sam["views"] > 1 else "as published"),
        Line("sam.augmentation", sam["augmentation"], augmentation.reason),
        Line("sam.cache_dtype", sam["cache_dtype"], "not used" if sam["features"] == "online" else
             "the more exact" if sam["cache_dtype"] == DTYPES[0] else "half as large"),
        Line("sam.epochs", f"{sam['epochs']} of {sam['iterations_per_epoch']} iterations",
             f"preset {request.preset}" if "iterations_per_epoch" in request.sam else schedule.reason),
    ]
    if not method.frozen_features:
        lines.append(Line(
            f"{method.name}.checkpointing", str(fit.checkpointing).lower(),
            "saves memory, which would hold too few tiles without" if fit.checkpointing else
            "what a step keeps fits into the memory"))
    configuration = {"patch_size": list(fit.patch.value), "batch_size": fit.batch.value, "sam": sam,
                     method.name: section}
    return configuration, _slabs(fit, lines), lines


def _slabs(fit: Fit, lines: list[Line]) -> dict[str, Any]:
    """The configuration of neighbouring slices, and its line; nothing where there are none."""
    if fit.slab is None:
        return {}
    (depth, batch_size), reason = fit.slab.value, fit.slab.reason
    lines.append(Line(SLABS, f"{depth} slices, {batch_size} slab(s) a batch", reason))
    return {"inherits_from": CONFIGURATION, "patch_size": [depth, *fit.patch.value], "batch_size": batch_size}


def _published_procedure(method: Method) -> dict[str, Any]:
    """The keys whose absence would mean what happened before they existed, with today's defaults."""
    return {row.name: row.default for row in fields(method.section) if AS_BEFORE in row.metadata}


def _memory(request: Request, device: torch.device) -> Choice[float]:
    """Bytes that training may take."""
    if request.memory_target is not None:
        return Choice(1e9 * request.memory_target, "as asked")
    if "memory_target" in request.fragment:
        return Choice(1e9 * request.fragment["memory_target"], f"preset {request.preset}")
    if device.type != "cuda":
        return Choice(memory_limit() / 2, "half of this machine's memory")
    if not device_is_here(device):
        raise ValueError("PyTorch finds no cuda device here: say what it will have with -gpu_memory_target, or add "
                         "-device cpu.")
    return Choice(0.9 * free_memory(device), f"nine tenths of what is free on {torch.cuda.get_device_name(device)}")


def _machine(folder: Path, request: Request, device: torch.device) -> Machine:
    """What training and its cache may take here; half of the free disk, unless told otherwise."""
    free, stored = usable_bytes(folder), Counter[str]()
    for store in open_stores(folder):
        stored[store.recipe.encoder] += store.size()

    def allowed(size: float) -> float:
        return size / 2 if request.disk_target is None else min(size, 1e9 * request.disk_target)

    more = {encoder: allowed(free + size) - allowed(free) for encoder, size in stored.items()}
    return Machine(_memory(request, device), allowed(free), device, more)


def _stock_plans(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """nnU-Net's plans and dataset.json; fingerprint and plans are made by nnU-Net's own functions if missing."""
    number = convert_dataset_name_to_id(folder.name)
    if not (folder / "dataset_fingerprint.json").is_file():
        extract_fingerprint_dataset(number)
    if not (folder / f"{STOCK_PLANS}.json").is_file():
        if get_allowed_n_proc_DA() < 1:
            raise ValueError("nnU-Net has not planned this data set, and its planner needs a worker, but "
                             "nnUNet_n_proc_DA is 0: set it to 1 for this command.")
        plan_experiment_dataset(number)
    plans, dataset_json = read_description(folder, STOCK_PLANS)
    check_stock_plans(plans, CONFIGURATION)
    return plans, dataset_json


def _plans_to_replace(path: Path) -> bytes | None:
    """The plans of this name, if there are any; refused where they are not ours."""
    if path.stem == STOCK_PLANS or (path.exists() and not _is_ours(path)):
        raise ValueError(f"{path} is not desam plan's to write: choose another name with -overwrite_plans_name.")
    return path.read_bytes() if path.exists() else None


def _is_ours(path: Path) -> bool:
    configurations = read_object(path).get("configurations")
    configuration = configurations.get(CONFIGURATION) if isinstance(configurations, dict) else None
    return isinstance(configuration, dict) and SAM.name in configuration


def _commands(
    folder: Path, plans: dict[str, Any], cases: int, request: Request, device: torch.device
) -> Iterator[str]:
    """What is left to type before training, then training and prediction on the device that was planned for."""
    encoder = plans["configurations"][CONFIGURATION]["sam"]["encoder"]
    name, number = plans["plans_name"], convert_dataset_name_to_id(folder.name)
    if not is_here(encoder):
        yield find_row(encoder).remedy
    if not _is_preprocessed(folder / plans["configurations"][CONFIGURATION]["data_identifier"], cases):
        yield f"nnUNetv2_preprocess -d {number} -plans_name {name} -c {CONFIGURATION}"
    fold = "0" if cases >= FOLDS or (folder / SPLITS).is_file() else "all"
    model = f"-tr {request.trainer.__name__} -p {name}" + ("" if device.type == "cuda" else f" -device {device.type}")
    yield f"nnUNetv2_train {number} {CONFIGURATION} {fold} {model}"
    yield f"nnUNetv2_predict -i images/ -o out/ -d {number} -c {CONFIGURATION} -f {fold} {model}"


def _is_preprocessed(folder: Path, cases: int) -> bool:
    """Whether as many cases as were planned are there."""
    try:
        return len(open_cases(folder).identifiers) >= cases
    except FileNotFoundError:
        return False
