"""What trainers share whose encoder never changes: features that are stored, or encoded without gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from desam_nnunet.cache.loader import CachedLoader
from desam_nnunet.encoders.base import Features
from desam_nnunet.networks.frame import FrozenSamNetwork
from desam_nnunet.training.base import Batch, SamTrainer
from desam_nnunet.training.cached import cached_loaders


class FrozenSamTrainer(SamTrainer):
    """Trains a decoder on frozen features."""

    @property
    def bare_network(self) -> FrozenSamNetwork:
        network = super().bare_network
        assert isinstance(network, FrozenSamNetwork)
        return network

    def _set_batch_size_and_oversample(self) -> None:
        """nnU-Net's Dice of a whole batch gathers a row per tile, so that all processes must have as many."""
        processes = torch.distributed.get_world_size() if self.is_ddp else 1
        size = self.configuration_manager.batch_size
        if size % processes:
            raise ValueError(
                f"A batch of {size} tiles can't be shared evenly by {processes} GPUs: set batch_size in the plans to a "
                f"multiple of {processes}, or train with another -num_gpus."
            )
        super()._set_batch_size_and_oversample()

    def inputs_of(self, batch: Batch) -> Features:
        """Features of a batch, encoded now unless they come from the cache."""
        if "features" in batch:
            return batch["features"].map(lambda x: x.to(self.device, non_blocking=True).float())
        tiles = super().inputs_of(batch)
        assert isinstance(tiles, Tensor)
        return self.bare_network.encode(tiles)

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's loaders, or those of the embedding cache, which is built first."""
        if self.sam.features == "online":
            return super().get_dataloaders()
        return cached_loaders(self)

    def on_train_end(self) -> None:
        super().on_train_end()
        for loader in (self.dataloader_train, self.dataloader_val):
            if isinstance(loader, CachedLoader):
                loader.close()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """One fold sees every volume once: keeping features would cost memory for nothing."""
        self.bare_network.memory.budget = 0
        super().perform_actual_validation(save_probabilities)
