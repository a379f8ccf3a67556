"""torch.compile on training's and prediction's way through the network."""

from __future__ import annotations

from typing import Any

import pytest
import test_dbsam
import test_samed
import torch
from test_network import make
from torch._dynamo.testing import CompileCounterWithBackend

from desam_nnunet.sam.prompts import Prompts


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def backend(request: pytest.FixtureRequest) -> CompileCounterWithBackend:
    torch._dynamo.reset()
    return CompileCounterWithBackend(request.param)


@torch.inference_mode()
def test_prediction_compiles_the_networks_and_does_not_recompile(backend: CompileCounterWithBackend) -> None:
    network = make(2, iou_threshold=-1e9)
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
    features = network.encode(torch.randn(2, 1, 64, 64))
    prompts = Prompts(points=torch.full((2, 1, 2), 9.0))

    def gradients(run: Any) -> list[torch.Tensor]:
        network.zero_grad()
        masks, scores = run(features, prompts)
        (masks.square().mean() + scores.square().mean()).backward()
        return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]

    expected = gradients(network)
    found = gradients(torch.compile(network, backend=backend))
    assert backend.frame_count > 0
    for ours, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-4 * max(1.0, float(eager.abs().max())))


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

    def gradients(run: Any) -> list[torch.Tensor]:
        network.zero_grad()
        run(tiles[0]).square().mean().backward()
        return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]

    for ours, eager in zip(gradients(compiled), gradients(network), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-4 * max(1.0, float(eager.abs().max())))
