"""PDMM, DeSAM's prompt-decoupled mask module.

Source: Gao et al., DeSAM, MICCAI 2024, section 2.3: a U-shaped decoder that merges the frozen encoder's
intermediate outputs with PRIM's mask embedding.
"""

from __future__ import annotations

from torch import Tensor, cat, nn
from torch.nn import functional as F

from desam_nnunet.encoders.base import FeatureSpec, Level
from desam_nnunet.networks.frame import ABSENT_LOGIT
from desam_nnunet.networks.neighbours import Neighbours
from desam_nnunet.sam.tiles import MASK_STRIDE

SE_REDUCTION = 16
SLOPE = 0.01


class SqueezeExcitation(nn.Module):
    """Channel weights from two linear layers without bias on the pooled map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = max(1, channels // SE_REDUCTION)
        self.fc = nn.Sequential(
            nn.Linear(channels, narrow, bias=False), nn.ReLU(), nn.Linear(narrow, channels, bias=False), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class SRB(nn.Module):
    """Squeeze-and-excitation residual block, (B, in, h, w) -> (B, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False) if in_channels != out_channels else None
        self.se = SqueezeExcitation(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.shortcut is None else F.instance_norm(self.shortcut(x))
        x = F.leaky_relu(F.instance_norm(self.conv1(x)), SLOPE)
        x = self.se(F.instance_norm(self.conv2(x)))
        return F.leaky_relu(x + residual, SLOPE)


class ContextPath(nn.Module):
    """One intermediate encoder output at the width and stride of a level of the decoder.

    Args:
        stride: Of the decoder's level; where the encoder's output is finer, it is averaged first.
    """

    def __init__(self, level: Level, width: int, stride: int) -> None:
        super().__init__()
        doublings = (level.stride // stride).bit_length() - 1
        self.averaged = max(1, stride // level.stride)
        self.block_init = SRB(level.channels, width)
        self.ups = nn.Sequential(*(
            nn.Sequential(nn.ConvTranspose2d(width, width, 2, 2, bias=False), SRB(width, width))
            for _ in range(doublings)))

    def forward(self, feature: Tensor) -> Tensor:
        if self.averaged > 1:
            feature = F.avg_pool2d(feature, self.averaged)
        return self.ups(self.block_init(feature))


class UpBlock(nn.Module):
    """Merges the context of the next level, whose resolution is `scale` times as high, 1 or 2."""

    def __init__(self, in_width: int, width: int, scale: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_width, width, scale, scale, bias=False)
        self.block = SRB(2 * width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.block(cat([self.up(x), context], dim=1))


class PDMM(nn.Module):
    """Mask logits from the encoder's intermediate outputs and a mask embedding.

    Level 0 works at the stride of the neck and reads the encoder's deepest intermediate output; each next one works at
    half the stride, as far as the masks', and reads the next shallower output. There are as many levels as outputs,
    three, or more where masks finer than published are asked for: these read the shallowest.

    Args:
        prompt_dim: Channels of the mask embedding, C; the levels are C, C/2, C/4, ... wide.
        num_classes: Foreground classes or regions, K.
        mask_stride: Pixels of the encoder's input along a side of a mask's pixel.
        depth: Slices of a slab, which see their neighbours on level 0; 1 for tiles.

    Raises:
        ValueError: The neck is finer than the masks.
    """

    def __init__(
        self, *, spec: FeatureSpec, prompt_dim: int, num_classes: int, mask_stride: int = MASK_STRIDE, depth: int = 1
    ) -> None:
        super().__init__()
        if spec.neck.stride < mask_stride:
            raise ValueError(f"desam.mask_stride is {mask_stride}, but the encoder's last map has a stride of "
                             f"{spec.neck.stride}: masks can't be coarser; lower it.")
        levels = spec.levels[::-1]  # deep to shallow
        count = max(len(levels), (spec.neck.stride // mask_stride).bit_length())
        strides = [max(mask_stride, spec.neck.stride >> level) for level in range(count)]
        widths = [prompt_dim >> level for level in range(count)]
        self.reads = [min(level, len(levels) - 1) for level in range(count)]
        self.contexts = nn.ModuleList(
            ContextPath(levels[read], width, stride)
            for read, width, stride in zip(self.reads, widths, strides, strict=True))
        self.fusion = SRB(2 * prompt_dim, prompt_dim)
        self.neighbours = Neighbours(prompt_dim, depth) if depth > 1 else None
        self.ups = nn.ModuleList(
            UpBlock(widths[u], widths[u + 1], strides[u] // strides[u + 1]) for u in range(count - 1))
        self.seg_layers = nn.Conv2d(widths[-1], num_classes, 1, bias=False)

    def context(self, levels: tuple[Tensor, ...]) -> list[Tensor]:
        """The part that sees no prompt, per level (B, width, S / stride, S / stride), of the encoder's outputs."""
        deep = levels[::-1]
        return [path(deep[read]) for path, read in zip(self.contexts, self.reads, strict=True)]

    def forward(self, mask_embedding: Tensor, contexts: list[Tensor], there: Tensor | None = None) -> Tensor:
        """Masks (B, K, S / stride, S / stride) of an embedding (B, C, h, w) and what :meth:`context` gives.

        Args:
            there: Of slabs, which slices are not missing, (B,) bool; those that are have no class.
        """
        x = self.fusion(cat([mask_embedding, contexts[0]], dim=1))
        if self.neighbours is not None:
            assert there is not None
            x = self.neighbours(x, there)
        for up, context in zip(self.ups, contexts[1:], strict=True):
            x = up(x, context)
        masks = self.seg_layers(x)
        return masks if there is None else masks.masked_fill(~there[:, None, None, None], ABSENT_LOGIT)
