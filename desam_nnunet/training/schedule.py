"""The learning rate of SAMed and DB-SAM, iteration by iteration."""

from __future__ import annotations

from torch.optim import Optimizer

_POWER = 0.9


class WarmupPolySchedule:
    """Rises linearly over `warmup` iterations, then decays as ``(1 - i / iterations) ** 0.9``, i counted from there.

    So it does not quite reach zero (Zhang and Liu, SAMed, 2023, section 3.4, and the published code).

    Args:
        highest: Learning rate at the end of the warm-up.
        iterations: Of the whole training.
        per_epoch: Iterations of an epoch; nnU-Net says at the start of each which one it is.
        late: Whether each iteration but the first gets the learning rate of the one before, as SAMed's published code,
            which sets it after the step.
    """

    def __init__(
        self, optimizer: Optimizer, highest: float, *, warmup: int, iterations: int, per_epoch: int, late: bool = False
    ) -> None:
        self.optimizer = optimizer
        self.highest = highest
        self.warmup = warmup
        self.iterations = iterations
        self.per_epoch = per_epoch
        self.late = late
        self.step(0)

    def step(self, epoch: int) -> None:
        """An epoch begins."""
        self._go_to(epoch * self.per_epoch)

    def advance(self) -> None:
        """An iteration is done."""
        self._go_to(self.iteration + 1)

    def rate(self, iteration: int) -> float:
        """The learning rate of an iteration, counted from 0."""
        if self.late:
            iteration = max(0, iteration - 1)
        if iteration < self.warmup:
            return self.highest * (iteration + 1) / self.warmup
        return self.highest * max(0.0, 1 - (iteration - self.warmup) / self.iterations) ** _POWER

    def _go_to(self, iteration: int) -> None:
        self.iteration = iteration
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(iteration)
