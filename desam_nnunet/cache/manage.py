"""``desam cache``: builds, lists, verifies and deletes the stores of a data set."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from desam_nnunet.cache.build import Share
from desam_nnunet.cache.entry import DamagedEntryError
from desam_nnunet.cache.store import Store, open_stores, store_folders
from desam_nnunet.cache.views import not_started
from desam_nnunet.nnunet.datasets import dataset_folder, read_preprocessed
from desam_nnunet.nnunet.lookup import look_up
from desam_nnunet.settings.resolve import read_section, resolve_plans
from desam_nnunet.settings.sections import SamSection
from desam_nnunet.training.cached import augmentation_of, build_missing, recipe_of
from desam_nnunet.training.desam import network_from_plans
from desam_nnunet.training.frozen import FrozenSamTrainer


def build_dataset(
    dataset: str, plans_name: str, configuration_name: str, trainer_name: str, device: torch.device, num_parts: int,
    part_id: int,
) -> Store:
    """Encodes all cases of a data set, or every `num_parts`-th of them; under ``torchrun`` each process its share.

    Args:
        trainer_name: Whose augmentation the views show, where there is more than one.

    Raises:
        ValueError: Bad parts, or plans that are not valid.
        FileNotFoundError: The data set is not preprocessed, or the weights are not here.
        OSError: The disk can't hold it.
    """
    if num_parts == 1 and os.environ.keys() >= {"WORLD_SIZE", "RANK", "LOCAL_RANK"}:  # torchrun's
        num_parts, part_id = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if not 0 <= part_id < num_parts:
        raise ValueError(f"-part_id {part_id} of -num_parts {num_parts} does not exist: parts count from 0.")
    plans, dataset_json, folder = read_preprocessed(dataset, plans_name)
    trainer = _find_trainer(trainer_name)
    resolve_plans(plans, configuration_name, dataset_json, trainer.method)
    manager = PlansManager(plans)
    configuration = manager.get_configuration(configuration_name)
    data_folder = folder / configuration.data_identifier
    if not data_folder.is_dir():
        raise FileNotFoundError(
            f"{data_folder} does not exist: run nnUNetv2_preprocess -d {dataset} -plans_name {plans_name} "
            f"-c {configuration_name} first."
        )
    channels = determine_num_input_channels(manager, configuration, dataset_json)
    outputs = manager.get_label_manager(dataset_json).num_segmentation_heads
    network = network_from_plans(manager, configuration, channels, outputs, whole_box=True).to(device).eval()
    sam = read_section(configuration.configuration, SamSection)
    data = infer_dataset_class(str(data_folder))(str(data_folder))
    augmentation = augmentation_of(not_started(trainer, configuration), sam)
    store = Store(folder, recipe_of(configuration, sam, network, device, augmentation))
    build_missing(store, data, network, device, augmentation, Share(part_id, num_parts))
    return store


def _find_trainer(name: str) -> type[FrozenSamTrainer]:
    found = look_up(name)
    if not issubclass(found, FrozenSamTrainer):
        raise ValueError(f"-tr {name} does not train on a frozen encoder's features, so it has nothing to cache.")
    return found


def describe_stores(dataset: str) -> list[str]:
    """One line per store, and one for each that this version can't read."""
    stores = open_stores(dataset_folder(dataset))
    return _unreadable(dataset, stores) + [
        f"{store.folder.name}: {len(store.cases())} case(s), {store.size() / 1e9:.2f} GB, {store.recipe.encoder} at "
        f"{store.recipe.image_size}, {store.recipe.dtype}, computed in {store.recipe.precision}, "
        f"tiles {store.recipe.patch_size[0]} x {store.recipe.patch_size[1]}, {store.recipe.views} view(s)"
        for store in stores
    ]


def _unreadable(dataset: str, stores: list[Store]) -> list[str]:
    unknown = {path.name for path in store_folders(dataset_folder(dataset))} - {store.folder.name for store in stores}
    return [f"{name}: damaged, or made by another version of desam_nnunet; --delete {name} removes it"
            for name in sorted(unknown)]


def verify_stores(dataset: str) -> list[str]:
    """Reads every byte of every store; what is damaged is removed, to be built again. One line per finding."""
    stores = open_stores(dataset_folder(dataset))
    findings = _unreadable(dataset, stores)
    for store in stores:
        tiles = 0
        for case in store.cases():
            for path in store.entries(case):
                try:
                    store.check(path)
                    tiles += 1
                except DamagedEntryError as error:
                    store.discard_entry(path)
                    findings.append(f"{error} Removed: the next build makes this tile again.")
        findings.append(f"{store.folder.name}: {tiles} tile(s) are as they were written.")
    return findings


def delete_stores(dataset: str, name: str | None) -> list[Path]:
    """Removes the store called `name`, or all of a data set's.

    Raises:
        ValueError: There is none of that name.
    """
    folders = store_folders(dataset_folder(dataset))
    chosen = [folder for folder in folders if name in (None, folder.name)]
    if name is not None and not chosen:
        known = ", ".join(folder.name for folder in folders) or "none"
        raise ValueError(f"There is no store '{name}' of {dataset_folder(dataset).name}; there are: {known}.")
    for folder in chosen:
        shutil.rmtree(folder)
    return chosen
