"""DB-SAM's trainer, with a box around the whole tile instead of the paper's boxes from the ground truth.

Source: Qin et al., DB-SAM, MICCAI 2024, section 3, and the published settings: AdamW, weight decay 0.01, learning rate
1e-4 with one epoch of warm-up and polynomial decay; Dice (squared denominators) + cross-entropy.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from desam_nnunet.networks.dbsam.network import DBSAM
from desam_nnunet.networks.dbsam.section import DBSAM as METHOD
from desam_nnunet.networks.dbsam.section import DbsamSection
from desam_nnunet.networks.frame import Outline
from desam_nnunet.training.adapted import AdaptedSamTrainer
from desam_nnunet.training.losses import DiceCELoss


class DBSAMTrainer(AdaptedSamTrainer):
    """Trains a convolution branch beside SAM's frozen encoder, the neck and the decoder.

    Attributes:
        boxes: Whether each tile comes with a box, and the network has one mask, of what the box is around.
    """

    method = METHOD
    decay = 0.01
    boxes: ClassVar[bool] = False

    @classmethod
    def build_network(cls, outline: Outline) -> DBSAM:
        own: DbsamSection = outline.section
        return DBSAM(outline, checkpointing=own.checkpointing, boxes=own.mask_tokens if cls.boxes else None)

    @property
    def warmup(self) -> int:
        return self.num_iterations_per_epoch

    def _build_loss(self) -> nn.Module:
        return DiceCELoss(self.target_labels, ce=1.0, dice=1.0, background=False, ddp=self.is_ddp)

    def compute_loss(self, inputs: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(inputs)
        return self.loss(logits, target), logits
