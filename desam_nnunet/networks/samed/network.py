"""SAMed: SAM with low-rank updates of its encoder and one mask token per class, without prompts.

Source: Zhang and Liu, Customized Segment Anything Model for Medical Image Segmentation (SAMed), technical report,
2023. Regions, an ignore label and more than three channels are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from segment_anything.modeling import PromptEncoder, TwoWayTransformer
from segment_anything.modeling.transformer import Attention
from torch import Tensor, nn

from desam_nnunet.encoders.base import Encoder, Projection
from desam_nnunet.networks.frame import MAX_LOGIT, Outline, SamNetwork, mean_over_groups, uncompiled
from desam_nnunet.networks.samed.lora import AdaptedLinear, LowRank, low_rank_updates
from desam_nnunet.sam.class_decoder import UPSCALING, ClassDecoder
from desam_nnunet.sam.prompts import Prompts, dense_positions, prompt_tokens
from desam_nnunet.sam.tiles import TileToImage


class SAMed(SamNetwork):
    """``network(tiles)`` gives logits at tile size, ``network(tiles, low_resolution=True)`` what training calls.

    Args:
        encoder: Frozen; the layers that make queries, keys and values are replaced by adapted ones, in place.
        prompt_encoder: SAM's. Only its embedding of "no mask" is used, and so trained.
        transformer: SAM's two-way transformer; trained, or adapted where `adapt_decoder`.
        outputs: Classes with background, or regions.
        rank, targets: Of the low-rank updates; targets are letters of ``qkv``.
        adapt_decoder: SAMed_s: the transformer is frozen and gets low-rank updates as well.
        checkpointing: Whether the encoder's blocks are computed again in the backward pass.
        neck: Trained, where the encoder has none of its own.
    """

    def __init__(
        self,
        *,
        encoder: Encoder,
        prompt_encoder: PromptEncoder,
        transformer: TwoWayTransformer,
        to_image: TileToImage,
        num_channels: int,
        outputs: int,
        rank: int = 4,
        targets: str = "qv",
        adapt_decoder: bool = False,
        checkpointing: bool = False,
        neck: nn.Module | None = None,
    ) -> None:
        held: list[nn.Module] = [encoder, transformer] if adapt_decoder else [encoder]
        super().__init__(held=held, to_image=to_image, num_channels=num_channels, background=False,
                         mask_stride=encoder.spec.neck.stride // UPSCALING)
        self.neck = neck or nn.Identity()
        self.checkpointing = checkpointing
        self.updates = nn.ModuleList(_adapt_qkv(row, rank, targets) for row in encoder.projections())
        self.decoder_updates = nn.ModuleDict(_adapt_transformer(transformer, rank, targets) if adapt_decoder else {})
        modules = [module for part in held for module in part.modules()]
        self._adapted = tuple(module for module in modules if isinstance(module, AdaptedLinear))
        self.prompt_encoder = prompt_encoder.requires_grad_(False)
        self.prompt_encoder.no_mask_embed.requires_grad_(True)
        self.decoder = ClassDecoder(transformer, outputs, frozen_transformer=adapt_decoder)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        self._release()
        return super().load_state_dict(state_dict, *args, **options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SamNetwork:
        self._release()
        return super()._apply(fn, recurse)

    @uncompiled
    def forward(self, tiles: Tensor, *, low_resolution: bool = False) -> Tensor:
        """Args:
            tiles: (B, C, H, W).
            low_resolution: Whether to return the decoder's own logits, padding included.

        Returns:
            Logits (B, outputs, H, W), no nonlinearity applied.

        Raises:
            ValueError: The tiles have another number of channels than planned, or hold NaN or infinity.
        """
        masks = self.decode(self.encode(tiles))
        if low_resolution:
            return masks
        return self.tile_logits(masks, self.geometry(tiles)).clamp(-MAX_LOGIT, MAX_LOGIT)

    @uncompiled
    def encode(self, tiles: Tensor) -> Tensor:
        """The adapted encoder's neck (B, C, h, w), in float32; channel groups are encoded one by one and averaged.

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


def build_samed(
    outline: Outline, *, rank: int, targets: str, adapt_decoder: bool, checkpointing: bool
) -> SAMed:
    """A SAMed on an encoder: class tokens, hyper-networks and IoU head start fresh, the rest from SAM."""
    loaded = outline.loaded
    network = SAMed(
        encoder=loaded.encoder, prompt_encoder=loaded.prompt_encoder, transformer=loaded.mask_decoder.transformer,
        to_image=outline.to_image, num_channels=outline.num_channels, outputs=outline.num_outputs, rank=rank,
        targets=targets, adapt_decoder=adapt_decoder, checkpointing=checkpointing, neck=loaded.neck)
    network.decoder.load_from_sam(loaded.mask_decoder, heads=False)
    return network


def _adapt_qkv(projection: Projection, rank: int, targets: str) -> nn.ModuleDict:
    """Replaces a layer of the image encoder that makes queries, keys and values, in place."""
    base = getattr(projection.attention, projection.name)
    updates: dict[str, LowRank] = {}
    for letter in targets:
        rows = projection.rows[letter]
        width = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        updates |= low_rank_updates(base.in_features, width, rank, letter)
    adapted = AdaptedLinear(base, [(updates[letter], projection.rows[letter]) for letter in targets])
    setattr(projection.attention, projection.name, adapted)
    return nn.ModuleDict(updates)


def _adapt_transformer(transformer: TwoWayTransformer, rank: int, targets: str) -> dict[str, nn.Module]:
    """Replaces projections of all attentions of the decoder's transformer, in place, and freezes the rest."""
    transformer.requires_grad_(False)
    layers = transformer.layers
    return {
        "self": nn.ModuleList(_adapt_projections(layer.self_attn, rank, targets) for layer in layers),
        "token_to_image": nn.ModuleList(
            _adapt_projections(layer.cross_attn_token_to_image, rank, targets) for layer in layers),
        "image_to_token": nn.ModuleList(
            _adapt_projections(layer.cross_attn_image_to_token, rank, targets) for layer in layers),
        "final": nn.ModuleList([_adapt_projections(transformer.final_attn_token_to_image, rank, targets)]),
    }


def _adapt_projections(attention: Attention, rank: int, targets: str) -> nn.ModuleDict:
    base = attention.q_proj
    updates = low_rank_updates(base.in_features, base.out_features, rank, targets)
    for letter in targets:
        name = f"{letter}_proj"
        setattr(attention, name, AdaptedLinear(getattr(attention, name), [(updates[letter], None)]))
    return nn.ModuleDict(updates)
