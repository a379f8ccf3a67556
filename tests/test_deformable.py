"""Deformable attention against a loop over queries, heads, maps and points that follows the paper word by word."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from desam_nnunet.networks.dbsam.deformable import DeformableAttention


def pixel(value: Tensor, row: int, column: int) -> Tensor:
    """Of a map (h, w, d); zero outside."""
    height, width, _ = value.shape
    inside = 0 <= row < height and 0 <= column < width
    return value[row, column] if inside else torch.zeros_like(value[0, 0])


def bilinear(value: Tensor, x: float, y: float) -> Tensor:
    """At a place in pixels, pixel centres at whole numbers."""
    left, top = math.floor(x), math.floor(y)
    right, down = x - left, y - top
    return ((1 - right) * (1 - down) * pixel(value, top, left) + right * (1 - down) * pixel(value, top, left + 1)
            + (1 - right) * down * pixel(value, top + 1, left) + right * down * pixel(value, top + 1, left + 1))


def slow(layer: DeformableAttention, queries: Tensor, places: Tensor, maps: Tensor) -> Tensor:
    batch, count, dim = queries.shape
    levels, height, width = maps.shape[1:4]
    size = dim // layer.heads
    out = torch.zeros(batch, count, dim)
    for b in range(batch):
        values = layer.values(maps[b])
        for q in range(count):
            offsets = layer.offsets(queries[b, q]).view(layer.heads, levels, layer.points, 2)
            weights = layer.weights(queries[b, q]).view(layer.heads, levels * layer.points).softmax(-1)
            for head in range(layer.heads):
                part = slice(head * size, (head + 1) * size)
                for level in range(levels):
                    for point in range(layer.points):
                        x = float(places[q, 0] * width + offsets[head, level, point, 0]) - 0.5
                        y = float(places[q, 1] * height + offsets[head, level, point, 1]) - 0.5
                        weight = weights[head, level * layer.points + point]
                        out[b, q, part] += weight * bilinear(values[level, ..., part], x, y)
    return layer.project(out)


@pytest.mark.parametrize(("levels", "points"), [(1, 1), (3, 2)])
def test_equals_the_loop(levels: int, points: int) -> None:
    layer = DeformableAttention(12, heads=3, levels=levels, points=points)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    queries, maps = torch.randn(2, 5, 12), torch.randn(2, levels, 4, 6, 12)
    places = torch.rand(5, 2)
    with torch.no_grad():
        torch.testing.assert_close(layer(queries, places, maps), slow(layer, queries, places, maps), rtol=0, atol=1e-5)


def test_starts_around_the_query_with_equal_weights() -> None:
    layer = DeformableAttention(8, heads=4, levels=1, points=2)
    offsets = layer.offsets(torch.randn(8)).view(4, 1, 2, 2)
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    torch.testing.assert_close(offsets[:, 0, 0], expected)
    torch.testing.assert_close(offsets[:, 0, 1], 2 * expected)
    assert layer.weights(torch.randn(8)).eq(0).all()


def test_gradients_reach_everything() -> None:
    layer = DeformableAttention(8, heads=2, levels=2)
    queries, maps = torch.randn(1, 3, 8, requires_grad=True), torch.randn(1, 2, 4, 4, 8, requires_grad=True)
    layer(queries, torch.rand(3, 2), maps).sum().backward()
    for tensor in (maps, *layer.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0
