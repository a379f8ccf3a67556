"""SAM's attention with decomposed relative positions, exactly, through scaled-dot-product attention.

With the query q of a head at row y and column x, and the key at row i and column j, SAM adds
``q · R_h[y, i] + q · R_w[y', j]`` to the scaled dot product: a bias that depends on the query, and that as a
whole is as large as the attention matrix. It is never made as a whole:

- *appended*: the query's products with the tables are appended to the query, and each key's row and column,
  one-hot, to the key. The dot product then holds the bias, and flash kernels do the rest. For every device and
  precision, with gradients.
- *banded*: for float32 without gradients on a CPU, the bias of a few rows of queries at a time is handed over
  as a mask that stays in the processor's cache; appended dimensions would triple the products there. On MPS too,
  where PyTorch makes the attention matrix of as many queries as it is given.

Without gradients, a CPU also takes one row of windows, and some tokens of the feed-forward, at a time: memory that
is used again costs less than new memory.

Source: Kirillov et al., Segment Anything, ICCV 2023 (image encoder); Li et al., MViTv2, CVPR 2022, section 4.1
(decomposed relative position embeddings).
"""

from __future__ import annotations

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, Block, window_partition, window_unpartition
from torch import Tensor, nn
from torch.nn import functional as F

from desam_nnunet.encoders.small_steps import in_small_steps, join

# Elements of the bias made at once on a CPU: 8 MiB in float32, found by measuring (docs/performance.md).
_BAND = 2**21
_STEP = 2048  # tokens that a CPU feeds forward at once: 24 MiB at ViT-B, which the allocator keeps
_ALIGNMENT = 8  # flash kernels want the head dimension in multiples of this


def use_exact_attention(vit: ImageEncoderViT) -> ImageEncoderViT:
    """Replaces every block, in place; the names and values of all weights stay as they are."""
    vit.blocks = nn.ModuleList(ExactBlock(block) for block in vit.blocks)
    return vit


