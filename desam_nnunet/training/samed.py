"""SAMed's two trainers: low-rank updates of the encoder alone, and of the decoder's transformer too (SAMed_s).

Source: Zhang and Liu, SAMed, 2023, section 3, and the published settings: AdamW, weight decay 0.1, learning rate 0.005
with linear warm-up and polynomial decay; 0.2 cross-entropy + 0.8 Dice at a quarter of the input size.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from desam_nnunet.encoders.base import ImageSpec
from desam_nnunet.encoders.sam_vit import IMAGE as SAM_IMAGE
from desam_nnunet.networks.frame import Outline
from desam_nnunet.networks.samed.network import SAMed
from desam_nnunet.networks.samed.section import SAMED, SamedSection
from desam_nnunet.sam.tiles import cut_padding
from desam_nnunet.training.adapted import AdaptedSamTrainer, Optimization
from desam_nnunet.training.losses import DiceCELoss


class SAMedTrainer(AdaptedSamTrainer):
    """Trains low-rank updates of SAM's encoder, and its mask decoder; without prompts.

    Attributes:
        adapt_decoder: Whether the decoder's transformer gets low-rank updates too, instead of training as a whole.
    """

    method = SAMED
    decay = 0.1
    adapt_decoder: ClassVar[bool] = False

    @classmethod
    def build_network(cls, outline: Outline) -> SAMed:
        own: SamedSection = outline.section
        return SAMed(outline, rank=own.rank, targets=own.targets, adapt_decoder=cls.adapt_decoder,
                     checkpointing=own.checkpointing)

    @classmethod
    def image_of(cls, spec: ImageSpec) -> ImageSpec:
        """Where SAM was trained on 0 to 255 less the mean of its pixels, SAMed is published with 0 to 1 as it is."""
        return ImageSpec(spec.multiple) if spec == SAM_IMAGE else spec

    def configure_optimizers(self) -> Optimization:
        return self.adamw(self.own.warmup, late=self.own.lr_after_step)

    def _build_loss(self) -> DiceCELoss:
        return DiceCELoss(self.label_manager, ce=0.2, dice=0.8, background=True, ddp=self.is_ddp)

    def compute_loss(self, inputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The loss at a quarter of the input size, against the target's nearest pixels."""
        network = self.bare_network
        geometry = network.geometry(inputs)
        masks = self.network(inputs, low_resolution=True)
        small = F.interpolate(target.float(), size=geometry.mask, mode="nearest-exact")
        return self.loss(cut_padding(masks, geometry), small), network.tile_logits(masks, geometry)


class SAMedTrainerS(SAMedTrainer):
    """SAMed_s: the decoder's transformer is frozen as well and gets low-rank updates."""

    adapt_decoder = True
