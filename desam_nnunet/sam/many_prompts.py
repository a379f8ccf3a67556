"""SAM's two-way transformer for many prompts on one image, whose image streams are never made.

What an attention adds to a token of the image are the answers of J = heads · T prompt tokens (T = 7), weighted. So the
image stream (P, C) of a prompt is

    scale · base  +  the sum over attentions of  weights (P, J) · answers (J, C)  +  constant

where `base` (P, C) and `constant` (C,) are the same for all prompts. Projections and norms of such a sum follow from
those of its parts, exactly: products with C = 256 channels, for every prompt, become products with the d = 16 channels
of a head and with the J = 56 weights. The modules and weights are SAM's. For prediction alone: it keeps no gradients.

Source: Kirillov et al., Segment Anything, ICCV 2023, appendix A (lightweight mask decoder); the order is ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from segment_anything.modeling import TwoWayTransformer
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F

from desam_nnunet.sam.two_way import attend_among_tokens


class ManyPrompts:
    """One image, prepared for any number of prompts.

    Args:
        image: (P, C), in float32 as the weights are.
        positions: Its positional encoding, (P, C).
    """

    def __init__(self, transformer: TwoWayTransformer, image: Tensor, positions: Tensor) -> None:
        self.transformer = transformer
        self._reads: list[_Read] = []
        self._writes: list[_Write] = []
        self._buffers = _Buffers(image)
        rows = _Rows(image, (), torch.zeros_like(image[0]))
        for layer in transformer.layers:
            self._reads.append(_Read.of(rows, layer.cross_attn_token_to_image, positions))
            attention = layer.cross_attn_image_to_token
            queries = _project(rows, attention.q_proj, attention.num_heads, positions)
            rows = rows.answered(attention)
            self._writes.append(_Write(queries, _Squares.of(rows)))
            rows = rows.after(layer.norm4)
        self._reads.append(_Read.of(rows, transformer.final_attn_token_to_image, positions))

    @torch.compiler.disable
    def first_token(self, tokens: Tensor) -> Tensor:
        """The first token of each prompt (N, T, C) after the final attention and its norm, (N, C)."""
        queries, streams = tokens, _Streams(self._buffers)
        for layer, read, write in zip(self.transformer.layers, self._reads[:-1], self._writes, strict=True):
            queries = attend_among_tokens(layer, queries, tokens)
            queries = layer.norm2(queries + streams.read(read, layer.cross_attn_token_to_image, queries + tokens))
            queries = layer.norm3(queries + layer.mlp(queries))
            streams.write(write, layer, queries + tokens, queries)
        first, attention = queries[:, :1], self.transformer.final_attn_token_to_image
        first = first + streams.read(self._reads[-1], attention, first + tokens[:, :1])
        return self.transformer.norm_final_attn(first)[:, 0]


class _Rows(NamedTuple):
    """What the streams of all prompts share.

    Attributes:
        base: (P, C).
        maps: Of each attention, (heads, d + 1, C): an answer is a value (d,) and a 1, times its head's map.
        constant: (C,).
    """

    base: Tensor
    maps: tuple[Tensor, ...]
    constant: Tensor

    def answered(self, attention: Attention) -> _Rows:
        """With one more attention, and centred. A head's weights sum to one: its answers take the constant along."""
        heads = attention.num_heads
        rest = ((attention.out_proj.bias + self.constant) / heads).expand(heads, 1, -1)
        new = torch.cat([attention.out_proj.weight.T.unflatten(0, (heads, -1)), rest], dim=1)
        base, *maps = (x - x.mean(-1, keepdim=True) for x in (self.base, *self.maps, new))
        return _Rows(base, tuple(maps), torch.zeros_like(self.constant))

    def after(self, norm: nn.LayerNorm) -> _Rows:
        """Of centred rows: after a norm, but for the deviations, which differ from prompt to prompt."""
        return _Rows(self.base * norm.weight, tuple(x * norm.weight for x in self.maps), norm.bias)


class _Projection(NamedTuple):
    """Rows as the heads of an attention see them.

    Attributes:
        base: (heads, d, P).
        maps: Of each attention before, (heads, d, heads · (d + 1)).
        rest: Of the constant, and of positions where they are added, (heads, d, P or 1).
    """

    base: Tensor
    maps: tuple[Tensor, ...]
    rest: Tensor


