"""From a trainer to its embedding cache: the recipe, the build before the first epoch, the loaders."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from desam_nnunet.cache.build import Share, build, plan_build, seconds_of
from desam_nnunet.cache.entry import DamagedEntryError
from desam_nnunet.cache.loader import CachedLoader
from desam_nnunet.cache.store import CaseRecord, Recipe, Store, open_stores
from desam_nnunet.cache.tiles import STEP, content_of
from desam_nnunet.cache.views import Augmentation
from desam_nnunet.encoders.registry import ENCODERS, row_by_name
from desam_nnunet.networks.frame import FrozenSamNetwork
from desam_nnunet.settings.sections import SamSection
from desam_nnunet.system.machine import free_memory

if TYPE_CHECKING:
    from desam_nnunet.training.frozen import FrozenSamTrainer

_RAM_SHARE = 2  # a store is kept in memory if it takes at most one part in so many of what is free
_WAIT = 5.0  # seconds between two looks at what another process builds


def augmentation_of(trainer: nnUNetTrainer, sam: SamSection) -> Augmentation | None:
    """How the views after the first are made, if there are any."""
    return Augmentation(trainer) if sam.views > 1 else None


def recipe_of(
    configuration: ConfigurationManager, sam: SamSection, network: FrozenSamNetwork, device: torch.device,
    augmentation: Augmentation | None,
) -> Recipe:
    """What the features of this configuration are made of, on this device."""
    height, width = configuration.patch_size
    return Recipe(
        data_identifier=configuration.data_identifier, encoder=sam.encoder, identity=sam.identity,
        image_size=sam.image_size, intensity=sam.intensity, window=network.to_image.window,
        patch_size=(int(height), int(width)), step=STEP, views=sam.views,
        augmentation=augmentation.name if augmentation else "", dtype=sam.cache_dtype,
        precision=str(network.encoder.precision(device)).removeprefix("torch."), reads=_reads(sam.encoder, network),
    )


def _reads(encoder: str, network: FrozenSamNetwork) -> str:
    """Empty where the weights alone say it: of encoders of this package's, or files like theirs, as they are."""
    spec, image = network.encoder.spec, network.to_image.spec
    is_known = encoder in ENCODERS or row_by_name(encoder) is None
    return "" if is_known and image == spec.image else hashlib.sha256(f"{spec} {image}".encode()).hexdigest()[:16]


def build_missing(
    store: Store, dataset: nnUNetBaseDataset, network: FrozenSamNetwork, device: torch.device,
    augmentation: Augmentation | None, share: Share,
) -> None:
    """Says what is missing and what it takes, then encodes this process's share of it."""
    plan = plan_build(store, dataset, network, share)
    if plan.tiles:
        for other in _of_other_precision(store):
            print(f"{other.folder.name} has these tiles in {other.recipe.precision}, but the encoder computes in "
                  f"{store.recipe.precision} on this device: they are encoded again.")
        print(f"Embedding cache {store.folder}: {plan.tiles} tiles of {len(plan.todo)} case(s) to encode, about "
              f"{plan.needed / 1e9:.2f} GB ({plan.free / 1e9:.1f} GB free) and "
              f"{_duration(seconds_of(plan, store, network, device))}.", flush=True)
    if plan.todo:  # perhaps only the record of a case whose tiles are all there
        build(store, dataset, plan, network, device, augmentation)


