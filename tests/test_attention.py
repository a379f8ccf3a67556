"""Exact attention against SAM's own, block by block."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Operations
from segment_anything.modeling.image_encoder import Attention, Block
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from desam_nnunet.encoders import attention
from desam_nnunet.encoders.attention import ExactBlock, use_exact_attention
from desam_nnunet.encoders.registry import ENCODERS
from desam_nnunet.encoders.sam_vit import build_sam


def stock_block(*, window: int, table: int, dim: int = 64, heads: int = 2) -> Block:
    """A block of SAM's with tables that matter: SAM initialises them with zeros."""
    torch.manual_seed(0)
    block = Block(dim, heads, use_rel_pos=True, window_size=window, input_size=(table, table))
    nn.init.normal_(block.attn.rel_pos_h, std=0.3)
    nn.init.normal_(block.attn.rel_pos_w, std=0.3)
    return block


def exact(block: Block) -> ExactBlock:
    return ExactBlock(copy.deepcopy(block))


@pytest.mark.parametrize(("window", "table", "height", "width"), [
    (0, 16, 16, 16),  # global
    (0, 16, 24, 24),  # global, another input size than the table's: interpolated
    (0, 16, 8, 8),
    (0, 16, 16, 8),  # not square
    (7, 7, 14, 14),  # windows that fit
    (7, 7, 16, 16),  # windows with padding, which is attended to
    (7, 7, 4, 4),  # an image smaller than the window
])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_block_is_sams_block(window: int, table: int, height: int, width: int, gradients: bool) -> None:
    stock = stock_block(window=window, table=table)
    tokens = torch.randn(2, height, width, 64)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(exact(stock)(tokens), stock(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [0, 7])
def test_small_steps_are_one_large_step(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    stock = stock_block(window=window, table=window or 16)
    tokens = torch.randn(2, 16, 16, 64)
    with torch.no_grad():
        at_once = exact(stock)(tokens)
        monkeypatch.setattr(attention, "_STEP", 100)
        torch.testing.assert_close(exact(stock)(tokens), at_once, rtol=0, atol=1e-5)
        torch.testing.assert_close(at_once, stock(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("band", [1, 200, 4096, 10**9])
def test_bands_of_any_size_agree(monkeypatch: pytest.MonkeyPatch, band: int) -> None:
    monkeypatch.setattr(attention, "_BAND", band)
    stock = stock_block(window=0, table=8)
    tokens = torch.randn(3, 8, 8, 64)
    with torch.no_grad():
        torch.testing.assert_close(exact(stock)(tokens), stock(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [0, 7])
def test_gradients_are_sams(window: int) -> None:
    stock = stock_block(window=window, table=window or 12)
    ours = exact(stock)
    tokens = [torch.randn(1, 12, 12, 64, generator=torch.manual_seed(1)).requires_grad_() for _ in range(2)]
    weight = torch.randn(1, 12, 12, 64)
    for block, x in zip((stock, ours), tokens, strict=True):
        (block(x) * weight).sum().backward()
    torch.testing.assert_close(tokens[1].grad, tokens[0].grad, rtol=0, atol=1e-4)
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-3, msg=name)


@pytest.mark.parametrize("window", [0, 7])
def test_bfloat16_is_no_worse_than_sams(window: int) -> None:
    stock = stock_block(window=window, table=window or 16)
    tokens = torch.randn(1, 16, 16, 64)
    with torch.no_grad():
        truth = stock(tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs, ours = stock(tokens), exact(stock)(tokens)
    error, allowed = ((x - truth).norm() / truth.norm() for x in (ours, theirs))
    assert error < 1.1 * allowed


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple) else (result,):
            if isinstance(value, Tensor) and value.storage_offset() == 0 and value.is_contiguous():
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize("gradients", [False, True])
def test_the_bias_is_never_materialised(gradients: bool) -> None:
    """48 x 48 tokens, two heads: attention matrix and bias have 2 · 48⁴ elements."""
    block = exact(stock_block(window=0, table=48))
    tokens = torch.randn(1, 48, 48, 64)
    with torch.set_grad_enabled(gradients), LargestTensor() as seen:
        block.attn(tokens)
    assert 0 < seen.largest <= attention._BAND < 2 * 48**4


def test_a_whole_encoder_keeps_its_keys_and_its_output() -> None:
    stock = build_sam(ENCODERS["vit_tiny"].architecture, 192).image_encoder.eval()
    for block in stock.blocks:
        nn.init.normal_(block.attn.rel_pos_h, std=0.3)
    ours = use_exact_attention(copy.deepcopy(stock))
    assert ours.state_dict().keys() == stock.state_dict().keys()
    assert not any(isinstance(module, Attention) for module in ours.modules())
    images = torch.randn(1, 3, 192, 192)
    with torch.no_grad():
        expected = stock(images)
        torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("window", [0, 7])
def test_places_of_the_tokens_are_made_once(window: int) -> None:
    block = exact(stock_block(window=window, table=window or 16))
    with Operations() as seen:
        block(torch.randn(1, 16, 16, 64))  # with gradients
    assert not {"arange", "eye", "one_hot", "lift_fresh"} & set(seen.names)


def test_an_adapter_in_place_of_qkv_is_used() -> None:
    block = exact(stock_block(window=0, table=8))
    seen = []
    block.attn.qkv.register_forward_hook(lambda _module, _input, output: seen.append(output.shape))
    block(torch.randn(1, 8, 8, 64))
    assert seen == [(1, 8, 8, 192)]


def test_padding_is_not_projected() -> None:
    block = exact(stock_block(window=7, table=7))
    tokens = []
    for layer in (block.attn.qkv, block.attn.proj):
        layer.register_forward_hook(lambda _module, inputs, _output: tokens.append(inputs[0].numel() // 64))
    block(torch.randn(1, 8, 8, 64))
    assert tokens == [1, 64, 64]  # 1: what padding becomes
