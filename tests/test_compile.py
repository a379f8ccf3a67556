"""torch.compile on training's and prediction's way through the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import test_dbsam
import test_samed
import torch
from conftest import Workspace, make_trainer, tiny_sections
from test_network import ANYTHING, make
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from desam_nnunet.encoders.base import Features
from desam_nnunet.sam.prompts import Prompts


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def backend(request: pytest.FixtureRequest) -> CompileCounterWithBackend:
    torch._dynamo.reset()
    return CompileCounterWithBackend(request.param)


@torch.inference_mode()
def test_prediction_compiles_the_networks_and_does_not_recompile(backend: CompileCounterWithBackend) -> None:
    network = make(2, ANYTHING)
    tiles = [torch.randn(1, 1, 64, 64) for _ in range(3)]
    expected = [network(tile) for tile in tiles]
    network.memory.clear()
    compiled = torch.compile(network, backend=backend)
    graphs = []
    for tile, logits in zip(tiles, expected, strict=True):
        torch.testing.assert_close(compiled(tile), logits, rtol=0, atol=1e-4)
        graphs.append(backend.frame_count)
    assert graphs[0] == graphs[-1] > 0
    names = {name for graph in backend.graphs for name in (str(node.target) for node in graph.graph.nodes)}
    assert any("layer_norm" in name for name in names)  # the encoder
    assert any("conv_transpose2d" in name for name in names)  # PDMM


def test_training_gives_the_same_gradients(backend: CompileCounterWithBackend) -> None:
    network = make(2).train()
    prompts = Prompts(points=torch.full((2, 1, 2), 9.0))
    samples = [network.encode(torch.randn(2, 1, 64, 64)) for _ in range(4)]

    def loss(run: Any, features: Features) -> Tensor:
        masks, scores = run(features, prompts)
        return masks.square().mean() + scores.square().mean()

    assert have_the_same_gradients(network, torch.compile(network, backend=backend), loss, samples)
    assert backend.frame_count > 0


def have_the_same_gradients(
    network: nn.Module, compiled: Any, loss: Callable[[Any, Any], Tensor], samples: Iterable[Any]
) -> bool:
    """To 1e-4 of each parameter's largest and 1e-6 of the largest of all, with one sample at least.

    Rounding now and then takes an activation across a ReLU's kink, which moves the gradients of that sample by per
    cents; a graph that computes something else is off with all of them. Some gradients are 0 but for rounding.
    """

    def gradients(run: Any, sample: Any) -> list[Tensor]:
        network.zero_grad()
        loss(run, sample).backward()
        return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]

    def agree(sample: Any) -> bool:
        expected, found = gradients(network, sample), gradients(compiled, sample)
        most = max(eager.abs().max() for eager in expected)
        return all((ours - eager).abs().max() <= 1e-4 * eager.abs().max() + 1e-6 * most
                   for ours, eager in zip(found, expected, strict=True))

    return any(map(agree, samples))


def test_online_training_compiles_the_encoder(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, backend: CompileCounterWithBackend
) -> None:
    plans = workspace.write_plans("OnlinePlans", **tiny_sections(features="online"))
    trainer = make_trainer("DeSAMTrainer", workspace, plans=plans)
    batch = {"data": torch.randn(1, 1, 96, 96), "keys": ["case"]}
    monkeypatch.setattr(trainer, "_do_i_compile", lambda: True)  # nnU-Net does it on a GPU
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    trainer.initialize()
    compiled = trainer.inputs_of(batch)
    assert backend.frame_count > 0
    torch.compiler.set_stance("force_eager")
    try:
        expected = trainer.inputs_of(batch)
    finally:
        torch.compiler.set_stance("default")
    for one, other in zip(compiled.tensors, expected.tensors, strict=True):
        assert (one - other).norm() <= 2e-2 * other.norm()  # half precision, where the CPU has it


@pytest.mark.slow
@pytest.mark.parametrize("method", [test_samed, test_dbsam])
def test_samed_and_db_sam_compile_and_do_not_recompile(backend: CompileCounterWithBackend, method: Any) -> None:
    network = method.build().eval()  # without drop-path, so that both ways are the same
    compiled = torch.compile(network, backend=backend)
    tiles = [torch.randn(1, 1, 64, 64) for _ in range(3)]
    graphs = []
    with torch.inference_mode():
        for tile in tiles:
            torch.testing.assert_close(compiled(tile), network(tile), rtol=0, atol=1e-4)
            graphs.append(backend.frame_count)
    assert graphs[0] == graphs[-1] > 0

    assert have_the_same_gradients(network, compiled, lambda run, tile: run(tile).square().mean(), tiles)
