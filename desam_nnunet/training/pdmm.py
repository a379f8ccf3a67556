"""PDMM alone, trained with nnU-Net's own loss."""

from __future__ import annotations

from torch import Tensor

from desam_nnunet.encoders.base import Features
from desam_nnunet.networks.desam.pdmm_alone import PDMMAlone
from desam_nnunet.networks.desam.pdmm_section import PDMM_ALONE
from desam_nnunet.networks.frame import Outline
from desam_nnunet.training.frozen import FrozenSamTrainer


class PDMMTrainer(FrozenSamTrainer):
    """Trains a convolutional decoder on frozen features: no prompt, no scores, one pass per tile at prediction."""

    method = PDMM_ALONE

    @classmethod
    def build_network(cls, outline: Outline) -> PDMMAlone:
        return PDMMAlone(outline)

    def compute_loss(self, inputs: Features, target: Tensor) -> tuple[Tensor, Tensor]:
        network = self.bare_network
        logits = network.tile_logits(self.network(inputs)[0], network.geometry(target))
        return self.loss(logits, target), logits