class ExactBlock(nn.Module):
    """SAM's ``Block``, whose parameters it takes over: tokens (B, H, W, D) to tokens of the same shape."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1 = block.norm1
        self.attn = ExactAttention(block.attn, block.window_size)
        self.norm2 = block.norm2
        self.mlp = block.mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        tokens = self.norm2(x).flatten(0, 2)  # B H W D -> BHW D
        steps = tokens.split(_STEP) if in_small_steps(x) else [tokens]
        return x + join([self.mlp(step) for step in steps], 0).view_as(x)


class ExactAttention(nn.Module):
    """SAM's ``Attention`` with its division into windows: normalised tokens (B, H, W, D) to tokens of the same shape.

    ``qkv`` is called, so that an adapter in its place is used. SAM pads the tokens with zeros to whole windows and
    attends to the padding. Here only tokens that exist are projected: what padding becomes is the same everywhere, and
    what it would read is thrown away.

    Args:
        window: Side of a window in tokens; 0 for global attention.
    """

    def __init__(self, attention: Attention, window: int) -> None:
        super().__init__()
        self.window = window
        self.num_heads = attention.num_heads
        self.scale = attention.scale
        self.qkv = attention.qkv
        self.proj = attention.proj
        self.rel_pos_h = attention.rel_pos_h
        self.rel_pos_w = attention.rel_pos_w
        distances, dim = self.rel_pos_h.shape
        self.side = (distances + 1) // 2  # of the grid of tokens that the tables were made for
        self.places: Tensor
        self.register_buffer("places", _places(self.side, self.side, dim), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.window:
            return self.proj(self._attend(self.qkv(x)))
        padding = self.qkv(x.new_zeros(x.shape[-1]))
        large = x[..., 0].numel() > _STEP and in_small_steps(x)
        rows = x.split(self.window, dim=1) if large else [x]
        return join([self._attend_in_windows(row, padding) for row in rows], 1)

    def _attend_in_windows(self, x: Tensor, padding: Tensor) -> Tensor:
        """Attention on whole rows of windows; `padding` (3 D) is what a zero token is projected to."""
        qkv = self.qkv(x)
        batch, height, width, _ = qkv.shape
        rows, columns = (side + -side % self.window for side in (height, width))
        if (rows, columns) != (height, width):
            filled = padding.repeat(batch, rows, columns, 1)
            filled[:, :height, :width] = qkv
            qkv = filled
        windows, padded = window_partition(qkv, self.window)
        return self.proj(window_unpartition(self._attend(windows), self.window, padded, (height, width)))

    def _attend(self, qkv: Tensor) -> Tensor:
        """Attention within each image or window: (B, H, W, 3 D) -> (B, H, W, D)."""
        height, width = qkv.shape[1:3]
        split = qkv.flatten(1, 2).unflatten(2, (3, self.num_heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)  # B N 3 heads d -> B heads N d
        queries = q.unflatten(2, (height, width))
        rows = torch.einsum("bnyxd,yid->bnyxi", queries, relative_table(self.rel_pos_h, height)).flatten(2, 3)
        columns = torch.einsum("bnyxd,xjd->bnyxj", queries, relative_table(self.rel_pos_w, width)).flatten(2, 3)
        if in_small_steps(q, ("cpu", "mps")) and q.dtype == torch.float32:
            attended = _banded(q, k, v, rows, columns, self.scale)
        else:
            is_usual = height == width == self.side
            places = self.places if is_usual else _places(height, width, q.shape[-1]).to(q.device)
            attended = _appended(q, k, v, torch.cat([rows, columns], dim=-1), places, self.scale)
        return attended.transpose(1, 2).flatten(2).unflatten(1, (height, width))


def relative_table(table: Tensor, size: int) -> Tensor:
    """Embeddings (size, size, d) of every pair of query and key position along one axis.

    Args:
        table: Embeddings of the distances (L, d), interpolated linearly where `size` needs another L, as SAM does.
    """
    if len(table) != 2 * size - 1:
        table = F.interpolate(table.T[None], size=2 * size - 1, mode="linear")[0].T  # L d -> 1 d L -> L' d
    return table.flip(0).unfold(0, size, 1).flip(0).transpose(1, 2)  # size d size -> size size d


def _places(height: int, width: int, dim: int) -> Tensor:
    """Row and column of every token, one-hot (N, H + W), and zeros until flash kernels like them beside `dim` more."""
    places = torch.cat([torch.eye(height).repeat_interleave(width, 0), torch.eye(width).repeat(height, 1)], dim=1)
    return F.pad(places, (0, -(dim + height + width) % _ALIGNMENT))


def _appended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, places: Tensor, scale: float) -> Tensor:
    """Attention (B, heads, N, d) with the bias inside the dot product.

    Args:
        q, k, v: (B, heads, N, d), N the tokens of H rows and W columns.
        bias: The queries' products with the tables, (B, heads, N, H + W).
        places: See :func:`_places`.
    """
    more = places.shape[-1]
    bias = F.pad(bias, (0, more - bias.shape[-1])).to(q.dtype)
    places = places.to(k.dtype).expand(*k.shape[:2], -1, -1)
    queries, keys = torch.cat([q * scale, bias], dim=-1), torch.cat([k, places], dim=-1)
    return F.scaled_dot_product_attention(queries, keys, F.pad(v, (0, more)), scale=1.0)[..., :-more]


def _banded(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """The same, from the bias of a band of query rows at a time.

    Args:
        rows, columns: The queries' products with the tables, (B, heads, N, H) and (B, heads, N, W).
    """
    batch, heads, tokens, dim = q.shape
    height, width = rows.shape[-1], columns.shape[-1]
    band = max(1, min(height, _BAND // (width * tokens))) * width  # query tokens
    some_heads = max(1, min(heads, _BAND // (band * tokens)))
    some_windows = max(1, _BAND // (some_heads * band * tokens))
    attended = q.new_empty(batch, tokens, heads, dim).transpose(1, 2)  # as the caller joins the heads without a copy
    for windows in _parts(batch, some_windows):
        for group in _parts(heads, some_heads):
            keys, values = k[windows, group], v[windows, group]
            for queries in _parts(tokens, band):
                here = (windows, group, queries)
                bias = (rows[here][..., :, None] + columns[here][..., None, :]).flatten(3)
                attended[here] = F.scaled_dot_product_attention(q[here], keys, values, attn_mask=bias, scale=scale)
    return attended


def _parts(length: int, size: int) -> list[slice]:
    return [slice(begin, begin + size) for begin in range(0, length, size)]
