"""``desam plan``: nnU-Net's plans with our sections, fitted to the data set and to this machine."""

from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset, plan_experiment_dataset
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from desam_nnunet.cache.store import DTYPES, entry_bytes
from desam_nnunet.cache.tiles import tiles_of
from desam_nnunet.config import SECTIONS, check_keys
from desam_nnunet.files import replace_file
from desam_nnunet.machine import memory_limit
from desam_nnunet.planning.choices import (
    Choice,
    choose_batch_size,
    choose_image_size,
    choose_patch,
    choose_schedule,
    choose_storage,
    smaller_image_sizes,
)
from desam_nnunet.planning.memory import Footprint, footprint
from desam_nnunet.planning.presets import read_preset
from desam_nnunet.planning.speed import hours_to_encode
from desam_nnunet.preprocessed import dataset_folder
from desam_nnunet.sam.tiles import intensity_rule
from desam_nnunet.sam.variants import PATCH, VARIANTS, Variant
from desam_nnunet.sam.weights import find_weights, read_sam_file, variant_of

STOCK, DEFAULT_NAME, CONFIGURATION = "nnUNetPlans", "DeSAMPlans", "2d"
_LEVELS = 3  # intermediate outputs that DeSAM reads, beside the neck


@dataclass(frozen=True)
class Wishes:
    """What the user has asked for; None leaves the choice to the planner.

    Attributes:
        memory_target: GB that training may take.
        disk_target: GB that the cache may take.
        encoder: A variant's name or the path of a weights file.
        preset: A name of :func:`~desam_nnunet.planning.presets.preset_names`.
    """

    memory_target: float | None = None
    disk_target: float | None = None
    encoder: str | None = None
    preset: str | None = None


class Facts(NamedTuple):
    """Of the data set: `shapes` are slices, rows and columns of each case at the planned spacing."""

    shapes: list[tuple[int, int, int]]
    divisor: tuple[int, int]
    channels: int
    outputs: int
    schemes: list[str]


class Line(NamedTuple):
    """One row of the table that is printed."""

    key: str
    value: str
    reason: str


def plan_dataset(dataset: str, name: str, wishes: Wishes, device: torch.device) -> tuple[Path, list[Line]]:
    """Writes ``<name>.json`` next to nnU-Net's plans, which are made first if they are missing.

    Returns:
        The file, and every choice with its reason.

    Raises:
        ValueError: A preset or wish that is not valid, or a machine on which nothing fits.
        FileNotFoundError: There is no such data set, or no such weights file.
    """
    preset = read_preset(wishes.preset) if wishes.preset else {}
    if name == STOCK:
        raise ValueError(f"The plans can't be called {STOCK}, which are nnU-Net's own: choose another name.")
    folder = dataset_folder(dataset)
    stock, dataset_json = _stock_plans(folder)
    facts = read_facts(stock, dataset_json, json.loads((folder / "dataset_fingerprint.json").read_text()))
    configuration, lines = choose(facts, wishes, preset, device, _disk(folder, wishes))
    plans = copy.deepcopy(stock)
    plans["plans_name"] = name
    plans["configurations"][CONFIGURATION] |= configuration
    path = folder / f"{name}.json"
    text = json.dumps(plans, indent=4).encode()
    if path.is_file() and path.read_bytes() != text:
        shutil.copyfile(path, folder / f"{name}.json.before")
        lines.append(Line("kept", f"{name}.json.before", "the plans of this name as they were"))
    replace_file(path, [text])
    return path, lines


def read_facts(plans: dict[str, Any], dataset_json: dict[str, Any], fingerprint: dict[str, Any]) -> Facts:
    """What the choices rest on, from nnU-Net's plans and fingerprint."""
    manager = PlansManager(plans)
    configuration = manager.get_configuration(CONFIGURATION)
    order = plans["transpose_forward"]
    shapes = []
    for shape, spacing in zip(fingerprint["shapes_after_crop"], fingerprint["spacings"], strict=True):
        slices, *plane = (shape[axis] for axis in order)
        own = [spacing[axis] for axis in order][1:]
        rows, columns = compute_new_shape(plane, own, configuration.spacing)
        shapes.append((int(slices), int(rows), int(columns)))
    strides = configuration.network_arch_init_kwargs["strides"]
    divisor = [math.prod(int(stride[axis] if isinstance(stride, list | tuple) else stride) for stride in strides)
               for axis in range(2)]
    labels = manager.get_label_manager(dataset_json)
    return Facts(
        shapes, (divisor[0], divisor[1]), determine_num_input_channels(manager, configuration, dataset_json),
        labels.num_segmentation_heads - (not labels.has_regions), configuration.normalization_schemes)


