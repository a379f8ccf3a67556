"""DB-SAM's trainer, with a box around the whole tile instead of the paper's boxes from the ground truth.

Source: Qin et al., DB-SAM, MICCAI 2024, section 3, and the published settings: AdamW, weight decay 0.01, learning rate
1e-4 with one epoch of warm-up and polynomial decay; Dice (squared denominators) + cross-entropy.
"""

from __future__ import annotations

from typing import Any, ClassVar

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from desam_nnunet.networks.dbsam.network import DBSAM, build_dbsam
from desam_nnunet.settings.resolve import read_section
from desam_nnunet.settings.sections import DbsamSection
from desam_nnunet.training.adapted import AdaptedSamTrainer
from desam_nnunet.training.loading import sam_from_plans
from desam_nnunet.training.losses import DiceCELoss


class DBSAMTrainer(AdaptedSamTrainer):
    """Trains a convolution branch beside SAM's frozen encoder, the neck and the decoder.

    Attributes:
        boxes: Whether each tile comes with a box, and the network has one mask, of what the box is around.
    """

    method = "dbsam"
    decay = 0.01
    boxes: ClassVar[bool] = False

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        outputs = None if cls.boxes else num_output_channels
        return network_from_plans(plans_manager, configuration_manager, num_input_channels, outputs)

    @property
    def warmup(self) -> int:
        return self.num_iterations_per_epoch

    def _build_loss(self) -> nn.Module:
        return DiceCELoss(self.target_labels, ce=1.0, dice=1.0, background=False, ddp=self.is_ddp)

    def compute_loss(self, inputs: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(inputs)
        return self.loss(logits, target), logits


def network_from_plans(
    plans_manager: PlansManager, configuration_manager: ConfigurationManager, num_input_channels: int,
    num_output_channels: int | None,
) -> DBSAM:
    """DB-SAM as the resolved sections of a model's plans describe it; errors as
    :func:`~desam_nnunet.training.loading.sam_from_plans`.

    Args:
        num_output_channels: None for one mask, of whatever the box is around.
    """
    planned = sam_from_plans(plans_manager, configuration_manager, num_input_channels)
    own = read_section(configuration_manager.configuration, DbsamSection)
    settings: dict[str, Any] = {"sam": planned.sam, "to_image": planned.to_image, "num_channels": num_input_channels,
                                "checkpointing": own.checkpointing}
    if num_output_channels is None:
        return build_dbsam(num_classes=1, background=False, automatic=False, **settings)
    background = not planned.section.regions
    return build_dbsam(num_classes=num_output_channels - background, background=background, **settings)
