"""A method of one's own: the DeSAM paper's ablation (a), PDMM alone on frozen features, without prompts and PRIM.

    export nnUNet_extTrainer=$nnUNet_extTrainer:/path/to/examples/extend/trainers
    nnUNetv2_train 501 2d 0 -tr PDMMAloneTrainer

Source: Gao et al., DeSAM, MICCAI 2024, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from desam_nnunet.encoders.base import Features
from desam_nnunet.networks.desam.pdmm import PDMM
from desam_nnunet.networks.frame import FrozenSamNetwork, Outline
from desam_nnunet.sam.prompts import Prompts
from desam_nnunet.sam.tiles import Geometry
from desam_nnunet.settings.sections import Method
from desam_nnunet.training.frozen import FrozenSamTrainer


@dataclass(frozen=True)
class PDMMAloneSection:
    """What the plans' section `pdmm_alone` holds. Attributes: lr: Adam's initial learning rate."""

    lr: float = 1e-4


class PDMMAlone(FrozenSamNetwork):
    """The neck's map itself stands where PRIM's mask embedding stood."""

    def __init__(self, outline: Outline) -> None:
        loaded = outline.loaded
        super().__init__(encoder=loaded.encoder, to_image=outline.to_image, num_channels=outline.num_channels,
                         background=outline.background, neck=loaded.neck)
        self.pdmm = PDMM(spec=loaded.encoder.spec, prompt_dim=loaded.prompt_dim, num_classes=outline.num_classes)

    def decode(self, features: Features, prompts: Prompts) -> tuple[Tensor, None]:
        return self.pdmm(features.neck, self.pdmm.context(features.levels)), None

    def predict(self, features: Features, geometry: Geometry) -> Tensor:
        return self.tile_logits(self.decode(features, Prompts())[0], geometry)


class PDMMAloneTrainer(FrozenSamTrainer):
    """Trains PDMM with nnU-Net's own loss."""

    method = Method("pdmm_alone", PDMMAloneSection, "PDMMAlonePlans", frozen_features=True)

    @classmethod
    def build_network(cls, outline: Outline) -> PDMMAlone:
        return PDMMAlone(outline)

    def compute_loss(self, inputs: Features, target: Tensor) -> tuple[Tensor, Tensor]:
        network = self.bare_network
        logits = network.tile_logits(self.network(inputs)[0], network.geometry(target))
        return self.loss(logits, target), logits
