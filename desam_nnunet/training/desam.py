"""DeSAM's two trainers: grid points (DeSAM-P) and whole box (DeSAM-B).

Source: Gao et al., DeSAM, MICCAI 2024, section 2.4 and the published settings: Adam, learning rate 1e-4
with polynomial decay, batch 8, 50 epochs.
"""

from __future__ import annotations

from torch import Tensor

from desam_nnunet.encoders.base import Features
from desam_nnunet.networks.desam.network import DeSAM, build_desam
from desam_nnunet.networks.desam.prompters import GridPrompter, Prompter, SinglePrompter, WholeBoxPrompter
from desam_nnunet.networks.desam.section import DESAM, DesamSection
from desam_nnunet.networks.frame import Outline
from desam_nnunet.sam.prompts import sample_points
from desam_nnunet.training.frozen import FrozenSamTrainer
from desam_nnunet.training.losses import foreground_target, score_loss


class DeSAMTrainer(FrozenSamTrainer):
    """Trains with one sampled point per tile; predicts with a grid of points.

    Where another prompter asks one prompt alone, that one is trained with, and no scores are.
    """

    method = DESAM

    @classmethod
    def build_network(cls, outline: Outline) -> DeSAM:
        section: DesamSection = outline.section
        return build_desam(outline, cls.prompter(section), mask_stride=section.mask_stride,
                           through_input=section.through_input)

    @classmethod
    def prompter(cls, section: DesamSection) -> Prompter:
        """What is asked at prediction."""
        return GridPrompter(section.grid, section.iou_threshold, section.grid_offset)

    def compute_loss(self, features: Features, target: Tensor) -> tuple[Tensor, Tensor]:
        network = self.bare_network
        assert isinstance(network, DeSAM)
        geometry = network.geometry(target)
        if isinstance(network.prompter, SinglePrompter):
            prompts, point_targets = network.prompter.prompts(geometry, len(target), target.device), None
        else:
            truth, labelled = foreground_target(target, self.label_manager)
            prompts, point_targets = sample_points(truth, labelled, geometry)
            if (there := network.there(features)) is not None:
                point_targets = point_targets._replace(valid=point_targets.valid & there)
        masks, scores = self.network(features, prompts)
        logits = network.tile_logits(masks, geometry)
        loss = self.loss(logits, target)
        return (loss if point_targets is None else loss + score_loss(scores, point_targets)), logits


class DeSAMTrainerWholeBox(DeSAMTrainer):
    """Trains and predicts with one box around the tile; no score decides whether a class is present."""

    @classmethod
    def prompter(cls, section: DesamSection) -> Prompter:
        return WholeBoxPrompter()
