"""The frozen encoder: SAM's own outputs, and frozen indeed."""

from __future__ import annotations

import pytest
import torch
from conftest import checksum, tiny_sam

from desam_nnunet.encoders.base import Encoder
from desam_nnunet.encoders.registry import ENCODERS
from desam_nnunet.encoders.sam_vit import build_sam
from desam_nnunet.encoders.weights import load_encoder


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return tiny_sam().encoder


@torch.no_grad()
def test_neck_is_sams_forward_and_levels_are_its_blocks(encoder: Encoder) -> None:
    stock = build_sam(ENCODERS["vit_tiny"].architecture, 128).image_encoder
    stock.load_state_dict(encoder.network.state_dict())
    images = torch.randn(2, 3, 128, 128)
    outputs = []
    for index in (1, 3, 5):
        stock.blocks[index].register_forward_hook(lambda _module, _input, output: outputs.append(output))
    neck = stock(images)
    features = encoder(images)
    torch.testing.assert_close(features.neck, neck, rtol=0, atol=1e-4 * neck.abs().max())
    assert len(features.levels) == 3
    for level, output in zip(features.levels, outputs, strict=True):
        torch.testing.assert_close(level, output.permute(0, 3, 1, 2), rtol=0, atol=1e-4 * output.abs().max())


@pytest.mark.parametrize(("device", "natively", "expected"), [
    ("cuda", True, torch.bfloat16), ("cuda", False, torch.float16), ("cpu", True, torch.bfloat16),
    ("cpu", False, torch.float32), ("mps", True, torch.float32),
])
def test_precision_suits_the_device(
    monkeypatch: pytest.MonkeyPatch, device: str, natively: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: natively)
    found = {"avx512_bf16": True, "amx_bf16": natively}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert load_encoder("vit_tiny", 128).encoder.precision(torch.device(device)) == expected


def test_bfloat16_changes_little_and_hands_on_float32() -> None:
    """About three decimal digits remain."""
    exact, rough = (load_encoder("vit_tiny", 128).encoder for _ in range(2))
    exact.dtype, rough.dtype = torch.float32, torch.bfloat16
    images = torch.randn(1, 3, 128, 128)
    for one, other in zip((*exact(images).levels, exact(images).neck), (*rough(images).levels, rough(images).neck),
                          strict=True):
        assert other.dtype == torch.float32
        error = (one - other).norm() / one.norm()
        assert 1e-5 < error < 2e-2


@pytest.mark.parametrize("name", ["vit_tiny", "lite_medsam", "timm_random/test_vit", "timm_random/convnext_atto"])
def test_weights_that_are_cast_once_are_those_that_autocast_makes(name: str) -> None:
    """Bit by bit; as a GPU computes, whose copies are kept."""
    encoder = load_encoder(name, 128).encoder
    encoder.dtype = torch.bfloat16
    before, images = checksum(encoder), torch.randn(1, 3, 128, 128)
    with torch.inference_mode(), encoder.autocast(images.device):
        once, each_time = encoder.cast().run(images), encoder.run(images)
    for one, other in zip(once.tensors, each_time.tensors, strict=True):
        assert torch.equal(one, other)
    assert encoder.cast() is encoder.cast() is not encoder
    assert checksum(encoder) == before
    assert not next(encoder.cast().network.parameters()).is_inference()
    encoder.dtype = torch.float32
    assert encoder.cast() is encoder
    encoder.to("cpu")
    assert encoder._cast == []


def test_never_trains(encoder: Encoder) -> None:
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    assert not encoder(images).neck.requires_grad


@pytest.mark.parametrize("size", [64, 192, 256, 320])
def test_other_input_sizes(size: int) -> None:
    features = load_encoder("vit_tiny", size).encoder(torch.randn(1, 3, size, size))
    assert features.neck.shape == (1, 128, size // 16, size // 16)
    assert features.levels[0].shape == (1, 192, size // 16, size // 16)


def test_checksum_sees_a_changed_bit(encoder: Encoder) -> None:
    before = checksum(encoder)
    bias = encoder.network.neck[1].bias
    value = bias.data[0].clone()
    bias.data[0] = torch.nextafter(value, value + 1)
    assert checksum(encoder) != before
    bias.data[0] = value
    assert checksum(encoder) == before