def _project(rows: _Rows, linear: nn.Linear, heads: int, positions: Tensor | None = None) -> _Projection:
    constant = rows.constant[None] if positions is None else rows.constant + positions
    rest = F.linear(constant, linear.weight, linear.bias).T
    flat = (linear.weight @ rows.base.T, rest, *(linear.weight @ x.flatten(0, 1).T for x in rows.maps))
    base, rest, *maps = (x.unflatten(0, (heads, -1)) for x in flat)
    return _Projection(base, tuple(maps), rest)


class _Read(NamedTuple):
    """The image as keys and values of tokens."""

    keys: _Projection
    values: _Projection

    @classmethod
    def of(cls, rows: _Rows, attention: Attention, positions: Tensor) -> _Read:
        heads = attention.num_heads
        return cls(_project(rows, attention.k_proj, heads, positions), _project(rows, attention.v_proj, heads))


class _Squares(NamedTuple):
    """Products of the parts of centred rows, which make the square of their sum.

    Attributes:
        base: Of the base with itself, (P,).
        mixed: Of each map with the base, doubled, (heads, d + 1, P).
        maps: Of each map with every one before, doubled, and with itself, (heads, d + 1, heads · (d + 1)).
        channels: C.
    """

    base: Tensor
    mixed: tuple[Tensor, ...]
    maps: tuple[tuple[Tensor, ...], ...]
    channels: int

    @classmethod
    def of(cls, rows: _Rows) -> _Squares:
        flat = [x.flatten(0, 1) for x in rows.maps]

        def product(x: Tensor, y: Tensor) -> Tensor:
            return (x @ y.T if x is y else 2 * x @ y.T).unflatten(0, rows.maps[0].shape[:2])

        maps = tuple(tuple(product(x, y) for y in flat[: place + 1]) for place, x in enumerate(flat))
        return cls(rows.base.square().sum(1), tuple(product(x, rows.base) for x in flat), maps, rows.base.shape[1])


class _Write(NamedTuple):
    """The image as queries to tokens, and what its norm needs once it is answered."""

    queries: _Projection
    squares: _Squares