def cached_loaders(trainer: FrozenSamTrainer) -> tuple[CachedLoader, CachedLoader]:
    """Loaders of training and validation, after everything that they need has been encoded.

    Prediction may mirror along the axes that the views were mirrored along, and along none where there is one view.
    """
    network = trainer.bare_network
    augmentation = augmentation_of(trainer, trainer.sam)
    trainer.inference_allowed_mirroring_axes = augmentation.mirror_axes if augmentation else None
    recipe = recipe_of(trainer.configuration_manager, trainer.sam, network, trainer.device, augmentation)
    store = Store(Path(trainer.preprocessed_dataset_folder_base), recipe)
    datasets = trainer.get_tr_and_val_datasets()
    rank, ranks = _place_among_processes()
    network.eval()
    records = []
    _refuse_other_recipes(recipe)
    everything = sorted({case for dataset in datasets for case in dataset.identifiers})
    build_missing(store, type(datasets[0])(trainer.preprocessed_dataset_folder, everything), network, trainer.device,
                  augmentation, Share(rank, ranks))
    for dataset in datasets:
        records.append({case: _await(store, dataset, case, alone=ranks == 1) for case in dataset.identifiers})
    stored = {case: sum(record.sizes.values()) for rows in records for case, record in rows.items()}
    tiles = [views * sum(len(record.tiles) for record in rows.values())
             for rows, views in zip(records, (trainer.sam.views, 1), strict=True)]
    values = network.encoder.spec.values(recipe.image_size)
    held = ranks * sum(tiles) * _bytes_in_memory(recipe, values, trainer.label_manager)
    in_memory = held <= free_memory(torch.device("cpu")) // _RAM_SHARE
    trainer.print_to_log_file(
        f"Embedding cache {store.folder}: {sum(stored.values()) / 1e9:.2f} GB of {len(stored)} case(s), "
        f"{'kept in memory' if in_memory else 'read from disk'}.")
    manager, processes = trainer.label_manager, get_allowed_n_proc_DA()
    transforms = trainer.get_validation_transforms(
        None, foreground_labels=manager.foreground_labels,
        regions=manager.foreground_regions if manager.has_regions else None, ignore_label=manager.ignore_label)
    training, validation = (
        CachedLoader(
            store, rows, label_manager=manager, batch_size=trainer.batch_size,
            oversample=trainer.oversample_foreground_percent, probabilistic=trainer.probabilistic_oversampling,
            transforms=transforms, workers=workers, pin_memory=trainer.device.type == "cuda",
            in_memory=in_memory, views=views)
        for rows, workers, views in zip(records, (processes, processes // 2), (trainer.sam.views, 1), strict=True)
    )
    return training, validation


def _await(store: Store, dataset: nnUNetBaseDataset, case: str, *, alone: bool) -> CaseRecord:
    """The case's record; where another process of this training builds it, as soon as it is there."""
    content = content_of(Path(dataset.source_folder), case)
    said = False
    while (record := store.complete(case, content)) is None:
        if alone and said:  # not in the instant in which another training replaces a file
            raise DamagedEntryError(f"{store.folder / case} was changed after it was built: start again.")
        if not said and not alone:
            print(f"Waiting for another process to encode {case}.", flush=True)
        said = True
        time.sleep(_WAIT)
    return record


def _bytes_in_memory(recipe: Recipe, values: int, label_manager: LabelManager) -> int:
    """Of one tile: `values` of features in float16, and its target in int16, one per region."""
    regions = len(label_manager.foreground_regions) + label_manager.has_ignore_label if label_manager.has_regions else 1
    return 2 * values + 2 * regions * math.prod(recipe.patch_size)


def _of_other_precision(store: Store) -> list[Store]:
    root = store.folder.parents[1]
    return [other for other in open_stores(root) if other.recipe.precision != store.recipe.precision
            and replace(other.recipe, precision=store.recipe.precision, encoder=store.recipe.encoder) == store.recipe]


def _refuse_other_recipes(recipe: Recipe) -> None:
    """Processes that train together must mean the same store; each would wait for the others for ever."""
    _, ranks = _place_among_processes()
    if ranks == 1:
        return
    recipes: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(recipes, recipe)
    if len({other.key for other in recipes}) > 1:
        raise ValueError(
            f"The devices of this training compute in {', '.join(other.precision for other in recipes)}: train on "
            "devices of one kind, or with sam.features 'online'."
        )


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else "less than a minute"


def _place_among_processes() -> tuple[int, int]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
