"""What trainers share whose encoder never changes: features that are stored, or encoded without gradients."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor
from torch import distributed as dist

from desam_nnunet.cache.build import Builder, Share, usable_bytes
from desam_nnunet.cache.entry import DamagedEntryError
from desam_nnunet.cache.loader import CachedLoader
from desam_nnunet.cache.store import CaseRecord, Recipe, Store, open_stores
from desam_nnunet.cache.tiles import STEP, content_of
from desam_nnunet.cache.views import Augmentation
from desam_nnunet.encoders.base import Features
from desam_nnunet.encoders.precision import dtype_name
from desam_nnunet.encoders.registry import brought_row
from desam_nnunet.networks.frame import FrozenSamNetwork
from desam_nnunet.sam.slabs import depth_of
from desam_nnunet.settings.sections import SamSection
from desam_nnunet.system.durations import duration
from desam_nnunet.system.machine import free_memory
from desam_nnunet.training.base import Batch, SamTrainer, axes_of_slab, flattened

_RAM_SHARE = 2  # a store is kept in memory if it takes at most one part in so many of what is free
_WAIT = 5.0  # seconds between two looks at what another process builds


class FrozenSamTrainer(SamTrainer):
    """Trains a decoder on frozen features."""

    @property
    def bare_network(self) -> FrozenSamNetwork:
        network = super().bare_network
        assert isinstance(network, FrozenSamNetwork)
        return network

    def initialize(self) -> None:
        """nnU-Net's; where it compiles the network, the encoder as well, which online training calls by itself."""
        super().initialize()
        if self.sam.features == "online" and self._do_i_compile():
            self.bare_network.encoder.compile()

    def _set_batch_size_and_oversample(self) -> None:
        """nnU-Net's Dice of a whole batch gathers a row per tile, so that all processes must have as many."""
        processes = dist.get_world_size() if self.is_ddp else 1
        size = self.configuration_manager.batch_size
        if size % processes:
            raise ValueError(f"A batch of {size} tiles can't be shared evenly by {processes} GPUs: set batch_size in "
                             f"the plans to a multiple of {processes}, or train with another -num_gpus.")
        super()._set_batch_size_and_oversample()

    def inputs_of(self, batch: Batch) -> Features:
        """Features of a batch, encoded now unless they come from the cache."""
        if "features" in batch:
            features = batch["features"].map(lambda x: x.to(self.device, non_blocking=True))
            return features if self.device.type == "cuda" else features.map(Tensor.float)  # autocast wants half
        tiles = super().inputs_of(batch)
        assert isinstance(tiles, Tensor)
        return self.bare_network.encode_slices(tiles)

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's loaders, or those of the embedding cache, which is built first."""
        return super().get_dataloaders() if self.sam.features == "online" else cached_loaders(self)

    def on_train_end(self) -> None:
        super().on_train_end()
        for loader in (self.dataloader_train, self.dataloader_val):
            if isinstance(loader, CachedLoader):
                loader.close()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """One fold sees every volume once: keeping features would cost memory for nothing, but where slabs overlap."""
        if self.depth == 1:
            self.bare_network.memory.budget = 0
        super().perform_actual_validation(save_probabilities)


def builder_of(
    trainer: nnUNetTrainer, dataset: nnUNetBaseDataset, sam: SamSection, network: FrozenSamNetwork, device: torch.device
) -> Builder:
    """Of the store that belongs to these settings, the data set's and this device's.

    Args:
        trainer: Knows at least its configuration; how it augments is how the views after the first are made.
    """
    augmentation = None
    if sam.views > 1:
        if depth_of(trainer.configuration_manager.patch_size) > 1:  # stored are slices, which other trainings share
            trainer = flattened(trainer)
        augmentation = Augmentation(trainer, by_case=sam.view_geometry == "case")
    height, width = trainer.configuration_manager.patch_size[-2:]
    recipe = Recipe(
        data_identifier=trainer.configuration_manager.data_identifier, encoder=sam.encoder, identity=sam.identity,
        image_size=sam.image_size, intensity=sam.intensity, window=network.to_image.window,
        patch_size=(int(height), int(width)), step=STEP, views=sam.views,
        augmentation=augmentation.name if augmentation else "", dtype=sam.cache_dtype,
        precision=dtype_name(network.encoder.precision(device)),
        reads=identity_of_maps(sam.encoder, network),
    )
    return Builder(Store(Path(dataset.source_folder).parent, recipe), dataset, network, device, augmentation)


def identity_of_maps(encoder: str, network: FrozenSamNetwork) -> str:
    """Names which maps are read of which images.

    Empty where the weights alone say it: of encoders of this package's, or files like theirs, as they are.
    """
    spec, image = network.encoder.spec, network.to_image.spec
    is_known = brought_row(encoder) is None
    return "" if is_known and image == spec.image else hashlib.sha256(f"{spec} {image}".encode()).hexdigest()[:16]