def choose(
    facts: Facts, wishes: Wishes, preset: dict[str, Any], device: torch.device, disk: float
) -> tuple[dict[str, Any], list[Line]]:
    """The 2D configuration's keys that differ from nnU-Net's, and a table of them with reasons.

    What the preset says is taken as it is, what the user says goes before it, and the rest is chosen.
    """
    said = preset.get("sam", {})
    target = wishes.memory_target or preset.get("memory_target")
    memory = Choice(1e9 * target, "as asked") if target else _memory_of(device)
    encoder = _choose_encoder(wishes.encoder or said.get("encoder"), facts, memory.value, device)
    variant = _variant(encoder.value)
    patch = choose_patch([shape[1:] for shape in facts.shapes], facts.divisor, variant.image_size)
    tiles = [len(tiles_of(shape, patch.value)) for shape in facts.shapes]
    image, batch = _fit(facts, variant, patch.value, sum(tiles), memory.value, said.get("image_size"),
                        preset.get("batch_size"), device)
    storage = _storage(facts, variant, image.value, patch.value, sum(tiles), disk, said, device)
    views = storage.value.views
    training = views * sum(tiles) * 4 // 5
    schedule = choose_schedule(training, batch.value)
    sam = {
        "encoder": encoder.value, "image_size": image.value, "intensity": intensity_rule(facts.schemes),
        "features": storage.value.features, "views": views, "cache_dtype": storage.value.dtype,
        "epochs": schedule.value.epochs, "iterations_per_epoch": schedule.value.iterations,
        "val_iterations_per_epoch": schedule.value.val_iterations,
    } | said | ({"encoder": wishes.encoder} if wishes.encoder else {})
    keys: dict[str, Any] = {"patch_size": list(patch.value), "batch_size": batch.value, "sam": sam,
                            "desam": preset.get("desam", {})}
    for name, kind in SECTIONS.items():
        check_keys(name, kind, keys[name])
    lines = [
        Line("memory", f"{memory.value / 1e9:.1f} GB", memory.reason),
        Line("sam.encoder", sam["encoder"], encoder.reason),
        Line("patch_size", " x ".join(map(str, patch.value)), patch.reason),
        Line("sam.image_size", str(sam["image_size"]), image.reason),
        Line("batch_size", str(batch.value), batch.reason),
        Line("sam.intensity", sam["intensity"], f"nnU-Net normalises with {', '.join(sorted(set(facts.schemes)))}"),
        Line("sam.features", sam["features"], storage.reason),
        Line("sam.views", str(sam["views"]), "each augmented once" if sam["views"] > 1 else "as published"),
        Line("sam.cache_dtype", sam["cache_dtype"], "fits on the disk" if sam["features"] == "cached" else "not used"),
        Line("sam.epochs", f"{sam['epochs']} of {sam['iterations_per_epoch']} iterations", schedule.reason),
    ]
    return keys, [line._replace(reason=f"preset {wishes.preset}") if _in_preset(line.key, preset, wishes) else line
                  for line in lines]


