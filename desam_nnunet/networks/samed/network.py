"""SAMed: SAM with low-rank updates of its encoder and one mask token per class, without prompts.

Source: Zhang and Liu, Customized Segment Anything Model for Medical Image Segmentation (SAMed), technical report,
2023. Regions, an ignore label and more than three channels are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from segment_anything.modeling import TwoWayTransformer
from segment_anything.modeling.transformer import Attention
from torch import Tensor, nn

from desam_nnunet.encoders.base import Projection
from desam_nnunet.networks.frame import MAX_LOGIT, Outline, SamNetwork, mean_over_groups, uncompiled
from desam_nnunet.networks.samed.lora import AdaptedLinear, LowRank
from desam_nnunet.sam.class_decoder import UPSCALING, ClassDecoder
from desam_nnunet.sam.prompts import Prompts, dense_positions, prompt_tokens

_ATTENTIONS = {"self": "self_attn", "token_to_image": "cross_attn_token_to_image",
               "image_to_token": "cross_attn_image_to_token"}


class SAMed(SamNetwork):
    """``network(tiles)`` gives logits at tile size, ``network(tiles, low_resolution=True)`` what training calls.

    Class tokens, hyper-networks and IoU head start fresh, the rest from SAM. Of the prompt encoder only the embedding
    of "no mask" is used, and so trained.

    Args:
        outline: Layers of its encoder are replaced by adapted ones, in place.
        rank, targets, checkpointing: See :class:`~desam_nnunet.networks.samed.section.SamedSection`.
        adapt_decoder: SAMed_s: the decoder's transformer is frozen and gets low-rank updates as well.
    """

    def __init__(
        self, outline: Outline, *, rank: int, targets: str, adapt_decoder: bool, checkpointing: bool = False
    ) -> None:
        encoder, transformer = outline.loaded.encoder, outline.loaded.mask_decoder.transformer
        held: list[nn.Module] = [encoder, transformer] if adapt_decoder else [encoder]
        super().__init__(held=held, to_image=outline.to_image, num_channels=outline.num_channels, background=False,
                         mask_stride=encoder.spec.neck.stride // UPSCALING)
        self.neck = outline.loaded.neck or nn.Identity()
        self.checkpointing = checkpointing
        self.updates = nn.ModuleList(_adapt_qkv(row, rank, targets) for row in encoder.projections())
        self.decoder_updates = nn.ModuleDict(_adapt_transformer(transformer, rank, targets) if adapt_decoder else {})
        self._adapted = tuple(
            module for part in held for module in part.modules() if isinstance(module, AdaptedLinear))
        self.prompt_encoder = outline.loaded.prompt_encoder.requires_grad_(False)
        self.prompt_encoder.no_mask_embed.requires_grad_(True)
        self.decoder = ClassDecoder(transformer, outline.num_outputs, frozen_transformer=adapt_decoder)
        self.decoder.load_from_sam(outline.loaded.mask_decoder, heads=False)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        self._release()
        return super().load_state_dict(state_dict, *args, **options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SamNetwork:
        self._release()
        return super()._apply(fn, recurse)

    @uncompiled
    def forward(self, tiles: Tensor, *, low_resolution: bool = False) -> Tensor:
        """Logits (B, outputs, H, W) of tiles (B, C, H, W); at low resolution the decoder's own, padding included.

        Raises:
            ValueError: As :meth:`images`.
        """
        masks = self.decode(self.encode(tiles))
        if low_resolution:
            return masks
        return self.tile_logits(masks, self.geometry(tiles)).clamp(-MAX_LOGIT, MAX_LOGIT)

    @uncompiled
    def encode(self, tiles: Tensor) -> Tensor:
        """The adapted encoder's neck (B, C, h, w) in float32, a mean over groups of channels.

        Without gradients each adapted layer becomes one product first, until gradients are wanted again.
        """
        if torch.is_grad_enabled():
            self._release()
        else:
            for layer in self._adapted:
                layer.merge()
        images = self.images(tiles)  # B G 3 S S
        neck = self.encoder.neck(images.flatten(0, 1), recompute=self.checkpointing)
        return self.neck(mean_over_groups(neck, images.shape[1]))

    def decode(self, neck: Tensor) -> Tensor:
        """Mask logits (B, outputs, S / stride, S / stride)."""
        sparse, dense = prompt_tokens(self.prompt_encoder, Prompts())
        return self.decoder(neck + dense, dense_positions(self.prompt_encoder), sparse)

    def _release(self) -> None:
        for layer in self._adapted:
            layer.release()


def _adapt_qkv(projection: Projection, rank: int, targets: str) -> nn.ModuleDict:
    """Replaces a layer of the image encoder that makes queries, keys and values, in place."""
    base = getattr(projection.attention, projection.name)
    updates = {}
    for letter in targets:
        rows = projection.rows[letter]
        width = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        updates[letter] = LowRank(base.in_features, width, rank)
    parts = [(update, projection.rows[letter]) for letter, update in updates.items()]
    setattr(projection.attention, projection.name, AdaptedLinear(base, parts))
    return nn.ModuleDict(updates)


def _adapt_transformer(transformer: TwoWayTransformer, rank: int, targets: str) -> dict[str, nn.Module]:
    """Replaces projections of all attentions of the decoder's transformer, in place, and freezes the rest."""
    transformer.requires_grad_(False)
    attentions = {key: [getattr(layer, name) for layer in transformer.layers] for key, name in _ATTENTIONS.items()}
    attentions["final"] = [transformer.final_attn_token_to_image]
    return {key: nn.ModuleList(_adapt_projections(attention, rank, targets) for attention in group)
            for key, group in attentions.items()}


def _adapt_projections(attention: Attention, rank: int, targets: str) -> nn.ModuleDict:
    updates = {letter: LowRank(attention.embedding_dim, attention.internal_dim, rank) for letter in targets}
    for letter, update in updates.items():
        name = f"{letter}_proj"
        setattr(attention, name, AdaptedLinear(getattr(attention, name), [(update, None)]))
    return nn.ModuleDict(updates)
