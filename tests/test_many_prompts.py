"""Scores of many prompts without their image streams against SAM's own transformer."""

from __future__ import annotations

import pytest
import torch
from test_network import ANYTHING, make
from test_two_way import PROMPTS, inputs, transformer  # noqa: F401
from torch import Tensor, nn

from desam_nnunet.networks.desam import network as networks
from desam_nnunet.sam.many_prompts import ManyPrompts
from desam_nnunet.sam.prompts import Prompts


@pytest.mark.parametrize("together", [1, 3, PROMPTS])
@torch.no_grad()
def test_the_first_token_is_sams(transformer: nn.Module, together: int) -> None:  # noqa: F811
    """However many prompts share the buffers, the last ones fewer than those before."""
    image, positions, tokens = inputs(1)
    found = many_prompts(transformer, image[0], positions[0], tokens, together)
    maps = [x.expand(PROMPTS, -1, -1).transpose(1, 2).unflatten(2, (6, 6)) for x in (image, positions)]
    torch.testing.assert_close(found, transformer(*maps, tokens)[0][:, 0], rtol=0, atol=2e-5)


@torch.no_grad()
def test_in_float64_both_are_the_same_function(transformer: nn.Module) -> None:  # noqa: F811
    image, positions, tokens = (x.double() for x in inputs(1))
    found = many_prompts(transformer.double(), image[0], positions[0], tokens, PROMPTS)
    maps = [x.expand(PROMPTS, -1, -1).transpose(1, 2).unflatten(2, (6, 6)) for x in (image, positions)]
    torch.testing.assert_close(found, transformer(*maps, tokens)[0][:, 0], rtol=0, atol=1e-12)


@torch.no_grad()
def test_extreme_scores_do_not_overflow(transformer: nn.Module) -> None:  # noqa: F811
    image, positions, tokens = inputs(1)
    found = many_prompts(transformer, 100 * image[0], positions[0], 100 * tokens, PROMPTS)
    maps = [x.expand(PROMPTS, -1, -1).transpose(1, 2).unflatten(2, (6, 6)) for x in (100 * image, positions)]
    torch.testing.assert_close(found, transformer(*maps, 100 * tokens)[0][:, 0], rtol=0, atol=1e-3)


def many_prompts(transformer: nn.Module, image: Tensor, positions: Tensor, tokens: Tensor, together: int) -> Tensor:  # noqa: F811
    many = ManyPrompts(transformer, image, positions)
    return torch.cat([many.first_token(part) for part in tokens.split(together)])


def test_scores_of_the_grid_are_prims_own() -> None:
    """Which training learns from; and they need no gradients."""
    network, tile = make(3, ANYTHING), torch.randn(1, 1, 48, 64)
    features, geometry = network.encode(tile), network.geometry(tile)
    scores = network.scores(features, geometry)
    assert not scores.requires_grad
    points = ANYTHING.points(geometry, tile.device)
    expected = network._prim(features.neck, Prompts(points=points), score=True).iou
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_halves_where_the_memory_is_too_small_give_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    network, tile = make(2, ANYTHING), torch.randn(1, 1, 48, 64)
    features, geometry = network.encode(tile), network.geometry(tile)
    expected, scores = network.scores(features, geometry), networks.PRIM.scores
    asked: list[int] = []

    def small(prim: networks.PRIM, image: ManyPrompts, sparse: Tensor) -> Tensor:
        asked.append(len(sparse))
        if len(sparse) > 2:
            raise torch.OutOfMemoryError
        return scores(prim, image, sparse)

    monkeypatch.setattr(networks.PRIM, "scores", small)
    torch.testing.assert_close(network.scores(features, geometry), expected, rtol=0, atol=1e-5)
    assert asked == [9, 5, 3, 2, 1, 2, 4, 2, 2]