def _stock_plans(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """nnU-Net's plans and dataset.json; fingerprint and plans are made by nnU-Net's own functions if missing."""
    number = convert_dataset_name_to_id(folder.name)
    if not (folder / "dataset_fingerprint.json").is_file():
        extract_fingerprint_dataset(number)
    if not (folder / f"{STOCK}.json").is_file():
        plan_experiment_dataset(number)
    plans, dataset_json = (json.loads((folder / file).read_text()) for file in (f"{STOCK}.json", "dataset.json"))
    if CONFIGURATION not in plans["configurations"]:
        raise ValueError(f"{folder / STOCK}.json has no configuration '{CONFIGURATION}': plan again with nnU-Net.")
    return plans, dataset_json


def _disk(folder: Path, wishes: Wishes) -> float:
    """Bytes that the cache may take: what was asked for, else half of what is free."""
    return 1e9 * wishes.disk_target if wishes.disk_target is not None else shutil.disk_usage(folder).free / 2


def _memory_of(device: torch.device) -> Choice[float]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Choice(0.9 * properties.total_memory, f"nine tenths of {properties.name}")
    return Choice(memory_limit() / 2, "half of this machine's memory")


def _variant(encoder: str) -> Variant:
    """The size of an encoder that is given by name or by file."""
    if encoder in VARIANTS:
        return VARIANTS[encoder]
    path = find_weights(encoder)
    assert path is not None  # only a variant can be without a file
    return variant_of(read_sam_file(path), path)


def _choose_encoder(given: str | None, facts: Facts, memory: float, device: torch.device) -> Choice[str]:
    """The largest whose weights are here and that fits; on a CPU none beyond ViT-B, which is slow enough."""
    if given is not None:
        _variant(given)
        return Choice(given, "as asked")
    names = ("vit_h", "vit_l", "vit_b") if device.type == "cuda" else ("vit_b",)
    for name in names:
        variant = VARIANTS[name]
        patch = choose_patch([shape[1:] for shape in facts.shapes], facts.divisor, variant.image_size).value
        size = choose_image_size(patch, variant.image_size).value
        need = footprint(variant, size, patch, facts.outputs, half=device.type == "cuda")
        if _is_here(name) and need.training(2) <= memory:
            return Choice(name, "the largest whose weights are here and that fits")
    if _is_here("vit_b"):
        return Choice("vit_b", "the smallest that is pretrained")
    return Choice("vit_b", "no weights are here: desam weights get vit_b, or --encoder vit_tiny (random)")


def _is_here(name: str) -> bool:
    try:
        return find_weights(name) is not None
    except FileNotFoundError:
        return False


def _fit(
    facts: Facts, variant: Variant, patch: tuple[int, int], tiles: int, memory: float, image_size: int | None,
    batch_size: int | None, device: torch.device,
) -> tuple[Choice[int], Choice[int]]:
    """Input size and batch, of which the preset may give either; a smaller input where two tiles do not fit."""
    first = Choice(image_size, "") if image_size else choose_image_size(patch, variant.image_size)
    sizes = [first.value] if image_size else [first.value, *smaller_image_sizes(first.value)]
    for size in sizes:
        need = footprint(variant, size, patch, facts.outputs, half=device.type == "cuda")
        if batch_size and need.training(batch_size) <= memory:
            batch: Choice[int] | None = Choice(batch_size, "")
        else:
            batch = choose_batch_size(tiles, partial(_fits, need, memory))
        if batch is not None:
            return first if size == first.value else Choice(size, "the largest with which two tiles fit"), batch
    raise ValueError(
        f"Training {variant.name} at {sizes[-1]} on tiles of {patch[0]} x {patch[1]} takes "
        f"{need.training(2) / 1e9:.1f} GB, but {memory / 1e9:.1f} GB are there: give -gpu_memory_target a larger value "
        "or --encoder a smaller encoder."
    )


def _fits(need: Footprint, memory: float, batch_size: int) -> bool:
    return need.training(batch_size) <= memory


def _storage(
    facts: Facts, variant: Variant, image_size: int, patch: tuple[int, int], tiles: int, disk: float,
    said: dict[str, Any], device: torch.device,
) -> Choice[Any]:
    channels = _LEVELS * variant.embed_dim + variant.prompt_dim
    sizes = {dtype: entry_bytes(channels, image_size // PATCH, patch, dtype) for dtype in DTYPES
             if said.get("cache_dtype", dtype) == dtype}
    images = tiles * math.ceil(facts.channels / 3)
    choice = choose_storage(tiles, sizes, disk, hours_to_encode(images, variant, image_size, device))
    if said.get("views"):
        choice = Choice(choice.value._replace(views=said["views"]), choice.reason)
    return choice


def _in_preset(key: str, preset: dict[str, Any], wishes: Wishes) -> bool:
    section, _, name = key.rpartition(".")
    if key == "sam.encoder" and wishes.encoder:
        return False
    return name in (preset.get(section, {}) if section else preset)