class _Buffers:
    """Memory that is used again and again: on a CPU, new memory costs more than what is computed in it."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._known: dict[str, Tensor] = {}

    def get(self, name: str, *shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        if name not in self._known or self._known[name].numel() < size:
            self._known[name] = self._like.new_empty(size)
        return self._known[name][:size].view(shape)


class _Streams:
    """The streams of N prompts, as far as they differ.

    Attributes:
        scale: (N, 1, P), None where it is 1.
        weights: Of each attention, (N, J, P).
        values: Of each attention, (heads, N, T, d + 1).
    """

    def __init__(self, buffers: _Buffers) -> None:
        self.scale: Tensor | None = None
        self.weights: list[Tensor] = []
        self.values: list[Tensor] = []
        self._buffers = buffers

    def read(self, image: _Read, attention: Attention, tokens: Tensor) -> Tensor:
        """What tokens (N, T', C) read from the streams, (N, T', C)."""
        q = _split(attention.q_proj(tokens), attention.num_heads)
        weights = self._scores(q * q.shape[-1] ** -0.5, image.keys)  # N heads T' P
        weights = weights.sub_(weights.amax(-1, keepdim=True)).exp_()
        total = weights.sum(-1).transpose(0, 1)[..., None]
        found = self._of_base(weights, image.values)  # heads N T' d
        for before, values, seen in zip(self.weights, self.values, image.values.maps, strict=True):
            found = found + _unmixed(weights.flatten(1, 2) @ before.mT, values, seen)
        found = found / total + image.values.rest.mT[:, None]
        return attention.out_proj(found.permute(1, 2, 0, 3).flatten(2))

    def write(self, image: _Write, layer: TwoWayAttentionBlock, keys: Tensor, values: Tensor) -> None:
        """Adds what the streams read from tokens, given as keys and values (N, T, C), and takes the layer's norm."""
        attention = layer.cross_attn_image_to_token
        k, v = (_split(x, attention.num_heads) for x in (attention.k_proj(keys), attention.v_proj(values)))
        scores = self._scores(k * k.shape[-1] ** -0.5, image.queries)  # N heads T P
        weights = self._buffers.get(f"weights {len(self.weights)}", *scores.shape)
        torch.sub(scores, scores.amax(2, keepdim=True), out=weights).exp_()
        weights.div_(weights.sum(2, keepdim=True))
        self.weights.append(weights.flatten(1, 2))
        self.values.append(torch.cat([v, torch.ones_like(v[..., :1])], dim=-1))
        self._normalise(image.squares, layer.norm4.eps)

    def _scores(self, q: Tensor, rows: _Projection) -> Tensor:
        """Products with rows, (N, heads, T', P), of q (heads, N, T', d)."""
        rest, base = self._by_head("rest", q, rows.rest), self._by_head("base", q, rows.base)
        if self.scale is None:
            return rest.add_(base)
        return self._mixed(q, rows.maps).view(rest.shape).addcmul_(base, self.scale[:, None]).add_(rest)

    def _normalise(self, squares: _Squares, eps: float) -> None:
        """Divides the streams, which are centred, by their deviations (P,)."""
        total = squares.base if self.scale is None else self.scale.square() * squares.base
        for weights, values, base, maps in zip(self.weights, self.values, squares.mixed, squares.maps, strict=True):
            part, mixed = self._mixed(values, maps), self._by_head("base", values, base)
            view = part.view(mixed.shape)
            view = view.add_(mixed) if self.scale is None else view.addcmul_(mixed, self.scale[:, None])
            total = total + part.mul_(weights).sum(1, keepdim=True)
        factor = (total / squares.channels).clamp_(min=0).add_(eps).rsqrt_()
        self.scale = factor if self.scale is None else self.scale * factor
        for weights in self.weights:
            weights.mul_(factor)

    def _by_head(self, name: str, q: Tensor, rows: Tensor) -> Tensor:
        """Products of q (heads, N, T', d) and rows (heads, d, P), (N, heads, T', P)."""
        out = self._buffers.get(name, *q.shape[:3], rows.shape[2])
        torch.bmm(q.flatten(1, 2), rows, out=out.flatten(1, 2))
        return out.transpose(0, 1)

    def _of_base(self, weights: Tensor, rows: _Projection) -> Tensor:
        """The base as values, (heads, N, T', d), summed with weights (N, heads, T', P)."""
        weights = weights.transpose(0, 1)
        out = self._buffers.get("base", *weights.shape)
        out = out.copy_(weights) if self.scale is None else torch.mul(weights, self.scale[:, 0, None], out=out)
        return (out.flatten(1, 2) @ rows.base.mT).unflatten(1, out.shape[1:3])

    def _mixed(self, q: Tensor, maps: tuple[Tensor, ...]) -> Tensor:
        """Products of q (heads, N, T', d) with the answers of some attentions, weighted, (N, J', P)."""
        heads, n, tokens, _ = q.shape
        out = self._buffers.get("mixed", n, heads * tokens, self.weights[0].shape[2])
        for place, (seen, values, weights) in enumerate(zip(maps, self.values, self.weights, strict=False)):
            out.baddbmm_(_mixing(q, seen, values), weights, beta=min(place, 1))
        return out


def _mixing(q: Tensor, maps: Tensor, values: Tensor) -> Tensor:
    """Products of q (heads, N, T', d) with the answers of values (heads, N, T, d + 1), (N, J', J)."""
    seen = (q.flatten(1, 2) @ maps).unflatten(1, q.shape[1:3]).unflatten(3, (len(values), -1))
    seen = seen.permute(3, 1, 0, 2, 4).flatten(2, 3)  # h' N T' h d+1 -> h N J' d+1
    return (seen @ values.mT).permute(1, 2, 0, 3).flatten(2)


def _unmixed(sums: Tensor, values: Tensor, maps: Tensor) -> Tensor:
    """Answers of values (heads, N, T, d + 1), weighted by sums (N, J', J), as a layer sees them, (heads, N, T', d)."""
    heads = len(values)
    answers = sums.unflatten(2, (heads, -1)).permute(2, 0, 1, 3) @ values  # h N J' d+1
    answers = answers.unflatten(2, (heads, -1)).permute(2, 1, 3, 0, 4).flatten(3)  # h' N T' h·(d+1)
    return (answers.flatten(1, 2) @ maps.mT).unflatten(1, answers.shape[1:3])


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1)).permute(2, 0, 1, 3)  # N T heads·d -> heads N T d
