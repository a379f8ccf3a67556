"""DB-SAM: SAM's frozen encoder with a convolution branch beside it, and SAM's decoder.

Source: Qin et al., DB-SAM: Delving into High Quality Universal Medical Image Segmentation, MICCAI 2024.
The paper prompts with boxes from the ground truth. Here nnU-Net asks without a prompt, so the box is the whole tile,
and each class has a mask token of its own: that setting is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from segment_anything.modeling import PromptEncoder
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from desam_nnunet.encoders.base import Encoder
from desam_nnunet.encoders.sam_vit import build_neck
from desam_nnunet.networks.dbsam.dual_branch import LEVELS, BilateralExchange, ChannelAttention, Fusion, Stem
from desam_nnunet.networks.frame import MAX_LOGIT, Outline, SamNetwork, mean_over_groups, uncompiled
from desam_nnunet.sam.class_decoder import ClassDecoder
from desam_nnunet.sam.prompts import Prompts, dense_positions, prompt_tokens, whole_box
from desam_nnunet.sam.tiles import TileToImage

_STAGES = 4


class DBSAM(SamNetwork):
    """``network(tiles)`` gives logits at tile size, in training too.

    Args:
        encoder: Frozen, a plain ViT; its neck is not used.
        neck: A copy of it; trained.
        prompt_encoder: SAM's, frozen.
        decoder: SAM's with one mask token per class; trained.
        background: Whether logits start with a background channel, which is 0 by definition.
        automatic: Whether a tile without a box gets one around all of it. Else it is refused.
        checkpointing: Whether blocks and exchanges are computed again in the backward pass.
    """

    def __init__(
        self,
        *,
        encoder: Encoder,
        neck: nn.Module,
        prompt_encoder: PromptEncoder,
        decoder: ClassDecoder,
        to_image: TileToImage,
        num_channels: int,
        background: bool,
        automatic: bool = True,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(held=[encoder], to_image=to_image, num_channels=num_channels, background=background)
        vit = encoder.plain_vit()
        dim = vit.dim
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
        self.prompt_encoder = prompt_encoder.requires_grad_(False)
        self.decoder = decoder

    @uncompiled
    def forward(self, tiles: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Args:
            tiles: (B, C, H, W).
            boxes: (B, 4) in pixels of SAM's input, x and y of two corners; None for one around the whole tile.

        Returns:
            Logits (B, K or K + 1, H, W), no nonlinearity applied.

        Raises:
            ValueError: The tiles have another number of channels than planned, or hold NaN or infinity; no boxes for
                a network that was trained with boxes from the reference.
        """
        geometry = self.geometry(tiles)
        if boxes is None:
            if not self.automatic:
                raise ValueError(
                    "This model was trained with boxes from the reference segmentation and can't segment without "
                    "them: evaluate it with `desam boxes`, or train DBSAMTrainer, which needs none."
                )
            boxes = whole_box(geometry, len(tiles), tiles.device).boxes
        masks = self.decode(self.encode(tiles), Prompts(boxes=boxes))
        return self.tile_logits(masks, geometry).clamp(-MAX_LOGIT, MAX_LOGIT)

    def encode(self, tiles: Tensor) -> Tensor:
        """Both branches' neck (B, C, h, w); channel groups are encoded one by one and averaged."""
        images = self.images(tiles)  # B G 3 S S
        return mean_over_groups(self.both_branches(images.flatten(0, 1)), images.shape[1])

    def both_branches(self, images: Tensor) -> Tensor:
        """Args: images: (B, 3, S, S), as SAM expects them. Returns: The neck's output in float32, (B, C, h, w)."""
        vit = self.encoder.plain_vit()
        with self.encoder.autocast(images.device):
            maps = torch.stack([stem(images) for stem in self.stems], dim=1)  # B L h w D
            maps = maps + self.level_embedding[:, None, None]
            tokens = vit.embed(images)
            per_stage = len(vit.blocks) // _STAGES
            for index, block in enumerate(vit.blocks):
                tokens = self.channel_attention[index](self._run(block, tokens))
                if (index + 1) % per_stage == 0:
                    tokens, maps = self._run(self.exchanges[index // per_stage], tokens, maps)
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


def build_dbsam(outline: Outline, *, checkpointing: bool, boxes: int | None = None) -> DBSAM:
    """A DB-SAM on an encoder, whose decoder it starts from; each class's token starts from SAM's token for boxes.

    Args:
        boxes: None for a mask of each class, asked with a box around the tile. Else the one mask is of what a given
            box is around, and this is how many mask tokens take part in the attention, 1 or SAM's 4.
    """
    loaded = outline.loaded
    vit = loaded.encoder.plain_vit()
    decoder = ClassDecoder(loaded.mask_decoder.transformer, outline.num_classes if boxes is None else 1,
                           silent=0 if boxes is None else boxes - 1)
    decoder.load_from_sam(loaded.mask_decoder, heads=True)
    neck = build_neck(vit.dim, loaded.prompt_dim)
    neck.load_state_dict(vit.neck.state_dict())
    return DBSAM(
        encoder=loaded.encoder, neck=neck, prompt_encoder=loaded.prompt_encoder, decoder=decoder,
        to_image=outline.to_image, num_channels=outline.num_channels,
        background=outline.background and boxes is None, automatic=boxes is None, checkpointing=checkpointing)
