"""What a GPU would be given, without one: devices, types and shapes of tensors that have no values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TRAINED
from test_attention import exact, stock_block
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from desam_nnunet.encoders import attention
from desam_nnunet.encoders.base import Features
from desam_nnunet.encoders.registry import ENCODERS
from desam_nnunet.encoders.weights import find_row
from desam_nnunet.planning.footprint import PeakMemory, trainer_to_rehearse
from desam_nnunet.sam.slabs import DEPTH
from desam_nnunet.training.registry import TRAINERS

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
SIZE, PATCH = 128, 96
CUDA = torch.device("cuda", 0)


@contextmanager
def gpu_without_values(dtype: torch.dtype = torch.float16) -> Iterator[None]:
    """Fake tensors under CUDA's autocast, which :class:`torch.autocast` switches off where there is no GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True), PeakMemory([]):  # what is decided by a value is answered with yes
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", torch.float16)
            torch.clear_autocast_cache()


@pytest.fixture(autouse=True)
def precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The frozen encoder is run outside autocast, whose switch asks for a GPU; what it hands on is float32 anyway."""
    monkeypatch.setattr("desam_nnunet.encoders.base.encoder_dtype", lambda device: torch.float32)
    monkeypatch.setattr("desam_nnunet.encoders.memory.free_memory", lambda device: 2**30)


def on_a_gpu(name: str, *, encoder: str = "vit_tiny", depth: int = 1) -> Any:
    """A trainer whose network lies on a GPU; inside :func:`gpu_without_values`."""
    with CUDA:
        trainer: Any = trainer_to_rehearse(
            TRAINERS[name], find_row(encoder).architecture, SIZE, 2, checkpointing=False, images=1, depth=depth)
    trainer.device = CUDA
    trainer._skipped = 0
    trainer.configuration_manager = SimpleNamespace(patch_size=[*[depth] * (depth > 1), PATCH, PATCH])
    return trainer


def batch_of(trainer: Any, *, cached: bool) -> dict[str, Any]:
    """From a loader: on the CPU, features in float16."""
    slab = [DEPTH] if trainer.depth > 1 else []
    batch: dict[str, Any] = {"target": torch.zeros(2, 1, *slab, PATCH, PATCH, dtype=torch.int16), "keys": ["case"] * 2}
    if not cached:
        return batch | {"data": torch.randn(2, 3, *slab, PATCH, PATCH)}
    spec, number = trainer.bare_network.encoder.spec, 2 * max(1, *slab, 0)
    *levels, neck = (torch.empty(number, level.channels, SIZE // level.stride, SIZE // level.stride, dtype=torch.half)
                     for level in spec.maps)
    return batch | {"features": Features(tuple(levels), neck)}


def devices(*modules: Any) -> set[torch.device]:
    return {tensor.device for module in modules for tensor in (*module.parameters(), *module.buffers())}


@pytest.mark.parametrize("name", [*TRAINED, "PDMMTrainer"])
def test_a_training_step_stays_on_the_gpu(name: str) -> None:
    with gpu_without_values():
        trainer = on_a_gpu(name)
        network = trainer.bare_network
        assert devices(network, *network.held) == {CUDA}
        inputs, target = trainer._on_device(batch_of(trainer, cached=False))
        loss, logits = trainer.compute_loss(inputs, target)
        assert (loss.device, loss.dtype, loss.shape) == (CUDA, torch.float32, ())
        assert (logits.device, logits.dtype, logits.shape[-2:]) == (CUDA, torch.float32, (PATCH, PATCH))
        assert trainer._foreground(logits).device == CUDA


@pytest.mark.parametrize(("name", "depth"), [("DeSAMTrainer", 1), ("PDMMTrainer", 1), ("DeSAMTrainer", DEPTH)])
def test_cached_features_reach_the_gpu_as_they_are_stored(name: str, depth: int) -> None:
    """Autocast would make them half again."""
    with gpu_without_values():
        trainer = on_a_gpu(name, depth=depth)
        features, target = trainer._on_device(batch_of(trainer, cached=True))
        assert {(x.device, x.dtype) for x in features.tensors} == {(CUDA, torch.float16)}
        loss, _ = trainer.compute_loss(features, target)
        assert (loss.device, loss.dtype) == (CUDA, torch.float32)
        trainer.device = torch.device("cpu")
        assert {x.dtype for x in trainer.inputs_of(batch_of(trainer, cached=True)).tensors} == {torch.float32}


@pytest.mark.parametrize(("name", "depth"), [
    ("DeSAMTrainerWholeBox", 1), ("PDMMTrainer", 1), ("SAMedTrainer", 1), ("SAMedTrainerS", 1), ("DBSAMTrainer", 1),
    ("PDMMTrainer", DEPTH),
])
def test_a_prediction_stays_on_the_gpu(monkeypatch: pytest.MonkeyPatch, name: str, depth: int) -> None:
    monkeypatch.setattr("desam_nnunet.networks.frame.content_key", lambda tile, *_: b"")  # of values that are not there
    with torch.no_grad(), gpu_without_values():
        network = on_a_gpu(name, depth=depth).bare_network.eval()
        slab = [depth] if depth > 1 else []
        logits = network(torch.randn(1, 3, *slab, PATCH, PATCH, device=CUDA))
        assert (logits.device, logits.shape[-2:]) == (CUDA, (PATCH, PATCH))
        assert logits.dtype == torch.float32
        assert logits.shape[2:-2] == torch.Size(slab)


@pytest.mark.parametrize("name", [name for name, row in ENCODERS.items() if "random" not in name])
def test_features_are_what_the_spec_says(name: str) -> None:
    """In half precision, with the weights that are cast once."""
    architecture = ENCODERS[name].architecture
    with torch.no_grad(), gpu_without_values(torch.bfloat16):
        with CUDA:
            encoder = architecture.blank(256).encoder
        encoder.dtype = torch.bfloat16
        features = encoder.cast().run(torch.randn(2, 3, 256, 256, device=CUDA))
        for x, level in zip(features.tensors, encoder.spec.maps, strict=True):
            assert (x.device, x.dtype) == (CUDA, torch.float32)
            assert x.shape == (2, level.channels, 256 // level.stride, 256 // level.stride)


@pytest.mark.parametrize(("device", "form"), [("cpu", "_banded"), ("mps", "_banded"), ("cuda", "_appended")])
def test_which_form_of_attention_a_device_takes(monkeypatch: pytest.MonkeyPatch, device: str, form: str) -> None:
    """In float32 without gradients; the kernels themselves can't be asked without their device."""
    taken: list[str] = []
    for name in ("_banded", "_appended"):
        monkeypatch.setattr(attention, name, lambda q, *_, name=name: taken.append(name) or torch.empty_like(q))
    attend = exact(stock_block(window=0, table=16)).attn
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        attend.rel_pos_h = attend.rel_pos_w = nn.Parameter(torch.empty(31, 32, device=device))
        attend._attend(torch.empty(1, 16, 16, 3 * 64, device=device))
    assert taken == [form]


def test_the_grid_is_scored_on_the_gpu() -> None:
    """Which points win is decided by values, of which there are none here."""
    with torch.no_grad(), gpu_without_values():
        network = on_a_gpu("DeSAMTrainer").bare_network.eval()
        features = network.with_neck(network.encode(torch.randn(1, 3, PATCH, PATCH, device=CUDA)))
        scores = network.scores(features, network.geometry(torch.empty(1, 3, PATCH, PATCH)))
        assert (scores.device, scores.shape) == (CUDA, (81, 2))


def test_a_tile_is_made_an_image_on_its_device() -> None:
    with gpu_without_values():
        network = on_a_gpu("DeSAMTrainer").bare_network
        images: Tensor = network.images(torch.randn(2, 3, PATCH, PATCH, device=CUDA))
        assert (images.device, images.dtype, images.shape) == (CUDA, torch.float32, (2, 1, 3, SIZE, SIZE))
