"""What trainers share that change the encoder's features: nothing is stored, and AdamW warms up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch.optim import AdamW, Optimizer

from desam_nnunet.training.base import Batch, SamTrainer

_POWER = 0.9


@dataclass
class WarmupPolySchedule:
    """Rises linearly over `warmup` iterations, then decays as ``(1 - i / iterations) ** 0.9``, i counted from there.

    So it does not quite reach zero (Zhang and Liu, SAMed, 2023, section 3.4, and the published code).

    Attributes:
        optimizer: Whose own learning rate is that at the end of the warm-up.
        iterations: Of the whole training.
        per_epoch: Iterations of an epoch; nnU-Net says at the start of each which one it is.
        late: Whether each iteration but the first gets the learning rate of the one before, as SAMed's published code,
            which sets it after the step.
    """

    optimizer: Optimizer
    warmup: int
    iterations: int
    per_epoch: int
    late: bool

    def __post_init__(self) -> None:
        self.step(0)

    def step(self, epoch: int) -> None:
        """An epoch begins."""
        self.iteration = epoch * self.per_epoch - 1
        self.advance()

    def advance(self) -> None:
        """The next iteration begins."""
        self.iteration += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.iteration)

    def rate(self, iteration: int) -> float:
        """The learning rate of an iteration, counted from 0."""
        highest = self.optimizer.defaults["lr"]
        if self.late:
            iteration = max(0, iteration - 1)
        if iteration < self.warmup:
            return highest * (iteration + 1) / self.warmup
        return highest * max(0.0, 1 - (iteration - self.warmup) / self.iterations) ** _POWER


Optimization = tuple[Optimizer, WarmupPolySchedule]


class AdaptedSamTrainer(SamTrainer):
    """Trains what changes the encoder's features. Attributes: decay: AdamW's weight decay."""

    decay: ClassVar[float]

    def adamw(self, warmup: int, *, late: bool = False) -> Optimization:
        """For ``configure_optimizers``; arguments as :class:`WarmupPolySchedule`."""
        self.weight_decay = self.decay  # nnU-Net logs it
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizer = AdamW(trained, lr=self.initial_lr, weight_decay=self.decay)
        schedule = WarmupPolySchedule(optimizer, warmup, self.sam.iterations, self.num_iterations_per_epoch, late)
        return optimizer, schedule

    def on_train_start(self) -> None:
        super().on_train_start()
        self.print_to_log_file("This method changes the encoder's features: tiles are encoded as they come, nothing "
                               "is cached.")

    def train_step(self, batch: Batch) -> dict[str, np.ndarray]:
        output = super().train_step(batch)
        self.lr_scheduler.advance()
        return output
