"""DeSAM's two trainers: grid points (DeSAM-P) and whole box (DeSAM-B).

Source: Gao et al., DeSAM, MICCAI 2024, section 2.4 and the published settings: Adam, learning rate 1e-4
with polynomial decay, batch 8, 50 epochs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from desam_nnunet.encoders.base import Features
from desam_nnunet.networks.desam.network import DeSAM, build_desam
from desam_nnunet.sam.prompts import sample_points, whole_box
from desam_nnunet.settings.resolve import read_section
from desam_nnunet.settings.sections import DesamSection
from desam_nnunet.training.frozen import FrozenSamTrainer
from desam_nnunet.training.loading import sam_from_plans
from desam_nnunet.training.losses import foreground_target, score_loss


class DeSAMTrainer(FrozenSamTrainer):
    """Trains with one sampled point per tile; predicts with a grid of points.

    Attributes:
        whole_box: Whether the prompt is a box around the tile.
    """

    method = "desam"

    whole_box: ClassVar[bool] = False

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        return network_from_plans(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, whole_box=cls.whole_box
        )

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

    def compute_loss(self, features: Features, target: Tensor) -> tuple[Tensor, Tensor]:
        network = self.bare_network
        geometry = network.geometry(target)
        truth, labelled = foreground_target(target, self.label_manager)
        prompts, point_targets = sample_points(truth, labelled, geometry)
        masks, scores = self.network(features, prompts)
        logits = network.tile_logits(masks, geometry)
        return self.loss(logits, target) + score_loss(scores, point_targets), logits


class DeSAMTrainerWholeBox(DeSAMTrainer):
    """Trains and predicts with one box around the tile; no score decides whether a class is present."""

    whole_box = True

    def compute_loss(self, features: Features, target: Tensor) -> tuple[Tensor, Tensor]:
        network = self.bare_network
        geometry = network.geometry(target)
        masks, _ = self.network(features, whole_box(geometry, len(target), target.device))
        logits = network.tile_logits(masks, geometry)
        return self.loss(logits, target), logits


def network_from_plans(
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    num_input_channels: int,
    num_output_channels: int,
    *,
    whole_box: bool,
) -> DeSAM:
    """DeSAM as the resolved sections of a model's plans describe it; errors as
    :func:`~desam_nnunet.training.loading.sam_from_plans`.
    """
    planned = sam_from_plans(plans_manager, configuration_manager, num_input_channels)
    own = read_section(configuration_manager.configuration, DesamSection)
    background = not planned.section.regions
    return build_desam(
        sam=planned.sam,
        to_image=planned.to_image,
        num_channels=num_input_channels,
        num_classes=num_output_channels - background,
        background=background,
        grid=None if whole_box else own.grid,
        iou_threshold=own.iou_threshold,
    )
