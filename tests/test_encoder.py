"""The frozen encoder: SAM's own outputs, and frozen indeed."""

from __future__ import annotations

import pytest
import torch

from desam_nnunet.sam.encoder import FrozenEncoder
from desam_nnunet.sam.weights import load_sam


@pytest.fixture(scope="module")
def encoder() -> FrozenEncoder:
    return load_sam("vit_tiny", 128).encoder


def test_neck_is_sams_forward_and_levels_are_its_blocks(encoder: FrozenEncoder) -> None:
    images = torch.randn(2, 3, 128, 128)
    outputs = []
    hooks = [encoder.vit.blocks[index].register_forward_hook(lambda _module, _input, output: outputs.append(output))
             for index in (1, 3, 5)]
    features = encoder(images)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(features.neck, encoder.vit(images), rtol=0, atol=0)
    assert len(features.levels) == 3
    for level, output in zip(features.levels, outputs, strict=True):
        torch.testing.assert_close(level, output.permute(0, 3, 1, 2), rtol=0, atol=0)


def test_never_trains(encoder: FrozenEncoder) -> None:
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    assert not encoder(images).neck.requires_grad


@pytest.mark.parametrize("size", [64, 192, 256, 320])
def test_other_input_sizes(size: int) -> None:
    features = load_sam("vit_tiny", size).encoder(torch.randn(1, 3, size, size))
    assert features.neck.shape == (1, 128, size // 16, size // 16)
    assert features.levels[0].shape == (1, 192, size // 16, size // 16)


def test_checksum_sees_a_changed_bit(encoder: FrozenEncoder) -> None:
    before = encoder.checksum()
    bias = encoder.vit.neck[1].bias
    bias.data[0] += 1e-7
    assert encoder.checksum() != before
    bias.data[0] = 0
    assert encoder.checksum() == before
