"""The encoder's attention on a device against SAM's own in float32 on the CPU, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor, nn

from desam_nnunet.encoders.attention import ExactAttention
from desam_nnunet.selftest.rows import Row, compared, in_precision, precisions

# Tokens a side and head dimension: windows of ViT-B and ViT-H, vit_tiny's; on a GPU also their global attention.
_SHAPES = ((14, 64), (14, 80), (8, 32), (24, 64))
_GLOBAL = ((64, 64), (64, 80))
_SHARPNESS = 2.0  # of the queries and keys: with PyTorch's initialisation every token would see all alike


def check_attention(device: torch.device) -> Iterator[Row]:
    """Every shape in every precision."""
    for side, dim in _SHAPES + (_GLOBAL if device.type == "cuda" else ()):
        plain = plain_attention(side, dim)
        for dtype in precisions(device):
            yield compare_attention(ExactAttention(copy.deepcopy(plain), 0), plain, device, dtype)


def plain_attention(side: int, dim: int) -> Attention:
    """SAM's, of one head with random weights, for `side` x `side` tokens."""
    attention = Attention(dim, 1, use_rel_pos=True, input_size=(side, side))
    with torch.no_grad():
        attention.qkv.weight[: 2 * dim] *= _SHARPNESS
    for table in (attention.rel_pos_h, attention.rel_pos_w):
        nn.init.normal_(table, std=0.1)
    return attention


def compare_attention(ours: ExactAttention, plain: Attention, device: torch.device, dtype: torch.dtype) -> Row:
    """Output without and with gradients, and the gradients of tokens and tables."""
    dim = plain.qkv.in_features
    tokens, weight = torch.randn(2, 1, ours.side, ours.side, dim)
    expected = _results(plain, tokens, weight)
    with in_precision(device, dtype):
        found = _results(ours.to(device), tokens.to(device), weight.to(device))
    return compared(f"attention, {ours.side**2} tokens of {dim}", found, expected, dtype)


def _results(attention: Any, tokens: Tensor, weight: Tensor) -> list[Tensor]:
    with torch.no_grad():
        alone = attention(tokens)
    tokens = tokens.clone().requires_grad_()
    output = attention(tokens)
    gradients = torch.autograd.grad((output.float() * weight).sum(), (tokens, attention.rel_pos_h, attention.rel_pos_w))
    return [alone, output, *gradients]
