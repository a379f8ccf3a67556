"""SAM's image encoder, frozen, with the intermediate outputs that DeSAM reads.

Source: Gao et al., DeSAM, MICCAI 2024 (encoder outputs of the global-attention blocks); Kirillov et
al., Segment Anything, ICCV 2023.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from desam_nnunet.encoders.precision import encoder_dtype


class Features(NamedTuple):
    """What the frozen encoder says of a batch of tiles.

    Attributes:
        levels: Outputs of the global-attention blocks except the last, shallow to deep, each
            (B, D, S/16, S/16) with D the embedding dimension and S the input side.
        neck: (B, C, S/16, S/16), C the prompt dimension.
    """

    levels: tuple[Tensor, ...]
    neck: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Levels and neck in one row."""
        return (*self.levels, self.neck)

    def map(self, change: Callable[[Tensor], Tensor]) -> Features:
        """Every tensor changed alike."""
        return Features(tuple(map(change, self.levels)), change(self.neck))

    def sample(self, number: int) -> Features:
        """One sample's part of a batch, as views without the batch dimension."""
        return self.map(lambda x: x[number])


def read_features(vit: ImageEncoderViT, x: Tensor, level_blocks: tuple[int, ...]) -> Features:
    """Runs the blocks and the neck on the first block's input (B, S/16, S/16, D), and keeps what some blocks say."""
    levels = []
    for index, block in enumerate(vit.blocks):
        x = block(x)
        if index in level_blocks:
            levels.append(x.permute(0, 3, 1, 2).float().contiguous())  # B H W D -> B D H W
    return Features(tuple(levels), vit.neck(x.permute(0, 3, 1, 2)).float())


class FrozenEncoder(nn.Module):
    """Runs SAM's ``ImageEncoderViT`` without gradients and always in eval mode.

    Args:
        vit: SAM's encoder with its weights loaded.
        level_blocks: Indexes of the blocks whose outputs are handed on as levels.
        identity: Names the weights beyond doubt, see :func:`desam_nnunet.encoders.weights.load_sam`.

    Attributes:
        dtype: Precision of the matrix products; None, from the start, for what suits the device of the images. The
            sum that runs from block to block, and what comes out, is float32 in any case.
    """

    def __init__(self, vit: ImageEncoderViT, level_blocks: tuple[int, ...], identity: str) -> None:
        super().__init__()
        self.vit = vit.requires_grad_(False)
        self.level_blocks = level_blocks
        self.identity = identity
        self.dtype: torch.dtype | None = None
        self.eval()

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stays in eval mode, whatever the network around it does."""
        return super().train(False)

    @torch.compiler.disable(recursive=False)  # the choice of the precision is no graph; the blocks are
    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Encodes SAM images.

        Args:
            images: (B, 3, S, S), normalised and padded as SAM expects.

        Returns:
            In float32, whatever the precision in between.
        """
        with self.autocast(images.device):
            return read_features(self.vit, self.embed(images), self.level_blocks)

    def embed(self, images: Tensor) -> Tensor:
        """The first block's input (B, S/16, S/16, D)."""
        return self.vit.patch_embed(images) + self.vit.pos_embed

    def autocast(self, device: torch.device) -> torch.autocast:
        """In which the blocks are computed on `device`."""
        dtype = self.precision(device)
        return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)

    def precision(self, device: torch.device) -> torch.dtype:
        """In which the matrix products are computed on `device`."""
        return self.dtype or encoder_dtype(device)

    @property
    def channels(self) -> int:
        """Of all features together."""
        return len(self.level_blocks) * self.vit.pos_embed.shape[-1] + self.vit.neck[-1].weight.shape[0]

    @property
    def place(self) -> tuple[torch.device, torch.dtype]:
        """Device and type of the weights."""
        return self.vit.pos_embed.device, self.vit.pos_embed.dtype

    def checksum(self) -> str:
        """SHA-256 over every weight's name and bytes: equal before and after training, or it was not frozen."""
        digest = hashlib.sha256()
        for name, value in sorted(self.vit.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
