"""TinyViT as it runs once its weights are frozen: the same features but for rounding, in about half the time on a CPU.

- Batch norms are part of the convolutions before them, and convolutions of one pixel are matrix products.
- The position bias is handed to scaled-dot-product attention in the form for which there are fused kernels.
- Without gradients, a CPU works in portions that stay in its cache: bands of rows in the first stage, whose maps have
  256 channels at full resolution, and some tokens at a time elsewhere.

Source: Wu et al., TinyViT, ECCV 2022, section 4 (the blocks); ``timm.models.tiny_vit`` (their modules).
"""

from __future__ import annotations

from typing import Any

from timm.models.tiny_vit import Attention, ConvNorm, MBConv, NormMlp
from torch import Tensor, nn
from torch.nn import functional as F

from desam_nnunet.encoders.small_steps import in_small_steps, join

# Found by measuring (docs/performance.md).
_BAND = 2**20  # elements of a band of the first stage's widest map: 4 MiB in float32
_TOKENS = 2048  # at once


def frozen_form(network: nn.Module) -> nn.Module:
    """Replaces timm's modules within `network`, in place; their weights are taken over."""
    for name, child in network.named_children():
        if isinstance(child, ConvNorm):
            setattr(network, name, _fused(child))
            continue
        frozen_form(child)
        if isinstance(child, MBConv):
            setattr(network, name, BandedMBConv(child))
        elif isinstance(child, Attention):
            setattr(network, name, Portioned(BiasedAttention(child), windows=True))
        elif isinstance(child, NormMlp):
            setattr(network, name, Portioned(child, windows=False))
    return network


def _fused(block: ConvNorm) -> nn.Module:
    convolution = block.fuse()
    return Pointwise(convolution) if convolution.kernel_size == (1, 1) else convolution


class Pointwise(nn.Module):
    """A convolution of one pixel, (B, in, H, W) -> (B, out, H, W), as a product with the channels last."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.out_channels = convolution.out_channels
        self.weight = nn.Parameter(convolution.weight.detach().flatten(1))
        self.bias = convolution.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


class BiasedAttention(nn.Module):
    """timm's attention within windows (B, N, D), which is kept; ``qkv`` is called, so that an adapter there is used."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        attention: Any = self.attention
        qkv = attention.qkv(attention.norm(x)).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        q, k, v = qkv.split([attention.key_dim, attention.key_dim, attention.val_dim], dim=3)
        bias = attention.get_attention_biases(x.device)[None]
        return attention.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


class Portioned(nn.Module):
    """A module on tokens (B, N, D), of which a CPU takes some at a time.

    Args:
        windows: Whether the N tokens of one of the B windows see each other; else every token is on its own.
    """

    def __init__(self, inner: nn.Module, *, windows: bool) -> None:
        super().__init__()
        self.inner = inner
        self.windows = windows

    def forward(self, x: Tensor) -> Tensor:
        if not in_small_steps(x):
            return self.inner(x)
        portions = x.split(max(1, _TOKENS // x.shape[1])) if self.windows else x.split(_TOKENS, 1)
        return join([self.inner(portion) for portion in portions], 0 if self.windows else 1)


class BandedMBConv(nn.Module):
    """timm's MBConv (B, D, H, W), which is kept; a CPU takes a band of rows at a time, with a row on either side."""

    def __init__(self, block: MBConv) -> None:
        super().__init__()
        self.block = block
        deep: Any = block.conv2
        self.width: int = deep.out_channels

    def forward(self, x: Tensor) -> Tensor:
        if not in_small_steps(x):
            return self.block(x)
        batch, _, height, width = x.shape
        rows = max(1, _BAND // (batch * width * self.width))
        return join([self._band(x, top, min(top + rows, height)) for top in range(0, height, rows)], 2)

    def _band(self, x: Tensor, top: int, bottom: int) -> Tensor:
        block: Any = self.block
        above, below = int(top > 0), int(bottom < x.shape[2])
        wide = block.act1(block.conv1(x[:, :, top - above : bottom + below]))
        wide = F.pad(wide, (0, 0, 1 - above, 1 - below))  # beyond the image there is nothing, not conv1 of nothing
        deep = block.conv2
        wide = block.act2(F.conv2d(wide, deep.weight, deep.bias, padding=(0, 1), groups=deep.groups))
        return block.act3(block.conv3(wide) + x[:, :, top:bottom])
