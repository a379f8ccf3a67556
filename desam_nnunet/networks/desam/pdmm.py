"""PDMM, DeSAM's prompt-decoupled mask module.

Source: Gao et al., DeSAM, MICCAI 2024, section 2.3: a U-shaped decoder that merges the frozen encoder's
intermediate outputs with PRIM's mask embedding.
"""

from __future__ import annotations

from torch import Tensor, cat, nn
from torch.nn import functional as F

SE_REDUCTION = 16
SLOPE = 0.01


class SqueezeExcitation(nn.Module):
    """Channel weights from two linear layers without bias on the pooled map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // SE_REDUCTION, bias=False),
            nn.ReLU(),
            nn.Linear(channels // SE_REDUCTION, channels, bias=False),
            nn.Sigmoid(),
        )

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
    """One intermediate encoder output at its level's width, upsampled `doublings` times."""

    def __init__(self, encoder_dim: int, width: int, doublings: int) -> None:
        super().__init__()
        self.block_init = SRB(encoder_dim, width)
        self.ups = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(width, width, 2, 2, bias=False), SRB(width, width))
            for _ in range(doublings)
        )

    def forward(self, feature: Tensor) -> Tensor:
        x = self.block_init(feature)
        for up in self.ups:
            x = up(x)
        return x


class UpBlock(nn.Module):
    """Doubles the resolution and merges the context of the next level."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_width, width, 2, 2, bias=False)
        self.block = SRB(2 * width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.block(cat([self.up(x), context], dim=1))


class PDMM(nn.Module):
    """Mask logits from the encoder's intermediate outputs and a mask embedding.

    Args:
        encoder_dim: Channels of the intermediate outputs, D.
        prompt_dim: Channels of the mask embedding, C; the levels are C, C/2 and C/4 wide.
        num_classes: Foreground classes or regions, K.
    """

    def __init__(self, *, encoder_dim: int, prompt_dim: int, num_classes: int) -> None:
        super().__init__()
        widths = [prompt_dim >> level for level in range(3)]
        self.contexts = nn.ModuleList(ContextPath(encoder_dim, width, d) for d, width in enumerate(widths))
        self.fusion = SRB(2 * prompt_dim, prompt_dim)
        self.ups = nn.ModuleList(UpBlock(widths[u], widths[u + 1]) for u in range(2))
        self.seg_layers = nn.Conv2d(widths[-1], num_classes, 1, bias=False)

    def context(self, levels: tuple[Tensor, ...]) -> list[Tensor]:
        """The part that sees no prompt: per level (B, width, h·2^d, w·2^d).

        Args:
            levels: The encoder's outputs, shallow to deep, each (B, D, h, w). Level 0 reads the deepest.
        """
        return [path(feature) for path, feature in zip(self.contexts, reversed(levels), strict=True)]

    def forward(self, mask_embedding: Tensor, contexts: list[Tensor]) -> Tensor:
        """Args: mask_embedding: (B, C, h, w). contexts: From :meth:`context`. Returns: (B, K, 4h, 4w)."""
        x = self.fusion(cat([mask_embedding, contexts[0]], dim=1))
        for up, context in zip(self.ups, contexts[1:], strict=True):
            x = up(x, context)
        return self.seg_layers(x)
