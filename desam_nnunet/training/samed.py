"""SAMed's two trainers: low-rank updates of the encoder alone, and of the decoder's transformer too (SAMed_s).

Source: Zhang and Liu, SAMed, 2023, section 3, and the published settings: AdamW, weight decay 0.1, learning rate 0.005
with linear warm-up and polynomial decay; 0.2 cross-entropy + 0.8 Dice at a quarter of the input size.
"""

from __future__ import annotations

from typing import ClassVar

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn
from torch.nn import functional as F

from desam_nnunet.networks.samed.network import SAMed, build_samed
from desam_nnunet.sam.tiles import cut_padding
from desam_nnunet.settings.resolve import read_section
from desam_nnunet.settings.sections import SamedSection
from desam_nnunet.training.adapted import AdaptedSamTrainer
from desam_nnunet.training.loading import sam_from_plans
from desam_nnunet.training.losses import DiceCELoss

_CE, _DICE = 0.2, 0.8


class SAMedTrainer(AdaptedSamTrainer):
    """Trains low-rank updates of SAM's encoder, and its mask decoder; without prompts.

    Attributes:
        adapt_decoder: Whether the decoder's transformer gets low-rank updates too, instead of training as a whole.
    """

    method = "samed"
    decay = 0.1
    adapt_decoder: ClassVar[bool] = False

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
            plans_manager, configuration_manager, num_input_channels, num_output_channels,
            adapt_decoder=cls.adapt_decoder)

    @property
    def warmup(self) -> int:
        return self.own.warmup

    def _build_loss(self) -> nn.Module:
        return DiceCELoss(self.label_manager, ce=_CE, dice=_DICE, background=True, ddp=self.is_ddp)

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


def network_from_plans(
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    num_input_channels: int,
    num_output_channels: int,
    *,
    adapt_decoder: bool,
) -> SAMed:
    """SAMed as the resolved sections of a model's plans describe it; errors as
    :func:`~desam_nnunet.training.loading.sam_from_plans`.
    """
    planned = sam_from_plans(plans_manager, configuration_manager, num_input_channels, normalise=False)
    own = read_section(configuration_manager.configuration, SamedSection)
    return build_samed(
        sam=planned.sam, to_image=planned.to_image, num_channels=num_input_channels, outputs=num_output_channels,
        rank=own.rank, targets=own.targets, adapt_decoder=adapt_decoder, checkpointing=own.checkpointing)