def build_missing(builder: Builder, share: Share) -> None:
    """Says what is missing and what it takes, then encodes this process's share of it."""
    plan, store = builder.plan(share), builder.store
    if plan.tiles:
        for other in open_stores(store.folder.parents[1]):
            same = replace(other.recipe, precision=store.recipe.precision, encoder=store.recipe.encoder)
            if same == store.recipe and other.recipe.precision != store.recipe.precision:
                print(f"{other.folder.name} has these tiles in {other.recipe.precision}, but the encoder computes in "
                      f"{store.recipe.precision} on this device: they are encoded again.")
        views = f", their {store.recipe.views} views counted" if store.recipe.views > 1 else ""
        print(f"Embedding cache {store.folder}: {plan.tiles} tiles of {len(plan.todo)} case(s) to encode{views}, about "
              f"{plan.needed / 1e9:.2f} GB ({usable_bytes(store.folder) / 1e9:.1f} GB free) and "
              f"{duration(builder.seconds(plan))}.", flush=True)
    if plan.todo:  # perhaps only the record of a case whose tiles are all there
        builder.build(plan)


def cached_loaders(trainer: FrozenSamTrainer) -> tuple[CachedLoader, CachedLoader]:
    """Loaders of training and validation, after everything that they need has been encoded.

    Prediction may mirror along the axes that the views were mirrored along, and along none where there is one view.
    """
    datasets = trainer.get_tr_and_val_datasets()
    cases = sorted({case for dataset in datasets for case in dataset.identifiers})
    everything = trainer.dataset_class(trainer.preprocessed_dataset_folder, cases)
    builder = builder_of(trainer, everything, trainer.sam, trainer.bare_network.eval(), trainer.device)
    axes = builder.augmentation.mirror_axes if builder.augmentation else None
    trainer.inference_allowed_mirroring_axes = axes_of_slab(axes) if trainer.depth > 1 else axes
    share = _share_of_process()
    _refuse_other_recipes(builder.store.recipe, share)
    build_missing(builder, share)
    records = [{case: _await(builder, case, alone=share.parts == 1) for case in dataset.identifiers}
               for dataset in datasets]
    views = trainer.sam.views, 1
    tiles = sum(seen * len(record.tiles) for rows, seen in zip(records, views, strict=True) for record in rows.values())
    size = share.parts * tiles * _bytes_of_tile(builder, trainer.label_manager)
    in_memory = size <= free_memory(torch.device("cpu")) // _RAM_SHARE
    stored = {case: sum(record.sizes.values()) for rows in records for case, record in rows.items()}
    trainer.print_to_log_file(
        f"Embedding cache {builder.store.folder}: {sum(stored.values()) / 1e9:.2f} GB of {len(stored)} case(s), "
        f"{'kept in memory' if in_memory else 'read from disk'}.")
    manager, processes = trainer.label_manager, get_allowed_n_proc_DA()
    transforms = trainer.get_validation_transforms(
        None, foreground_labels=manager.foreground_labels,
        regions=manager.foreground_regions if manager.has_regions else None, ignore_label=manager.ignore_label)
    training, validation = (
        CachedLoader(
            builder.store, rows, label_manager=manager, batch_size=trainer.batch_size,
            oversample=trainer.oversample_foreground_percent, probabilistic=trainer.probabilistic_oversampling,
            transforms=transforms, workers=workers, pin_memory=trainer.device.type == "cuda", in_memory=in_memory,
            views=seen, depth=trainer.depth)
        for rows, workers, seen in zip(records, (processes, processes // 2), views, strict=True)
    )
    return training, validation


def _share_of_process() -> Share:
    """Of the cases, where several processes train together."""
    if not (dist.is_available() and dist.is_initialized()):
        return Share()
    return Share(dist.get_rank(), dist.get_world_size())


def _refuse_other_recipes(recipe: Recipe, share: Share) -> None:
    """Processes that train together must mean the same store; each would wait for the others for ever."""
    recipes = [recipe] * share.parts
    if share.parts > 1:
        dist.all_gather_object(recipes, recipe)
    if len({other.key for other in recipes}) > 1:
        raise ValueError(f"The devices of this training compute in {', '.join(other.precision for other in recipes)}: "
                         "train on devices of one kind, or with sam.features 'online'.")


def _await(builder: Builder, case: str, *, alone: bool) -> CaseRecord:
    """The case's record; where another process of this training builds it, as soon as it is there."""
    content = content_of(Path(builder.dataset.source_folder), case)
    waited = False
    while (record := builder.store.complete(case, content)) is None:
        if alone and waited:  # not in the instant in which another training replaces a file
            raise DamagedEntryError(f"{builder.store.folder / case} was changed after it was built: start again.")
        if not alone and not waited:
            print(f"Waiting for another process to encode {case}.", flush=True)
        waited = True
        time.sleep(_WAIT)
    return record


def _bytes_of_tile(builder: Builder, label_manager: LabelManager) -> int:
    """In memory: features in float16, and a target in int16, one per region."""
    recipe = builder.store.recipe
    regions = len(label_manager.foreground_regions) + label_manager.has_ignore_label if label_manager.has_regions else 1
    return 2 * (builder.network.encoder.spec.values(recipe.image_size) + regions * math.prod(recipe.patch_size))
