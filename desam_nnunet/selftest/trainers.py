"""Every trainer on a device: its network against float32 on the CPU, two steps, a batch from a cache, a volume."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor, nn

from desam_nnunet.networks.dbsam.network import DBSAM
from desam_nnunet.networks.desam.network import DeSAM
from desam_nnunet.networks.desam.prompters import PointPrompter
from desam_nnunet.networks.frame import FrozenSamNetwork, SamNetwork
from desam_nnunet.sam.prompts import Prompts, whole_box
from desam_nnunet.selftest.rows import Row, compared, hushed
from desam_nnunet.selftest.workspace import draw_case, make_trainer, tiles, workspace
from desam_nnunet.training.base import Batch, SamTrainer
from desam_nnunet.training.frozen import FrozenSamTrainer, cached_loaders
from desam_nnunet.training.registry import TRAINERS

_ATTEMPTS = 30  # steps in which two succeed: loss scaling begins too high, on purpose
_PREDICTED = ("DeSAMTrainerWholeBox", "PDMMTrainer", "SAMedTrainer")  # of whose volumes no threshold decides
_CHANGED = 0.05  # of a volume's pixels whose label may change; half of them would if the logits were noise


def check_trainer(name: str, device: torch.device) -> Iterator[Row]:
    """All of one trainer."""
    with workspace():
        with hushed():
            trainer = make_trainer(TRAINERS[name], device)
            rows = [*network_rows(name, trainer.bare_network, copy.deepcopy(trainer.bare_network)),
                    *_training_rows(name, trainer)]
            if name in _PREDICTED:
                rows.append(volume_row(name, trainer, copy.deepcopy(trainer.bare_network)))
        yield from rows


def network_rows(name: str, network: SamNetwork, reference: SamNetwork) -> Iterator[Row]:
    """A tile through `network` where it lies, in float32 and as it predicts, and through `reference` on the CPU."""
    tile, encoder = tiles()["data"][:1], network.encoder
    device, own = encoder.place[0], encoder.dtype
    network.eval()
    reference.eval().to("cpu")
    reference.encoder.dtype = encoder.dtype = torch.float32
    expected = _outputs(reference, tile)
    yield compared(f"{name}, network", _outputs(network, tile.to(device)), expected, torch.float32)
    encoder.dtype = own
    precision = encoder.precision(device)
    if precision != torch.float32:
        with torch.autocast("cuda", enabled=device.type == "cuda"):  # nnU-Net's
            yield compared(f"{name}, network", _outputs(network, tile.to(device)), expected, precision)


@torch.no_grad()
def _outputs(network: SamNetwork, tile: Tensor) -> list[Tensor]:
    """Masks and scores of one prompt, or logits; nothing that a threshold decides."""
    geometry = network.geometry(tile)
    box = whole_box(geometry, 1, tile.device)
    if isinstance(network, FrozenSamNetwork):
        prompts = box
        if isinstance(network, DeSAM) and isinstance(network.prompter, PointPrompter):
            prompts = Prompts(points=network.prompter.points(geometry, tile.device)[:1])
        return [output for output in network(network.encode(tile), prompts) if output is not None]
    return [network(tile, box.boxes) if isinstance(network, DBSAM) else network(tile)]


def _training_rows(name: str, trainer: SamTrainer) -> Iterator[Row]:
    if not isinstance(trainer, FrozenSamTrainer):
        yield steps_row(name, trainer, tiles())
        return
    loader, other = cached_loaders(trainer)
    try:
        batch = next(loader)
        yield cache_row(name, trainer, batch)
        yield steps_row(name, trainer, batch)
    finally:
        loader.close()
        other.close()


def cache_row(name: str, trainer: FrozenSamTrainer, batch: Batch) -> Row:
    """Whether a batch comes to the device as it was read."""
    there = trainer.inputs_of(batch)
    pinned = batch["features"].neck.is_pinned() or trainer.device.type != "cuda"
    same = all(torch.equal(x.float().cpu(), y.float())
               for x, y in zip(there.tensors, batch["features"].tensors, strict=True))
    result = "the same on the device" if same else "NOT the same on the device"
    return Row(f"{name}, a batch from the cache", result + ("" if pinned else ", NOT pinned"), same and pinned)


def steps_row(name: str, trainer: SamTrainer, batch: Batch) -> Row:
    """Two training steps: whether the losses are finite, what is trained changes and what is frozen does not."""
    network = trainer.bare_network
    before, frozen = copies(network), copies(*network.held)
    trainer.network.train()
    losses: list[float] = []
    for _ in range(_ATTEMPTS):
        loss = float(trainer.train_step(batch)["loss"])
        if trainer._skipped == 0:
            losses.append(loss)
        if len(losses) == 2:
            break
    moved = any(not torch.equal(one, other) for one, other in zip(before, copies(network), strict=True))
    kept = all(torch.equal(one, other) for one, other in zip(frozen, copies(*network.held), strict=True))
    finite = len(losses) == 2 and all(map(math.isfinite, losses))
    result = ", ".join(f"{loss:.3f}" for loss in losses) if losses else f"none in {_ATTEMPTS} attempts"
    result = f"losses {result}" + ("" if moved else ", NOTHING was trained") + ("" if kept else ", the ENCODER changed")
    return Row(f"{name}, two training steps", result, finite and moved and kept)


def copies(*modules: nn.Module) -> list[Tensor]:
    """Parameters as they are now, on the CPU."""
    return [parameter.detach().cpu().clone() for module in modules for parameter in module.parameters()]


def volume_row(name: str, trainer: SamTrainer, reference: SamNetwork) -> Row:
    """A volume through nnU-Net's predictor on the device, and through `reference` on the CPU, there in float32."""
    reference.to("cpu").encoder.dtype = torch.float32
    found, said = _logits(trainer, trainer.bare_network, trainer.device)
    expected, _ = _logits(trainer, reference, torch.device("cpu"))
    precision = trainer.bare_network.encoder.precision(trainer.device)
    row = compared(f"{name}, a volume", [found], [expected], precision)
    changed = float((found.argmax(0) != expected.argmax(0)).float().mean())
    is_retried = "unsuccessful" in said  # nnU-Net tries again on the CPU
    result = f"{row.result}; {changed:.2%} of the labels differ, allowed {_CHANGED:.0%}"
    return Row(row.what, result + (", and the device FAILED first" if is_retried else ""),
               row.passed and changed <= _CHANGED and not is_retried)


def _logits(trainer: SamTrainer, network: SamNetwork, device: torch.device) -> tuple[Tensor, str]:
    """Of the second case, on the CPU, and what nnU-Net said."""
    predictor = nnUNetPredictor(device=device, allow_tqdm=False, perform_everything_on_device=device.type == "cuda")
    predictor.manual_initialization(
        network, trainer.plans_manager, trainer.configuration_manager, None, trainer.dataset_json,
        type(trainer).__name__, (0, 1))
    with hushed() as said:
        logits: Any = predictor.predict_sliding_window_return_logits(torch.from_numpy(draw_case(1)[0]))
    return logits.float().cpu(), said.getvalue()
