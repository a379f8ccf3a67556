"""DB-SAM: SAM's frozen encoder with a convolution branch beside it, and SAM's decoder.

Source: Qin et al., DB-SAM: Delving into High Quality Universal Medical Image Segmentation, MICCAI 2024.
The paper prompts with boxes from the ground truth. Here nnU-Net asks without a prompt, so the box is the whole tile,
and each class has a mask token of its own: that setting is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from desam_nnunet.encoders.sam_vit import build_neck
from desam_nnunet.networks.dbsam.dual_branch import LEVELS, BilateralExchange, ChannelAttention, Fusion, Stem
from desam_nnunet.networks.frame import MAX_LOGIT, Outline, SamNetwork, mean_over_groups, uncompiled
from desam_nnunet.sam.class_decoder import ClassDecoder
from desam_nnunet.sam.prompts import Prompts, dense_positions, prompt_tokens, whole_box

_STAGES = 4


class DBSAM(SamNetwork):
    """``network(tiles)`` gives logits at tile size, in training too.

    Neck and decoder start from SAM's, and each class's token from SAM's token for boxes.

    Args:
        outline: Its encoder is a plain ViT.
        checkpointing: Whether blocks and exchanges are computed again in the backward pass.
        boxes: None for a mask of each class, asked with a box around the tile. Else the one mask is of what a given
            box is around, and this is how many mask tokens take part in the attention, 1 or SAM's 4.
    """

    def __init__(self, outline: Outline, *, checkpointing: bool, boxes: int | None = None) -> None:
        loaded, automatic = outline.loaded, boxes is None
        super().__init__(held=[loaded.encoder], to_image=outline.to_image, num_channels=outline.num_channels,
                         background=outline.background and automatic)
        vit = loaded.encoder.plain_vit()
        dim = vit.dim
        decoder = ClassDecoder(loaded.mask_decoder.transformer, outline.num_classes if boxes is None else 1,
                               silent=0 if boxes is None else boxes - 1)
        decoder.load_from_sam(loaded.mask_decoder, heads=True)
        neck = build_neck(dim, loaded.prompt_dim)
        neck.load_state_dict(vit.neck.state_dict())
        self.automatic = automatic
        self.checkpointing = checkpointing
        self.stems = nn.ModuleList(Stem(dim, level) for level in range(1, LEVELS + 1))
        self.level_embedding = nn.Parameter(torch.zeros(LEVELS, dim))
        nn.init.normal_(self.level_embedding)
        self.channel_attention = nn.ModuleList(ChannelAttention(dim) for _ in vit.blocks)
        self.exchanges = nn.ModuleList(BilateralExchange(dim, vit.heads) for _ in range(_STAGES))
        self.fusion = Fusion(dim)
        self.norm = nn.LayerNorm(dim)
        self.neck = neck
        self.prompt_encoder = loaded.prompt_encoder.requires_grad_(False)
        self.decoder = decoder

    @uncompiled
    def forward(self, tiles: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Logits (B, K or K + 1, H, W) of tiles (B, C, H, W).

        Args:
            boxes: (B, 4) in pixels of SAM's input, x and y of two corners; None for one around the whole tile.

        Raises:
            ValueError: As :meth:`images`; no boxes for a network that was trained with boxes from the reference.
        """
        geometry = self.geometry(tiles)
        if boxes is None:
            if not self.automatic:
                raise ValueError("This model was trained with boxes from the reference segmentation and can't segment "
                                 "without them: evaluate it with `desam boxes`, or train DBSAMTrainer, which needs "
                                 "none.")
            boxes = whole_box(geometry, len(tiles), tiles.device).boxes
        masks = self.decode(self.encode(tiles), Prompts(boxes=boxes))
        return self.tile_logits(masks, geometry).clamp(-MAX_LOGIT, MAX_LOGIT)

    def encode(self, tiles: Tensor) -> Tensor:
        """Both branches' neck (B, C, h, w) in float32, a mean over groups of channels."""
        images = self.images(tiles)  # B G 3 S S
        return mean_over_groups(self._both_branches(images.flatten(0, 1)), images.shape[1])

    def _both_branches(self, images: Tensor) -> Tensor:
        vit = self.encoder.plain_vit()
        with self.encoder.autocast(images.device):
            maps = torch.stack([stem(images) for stem in self.stems], dim=1)  # B L h w D
            maps = maps + self.level_embedding[:, None, None]
            tokens = vit.embed(images)
            blocks = list(zip(vit.blocks, self.channel_attention, strict=True))
            for stage, exchange in enumerate(self.exchanges):
                start, stop = (len(blocks) * part // _STAGES for part in (stage, stage + 1))
                for block, attention in blocks[start:stop]:
                    tokens = attention(self._run(block, tokens))
                tokens, maps = self._run(exchange, tokens, maps)
            fused = self.norm(self.fusion(tokens, maps))
            return self.neck(fused.permute(0, 3, 1, 2)).float()  # B h w D -> B D h w

    def decode(self, neck: Tensor, prompts: Prompts) -> Tensor:
        """Mask logits (B, K, S/4, S/4)."""
        sparse, dense = prompt_tokens(self.prompt_encoder, prompts)
        return self.decoder(neck + dense, dense_positions(self.prompt_encoder), sparse)

    def _run(self, module: nn.Module, *inputs: Tensor) -> Any:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)
