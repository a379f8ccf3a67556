"""SAM's two-way transformer, evaluated for few prompt tokens on a large image.

The modules and weights are SAM's; the arithmetic is reordered, exactly. A prompt has T = 7 tokens, the image
thousands, so that projecting every image token to queries, keys and values costs more than all the rest:

- Where many prompts look at one image, its projections are made once and shared.
- Where every prompt has an image stream of its own, the projections are moved to the tokens' side:
  ``q · (W k + b) = (Wᵀ q) · k + const``, and the sum of projected values is the projected sum of values.

Source: Kirillov et al., Segment Anything, ICCV 2023, appendix A (lightweight mask decoder).
"""

from __future__ import annotations

import torch
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock, TwoWayTransformer
from torch import Tensor, nn
from torch.nn import functional as F


def run_layers(transformer: TwoWayTransformer, image: Tensor, positions: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    """Token stream (N, T, C) and image stream (N, P, C) after the last layer, before the final attention.

    Args:
        image: (N, P, C), or (1, P, C) where all prompts look at the same image.
        positions: The image's positional encoding, (1, P, C).
    """
    queries = tokens
    for layer in transformer.layers:
        queries = attend_among_tokens(layer, queries, tokens)
        keys = image + positions
        read = tokens_from_image(layer.cross_attn_token_to_image, queries + tokens, keys, image)
        queries = layer.norm2(queries + read)
        queries = layer.norm3(queries + layer.mlp(queries))
        image = add_tokens_to_image(layer.cross_attn_image_to_token, image, keys, queries + tokens, queries)
        image = layer.norm4(image)
    return queries, image


def attend_among_tokens(layer: TwoWayAttentionBlock, queries: Tensor, tokens: Tensor) -> Tensor:
    """The token stream (N, T, C) after a layer's attention among the tokens; `tokens` are what it began with."""
    if layer.skip_first_layer_pe:
        return layer.norm1(layer.self_attn(queries, queries, queries))
    placed = queries + tokens
    return layer.norm1(queries + layer.self_attn(placed, placed, queries))


def freeze_key_biases(transformer: TwoWayTransformer) -> None:
    """Freezes the biases of the keys that tokens look for in the image.

    They add the same to all scores of a query, which softmax ignores: their gradient is zero.
    """
    attentions = [layer.cross_attn_token_to_image for layer in transformer.layers]
    for attention in (*attentions, transformer.final_attn_token_to_image):
        attention.k_proj.bias.requires_grad_(False)


def tokens_from_image(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the tokens read from the image, (N, T, C): `q` (N, T, C) of `k` and `v` (N, P, C), or (1, P, C) for all."""
    batch, tokens, _ = q.shape
    heads = attention.num_heads
    queries = _split(attention.q_proj(q), heads)  # N heads T d
    if len(k) == 1:
        together = queries.transpose(0, 1).flatten(1, 2)[None]  # 1 heads N·T d
        keys, values = _split(attention.k_proj(k), heads), _split(attention.v_proj(v), heads)
        read = F.scaled_dot_product_attention(together, keys, values)
        read = read[0].unflatten(1, (batch, tokens)).transpose(0, 1)  # N heads T d
    else:
        moved = (queries @ _per_head(attention.k_proj, heads)).flatten(1, 2)  # N heads·T C
        scale = queries.shape[-1] ** -0.5
        pooled = F.scaled_dot_product_attention(moved[:, None], k[:, None], v[:, None], scale=scale)
        pooled = pooled.view(batch, heads, tokens, -1)
        bias = attention.v_proj.bias.view(heads, 1, -1)
        read = pooled @ _per_head(attention.v_proj, heads).transpose(1, 2) + bias
    return attention.out_proj(read.transpose(1, 2).flatten(2))


def add_tokens_to_image(attention: Attention, image: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The image stream plus what it reads from the tokens, (N, P, C): `k` and `v` are (N, T, C).

    Args:
        image, q: (N, P, C), or (1, P, C) for all.
    """
    batch, tokens, _ = k.shape
    heads = attention.num_heads
    keys = _split(attention.k_proj(k), heads)  # N heads T d
    keys = keys * keys.shape[-1] ** -0.5
    if len(q) == 1:
        queries = _split(attention.q_proj(q), heads)[0]  # heads P d
        together = keys.transpose(0, 1).flatten(1, 2)  # heads N·T d
        scores = (together @ queries.transpose(1, 2)).unflatten(1, (batch, tokens)).transpose(0, 1)  # N heads T P
    else:
        moved = (keys @ _per_head(attention.q_proj, heads)).flatten(1, 2)  # N heads·T C
        offset = (keys @ attention.q_proj.bias.view(heads, -1, 1)).flatten(1, 2)  # N heads·T 1
        scores = (torch.baddbmm(offset, moved, q.transpose(1, 2))).unflatten(1, (heads, tokens))
    weights = scores.softmax(2).flatten(1, 2)  # N heads·T P
    answers = _split(attention.v_proj(v), heads) @ attention.out_proj.weight.T.unflatten(0, (heads, -1))
    answers = answers + attention.out_proj.bias / heads  # every head's weights sum to one
    # Not baddbmm: under autocast it would round the stream itself to half precision.
    return image + weights.transpose(1, 2) @ answers.flatten(1, 2)


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # N L heads·d -> N heads L d


def _per_head(projection: nn.Linear, heads: int) -> Tensor:
    """A projection's weight as (heads, d, C)."""
    return projection.weight.unflatten(0, (heads, -1))
