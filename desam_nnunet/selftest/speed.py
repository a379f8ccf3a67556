"""How fast and how frugal a device is: the encoder beside a matrix product, a step's memory beside the planner's."""

from __future__ import annotations

from collections.abc import Iterator
from timeit import repeat

import torch

from desam_nnunet.encoders.precision import dtype_name, encoder_dtype
from desam_nnunet.encoders.weights import find_row
from desam_nnunet.planning.fit import matrix_rate
from desam_nnunet.planning.footprint import empty_batch, footprint, trainer_to_rehearse
from desam_nnunet.selftest.rows import Row
from desam_nnunet.training.desam import DeSAMTrainer

_ENCODER = "vit_b"
_MEMORY = (512, 320, 4)  # input size, patch and batch of the step
_MORE = 1.1  # times the estimate, which plans may rest on


def check_speed(device: torch.device) -> Iterator[Row]:
    """Operations a second; nothing here is right or wrong."""
    size = 1024 if device.type == "cuda" else 512
    architecture = find_row(_ENCODER).architecture
    with device:
        encoder = architecture.blank(size).encoder.to(device)
        images = torch.randn(1, 3, size, size)
    seconds = min(repeat(lambda: encoder(images).neck[0, 0, 0, 0].item(), number=1, repeat=4)[1:])  # an item waits
    achieved, possible = architecture.operations(size) / seconds, matrix_rate(device)
    yield Row(f"speed of {_ENCODER} at {size}, {dtype_name(encoder_dtype(device))}",
              f"{achieved / 1e12:.3g} TFLOP/s, {achieved / possible:.0%} of a matrix product's {possible / 1e12:.3g}")


def check_memory(device: torch.device) -> Iterator[Row]:
    """The peak of a training step beside what ``desam plan`` counts with; on a GPU alone, where it can be asked for."""
    if device.type != "cuda":
        return
    size, patch, batch = _MEMORY
    architecture = find_row(_ENCODER).architecture
    estimate = footprint(DeSAMTrainer, architecture, size, (patch, patch), 1, half=True).training(batch)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with device:
        trainer = trainer_to_rehearse(DeSAMTrainer, architecture, size, 1, checkpointing=False, images=1, depth=1)
    trainer.device = device
    trainer.network.to(device)
    optimizer = torch.optim.Adam(parameter for parameter in trainer.network.parameters() if parameter.requires_grad)
    for _ in range(2):
        trainer.network.encoder(torch.zeros(1, 3, size, size, device=device))
        loss, *_ = trainer._evaluate(empty_batch(trainer, (patch, patch), batch))
        loss.backward()
        optimizer.step()
    peak = torch.cuda.max_memory_allocated(device) - before
    yield Row(f"memory of a step, {_ENCODER} at {size}, batch {batch}",
              f"{peak / 1e9:.2f} GB, planned {estimate / 1e9:.2f} GB", peak <= _MORE * estimate)
