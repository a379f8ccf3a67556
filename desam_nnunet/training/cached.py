"""From a trainer to its embedding cache: the recipe, the build before the first epoch, the loaders."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from desam_nnunet.cache.build import build, plan_build
from desam_nnunet.cache.loader import CachedLoader
from desam_nnunet.cache.store import CaseRecord, Recipe, Store
from desam_nnunet.cache.tiles import STEP, content_of
from desam_nnunet.config import SamSection
from desam_nnunet.machine import free_memory

if TYPE_CHECKING:
    from desam_nnunet.training.base import FrozenSamTrainer

_RAM_SHARE = 2  # a store is kept in memory if it takes at most one part in so many of what is free
_WAIT = 5.0  # seconds between two looks at what another process builds


def recipe_of(configuration: ConfigurationManager, sam: SamSection, network: Any, device: torch.device) -> Recipe:
    """What the features of this configuration are made of, on this device."""
    height, width = configuration.patch_size
    return Recipe(
        data_identifier=configuration.data_identifier, encoder=sam.encoder, identity=sam.identity,
        image_size=sam.image_size, intensity=sam.intensity, window=network.to_image.window,
        patch_size=(int(height), int(width)), step=STEP, views=1, dtype=sam.cache_dtype,
        precision=str(network.encoder.precision(device)).removeprefix("torch."),
    )


def build_missing(
    store: Store, dataset: nnUNetBaseDataset, cases: list[str], network: Any, device: torch.device
) -> None:
    """Says what is missing and what it takes, then encodes it."""
    plan = plan_build(store, dataset, cases, network)
    if plan.todo:
        print(f"Embedding cache {store.folder}: {plan.tiles} tiles of {len(plan.todo)} case(s) to encode, about "
              f"{plan.needed / 1e9:.2f} GB ({plan.free / 1e9:.1f} GB free).", flush=True)
        build(store, dataset, plan, network, device)


def cached_loaders(trainer: FrozenSamTrainer) -> tuple[CachedLoader, CachedLoader]:
    """Loaders of training and validation, after everything that they need has been encoded."""
    network = trainer.bare_network
    recipe = recipe_of(trainer.configuration_manager, trainer.sam, network, trainer.device)
    store = Store(Path(trainer.preprocessed_dataset_folder_base), recipe)
    datasets = trainer.get_tr_and_val_datasets()
    rank, ranks = _place_among_processes()
    network.eval()
    records = []
    for dataset in datasets:
        build_missing(store, dataset, dataset.identifiers[rank::ranks], network, trainer.device)
    for dataset in datasets:
        records.append({case: _await(store, dataset, case) for case in dataset.identifiers})
    cases = set(records[0]) | set(records[1])
    needed = sum(path.stat().st_size for case in cases for path in (store.folder / case).iterdir())
    in_memory = needed * ranks <= free_memory(torch.device("cpu")) // _RAM_SHARE
    trainer.print_to_log_file(
        f"Embedding cache {store.folder}: {needed / 1e9:.2f} GB of {len(cases)} case(s), "
        f"{'kept in memory' if in_memory else 'read from disk'}.")
    manager = trainer.label_manager
    transforms = trainer.get_validation_transforms(
        None, foreground_labels=manager.foreground_labels,
        regions=manager.foreground_regions if manager.has_regions else None, ignore_label=manager.ignore_label)
    training, validation = (
        CachedLoader(
            store, rows, label_manager=manager, batch_size=trainer.batch_size,
            oversample=trainer.oversample_foreground_percent, probabilistic=trainer.probabilistic_oversampling,
            transforms=transforms, workers=get_allowed_n_proc_DA(), pin_memory=trainer.device.type == "cuda",
            in_memory=in_memory)
        for rows in records
    )
    return training, validation


def _await(store: Store, dataset: nnUNetBaseDataset, case: str) -> CaseRecord:
    """The case's record; where another process of this training builds it, as soon as it is there."""
    content = content_of(Path(dataset.source_folder), case)
    while (record := store.complete(case, content)) is None:
        time.sleep(_WAIT)
    return record


def _place_among_processes() -> tuple[int, int]:
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
