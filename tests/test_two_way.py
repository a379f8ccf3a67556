"""The reordered two-way transformer against SAM's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from desam_nnunet.encoders.sam_vit import build_transformer
from desam_nnunet.sam.two_way import add_tokens_to_image, freeze_key_biases, run_layers, tokens_from_image

DIM, PROMPTS, TOKENS, SIDE = 32, 5, 7, 6


@pytest.fixture
def transformer() -> nn.Module:
    torch.manual_seed(0)
    transformer = build_transformer(DIM)
    for parameter in transformer.parameters():  # SAM's initial biases are nearly zero
        nn.init.normal_(parameter, std=0.3)
    return transformer


def inputs(images: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.manual_seed(images)
    image = torch.randn(images, SIDE * SIDE, DIM, generator=generator)
    positions = torch.randn(1, SIDE * SIDE, DIM, generator=generator)
    return image, positions, torch.randn(PROMPTS, TOKENS, DIM, generator=generator)


@pytest.mark.parametrize("images", [1, PROMPTS])
def test_both_streams_are_sams(transformer: nn.Module, images: int) -> None:
    """Many prompts on one image, and an image per prompt."""
    image, positions, tokens = inputs(images)
    queries, stream = run_layers(transformer, image, positions, tokens)
    attended = tokens_from_image(transformer.final_attn_token_to_image, queries + tokens, stream + positions, stream)
    queries = transformer.norm_final_attn(queries + attended)

    def as_map(x: Tensor) -> Tensor:
        return x.expand(PROMPTS, -1, -1).transpose(1, 2).unflatten(2, (SIDE, SIDE))

    expected_queries, expected_stream = transformer(as_map(image), as_map(positions), tokens)
    torch.testing.assert_close(stream, expected_stream, rtol=0, atol=1e-4)
    torch.testing.assert_close(queries, expected_queries, rtol=0, atol=1e-4)


@pytest.mark.parametrize("images", [1, PROMPTS])
def test_each_attention_is_sams(transformer: nn.Module, images: int) -> None:
    image, positions, tokens = inputs(images)
    layer = transformer.layers[0]
    k = image + positions
    read = tokens_from_image(layer.cross_attn_token_to_image, tokens, k, image)
    everywhere = k.expand(PROMPTS, -1, -1), image.expand(PROMPTS, -1, -1)
    torch.testing.assert_close(read, layer.cross_attn_token_to_image(tokens, *everywhere), rtol=0, atol=1e-4)
    changed = add_tokens_to_image(layer.cross_attn_image_to_token, image, k, tokens, tokens * 2)
    expected = image + layer.cross_attn_image_to_token(everywhere[0], tokens, tokens * 2)
    torch.testing.assert_close(changed, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("images", [1, PROMPTS])
def test_half_precision_is_no_worse_than_sams(transformer: nn.Module, images: int) -> None:
    image, positions, tokens = inputs(images)
    with torch.no_grad():
        truth = run_layers(transformer, image, positions, tokens)[1]
        maps = [x.expand(PROMPTS, -1, -1).transpose(1, 2).unflatten(2, (SIDE, SIDE)) for x in (image, positions)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, theirs = run_layers(transformer, image, positions, tokens)[1], transformer(*maps, tokens)[1]
    error, allowed = ((x - truth).norm() / truth.norm() for x in (ours, theirs))
    assert error < 1.2 * allowed


@pytest.mark.parametrize("images", [1, PROMPTS])
def test_gradients_are_sams_and_a_keys_bias_has_none(transformer: nn.Module, images: int) -> None:
    image, positions, tokens = inputs(images)
    theirs = copy.deepcopy(transformer)
    freeze_key_biases(transformer)
    weight = torch.randn(PROMPTS, SIDE * SIDE, DIM)
    (run_layers(transformer, image, positions, tokens)[1] * weight).sum().backward()
    maps = [x.expand(PROMPTS, -1, -1).transpose(1, 2).unflatten(2, (SIDE, SIDE)) for x in (image, positions)]
    (theirs(*maps, tokens)[1] * weight).sum().backward()
    for (name, ours), parameter in zip(transformer.named_parameters(), theirs.parameters(), strict=True):
        if "final" in name:
            continue
        if name.endswith("token_to_image.k_proj.bias"):
            assert not ours.requires_grad
            torch.testing.assert_close(parameter.grad, torch.zeros(16), rtol=0, atol=1e-3)
        else:
            torch.testing.assert_close(ours.grad, parameter.grad, rtol=1e-3, atol=1e-3, msg=name)
