"""What trainers share that change the encoder's features: nothing is stored, and AdamW warms up."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from desam_nnunet.training.base import Batch, SamTrainer
from desam_nnunet.training.schedule import WarmupPolySchedule


class AdaptedSamTrainer(SamTrainer):
    """Attributes: decay: AdamW's weight decay."""

    decay: ClassVar[float]

    @property
    def warmup(self) -> int:
        """Iterations over which the learning rate rises."""
        raise NotImplementedError

    @property
    def is_rate_set_after_step(self) -> bool:
        """Whether an iteration's learning rate is that of the number of the iteration before."""
        return False

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        self.weight_decay = self.decay  # nnU-Net logs it
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.initial_lr, weight_decay=self.decay)
        return optimizer, WarmupPolySchedule(
            optimizer, self.initial_lr, warmup=self.warmup, iterations=self.sam.iterations,
            per_epoch=self.num_iterations_per_epoch, late=self.is_rate_set_after_step)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.print_to_log_file("This method changes the encoder's features: tiles are encoded as they come, nothing "
                               "is cached.")

    def train_step(self, batch: Batch) -> dict[str, np.ndarray]:
        output = super().train_step(batch)
        self.lr_scheduler.advance()
        return output
