"""The peak memory of two training steps in float32, in a process of its own: prints bytes above the network's own.

Run it with MALLOC_MMAP_THRESHOLD_ in the environment, so that glibc gives memory back that tensors have given back.

    python step_peak.py TRAINER ENCODER IMAGE_SIZE BATCH OUTPUTS PATCH DEPTH [checkpointing]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from desam_nnunet.encoders.weights import find_row
from desam_nnunet.planning.footprint import empty_batch, trainer_to_rehearse
from desam_nnunet.system.machine import peak_memory
from desam_nnunet.training.base import Batch, SamTrainer
from desam_nnunet.training.registry import TRAINERS

CPU = torch.device("cpu")


def main() -> None:
    trainer, encoder = sys.argv[1:3]
    image_size, batch_size, outputs, patch, depth = map(int, sys.argv[3:8])
    trainer = started(trainer_to_rehearse(
        TRAINERS[trainer], find_row(encoder).architecture, image_size, outputs,
        checkpointing="checkpointing" in sys.argv, images=1, depth=depth))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = peak_memory(CPU)
    for _ in range(2):  # but for the learning rate
        SamTrainer.train_step(trainer, random_batch(trainer, patch, depth * batch_size, outputs))
    print(peak_memory(CPU) - before)


def started(trainer: Any) -> Any:
    """The planner's trainer, with values in its network, and an optimiser."""
    network = trainer.bare_network
    network.encoder.dtype = torch.float32  # also where the CPU has bfloat16
    if trainer.method.frozen_features:
        network.encoder.to("meta")  # it is not needed, since the features are given
    trainer.optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad])
    trainer.grad_scaler = None
    trainer._skipped = 0
    return trainer


def random_batch(trainer: Any, patch: int, tiles: int, outputs: int) -> Batch:
    batch = empty_batch(trainer, (patch, patch), tiles)
    batch = tree_map_only(Tensor, lambda values: values.uniform_(), batch)
    batch["target"].random_(outputs + 1)
    return batch


if __name__ == "__main__":
    main()
