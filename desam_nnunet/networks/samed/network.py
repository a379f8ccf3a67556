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
from torch.utils.checkpoint import checkpoint

from desam_nnunet.encoders.base import FrozenEncoder
from desam_nnunet.encoders.weights import LoadedSam
from desam_nnunet.networks.frame import MAX_LOGIT, SamNetwork, mean_over_groups, uncompiled
from desam_nnunet.networks.samed.lora import AdaptedLinear, low_rank_updates
from desam_nnunet.sam.class_decoder import ClassDecoder
from desam_nnunet.sam.prompts import Prompts, dense_positions, prompt_tokens
from desam_nnunet.sam.tiles import TileToImage
from desam_nnunet.settings.sections import LORA_TARGETS


class SAMed(SamNetwork):
    """``network(tiles)`` gives logits at tile size, ``network(tiles, low_resolution=True)`` what training calls.

    Args:
        encoder: Frozen; its ``qkv`` layers are replaced by adapted ones, in place.
        prompt_encoder: SAM's. Only its embedding of "no mask" is used, and so trained.
        transformer: SAM's two-way transformer; trained, or adapted where `adapt_decoder`.
        outputs: Classes with background, or regions.
        rank, targets: Of the low-rank updates; targets are letters of ``qkv``.
        adapt_decoder: SAMed_s: the transformer is frozen and gets low-rank updates as well.
        checkpointing: Whether the encoder's blocks are computed again in the backward pass.
    """

    def __init__(
        self,
        *,
        encoder: FrozenEncoder,
        prompt_encoder: PromptEncoder,
        transformer: TwoWayTransformer,
        to_image: TileToImage,
        num_channels: int,
        outputs: int,
        rank: int = 4,
        targets: str = "qv",
        adapt_decoder: bool = False,
        checkpointing: bool = False,
    ) -> None:
        held: list[nn.Module] = [encoder, transformer] if adapt_decoder else [encoder]
        super().__init__(held=held, to_image=to_image, num_channels=num_channels, background=False)
        self.checkpointing = checkpointing
        self.updates = nn.ModuleList(_adapt_qkv(block.attn, rank, targets) for block in encoder.vit.blocks)
        self.decoder_updates = nn.ModuleDict(_adapt_transformer(transformer, rank, targets) if adapt_decoder else {})
        modules = [module for part in held for module in part.modules()]
        self._adapted = tuple(module for module in modules if isinstance(module, AdaptedLinear))
        self.prompt_encoder = prompt_encoder.requires_grad_(False)
        self.prompt_encoder.no_mask_embed.requires_grad_(True)
        self.decoder = ClassDecoder(transformer, outputs, frozen_transformer=adapt_decoder)

    @property
    def encoder(self) -> FrozenEncoder:
        encoder = self.held[0]
        assert isinstance(encoder, FrozenEncoder)
        return encoder

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
            low_resolution: Whether to return the decoder's own logits (B, outputs, S/4, S/4), padding included.

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
        """The adapted encoder's neck (B, C, h, w); channel groups are encoded one by one and averaged.

        Without gradients each adapted layer becomes one product first, until gradients are wanted again.
        """
        if torch.is_grad_enabled():
            self._release()
        else:
            for layer in self._adapted:
                layer.merge()
        images = self.images(tiles)  # B G 3 S S
        return mean_over_groups(self.neck(images.flatten(0, 1)), images.shape[1])

    def neck(self, images: Tensor) -> Tensor:
        """Args: images: (B, 3, S, S), 0 to 1. Returns: The adapted encoder's output in float32, (B, C, h, w)."""
        recompute = self.checkpointing and torch.is_grad_enabled()
        with self.encoder.autocast(images.device):
            x = self.encoder.embed(images)
            for block in self.encoder.vit.blocks:
                x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            return self.encoder.vit.neck(x.permute(0, 3, 1, 2)).float()  # B H W D -> B D H W

    def decode(self, neck: Tensor) -> Tensor:
        """Mask logits (B, outputs, S/4, S/4)."""
        sparse, dense = prompt_tokens(self.prompt_encoder, Prompts())
        return self.decoder(neck + dense, dense_positions(self.prompt_encoder), sparse)

    def _release(self) -> None:
        for layer in self._adapted:
            layer.release()


def build_samed(
    *,
    sam: LoadedSam,
    to_image: TileToImage,
    num_channels: int,
    outputs: int,
    rank: int,
    targets: str,
    adapt_decoder: bool,
    checkpointing: bool,
) -> SAMed:
    """A SAMed on `sam`: class tokens, hyper-networks and IoU head start fresh, the rest from SAM.

    Args:
        outputs: Classes with background, or regions.
    """
    network = SAMed(
        encoder=sam.encoder, prompt_encoder=sam.prompt_encoder, transformer=sam.mask_decoder.transformer,
        to_image=to_image, num_channels=num_channels, outputs=outputs, rank=rank, targets=targets,
        adapt_decoder=adapt_decoder, checkpointing=checkpointing,
    )
    network.decoder.load_from_sam(sam.mask_decoder, heads=False)
    return network


def _adapt_qkv(attention: Any, rank: int, targets: str) -> nn.ModuleDict:
    """Replaces a fused ``qkv`` layer of the image encoder, in place."""
    qkv = attention.qkv
    updates = low_rank_updates(qkv.in_features, qkv.out_features // 3, rank, targets)
    attention.qkv = AdaptedLinear(qkv, {LORA_TARGETS.index(letter): updates[letter] for letter in targets}, parts=3)
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
        setattr(attention, name, AdaptedLinear(getattr(attention, name), {0: updates[letter]}))
    return nn.ModuleDict(updates)
