"""SAM in one of its sizes, with everything trained, and many prompts answered for each image at once."""

from __future__ import annotations

import torch
from segment_anything.modeling import MaskDecoder, Sam
from torch import Tensor, nn
from torch.nn import functional as F

from desam_nnunet.encoders.base import Features
from desam_nnunet.encoders.sam_vit import PATCH, SamViT, build_sam, read_features
from desam_nnunet.pretraining import regions
from desam_nnunet.pretraining.prompts import Answers
from desam_nnunet.sam.prompts import Prompts, dense_positions, prompt_tokens
from desam_nnunet.sam.tiles import MASK_STRIDE
from desam_nnunet.sam.two_way import run_layers, tokens_from_image

_FINER = PATCH // MASK_STRIDE  # mask pixels along a token's side
_SHARPENED = 2.5


class Pretrained(nn.Module):
    """SAM as it is pretrained: from the size's random weights, but for the mask decoder's queries, which find their
    place at once.

    Args:
        seed: Of what is drawn beside them.

    Attributes:
        sam: All that is kept. Of its four masks the first is trained, the one that boxes and DeSAM use.
        told: The heads that read the regions' descriptions from each of the encoder's outputs.
    """

    def __init__(self, size: SamViT, seed: int = 0) -> None:
        super().__init__()
        self.level_blocks = size.global_blocks[:-1]
        self.sam: Sam = build_sam(size)
        self.sam.load_state_dict(size.random_state())
        _match_places(self.sam.mask_decoder)
        widths = [size.embed_dim] * len(self.level_blocks) + [size.prompt_dim]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.told = nn.ModuleList(nn.Conv2d(width, regions.CHANNELS * _FINER**2, 1) for width in widths)

    def encode(self, images: Tensor) -> Features:
        """Of grey images (B, 1, S, S), 0 to 255."""
        vit = self.sam.image_encoder
        return read_features(vit, vit.patch_embed(self.sam.preprocess(images)) + vit.pos_embed, self.level_blocks)

    def describe(self, features: Features) -> list[Tensor]:
        """Each output's account of the regions, (B, 9, S/4, S/4), the border as a logit."""
        return [F.pixel_shuffle(head(x), _FINER) for head, x in zip(self.told, features.tensors, strict=True)]

    def answer(self, neck: Tensor, prompts: Prompts) -> Answers:
        """Masks of B·N prompts, image by image, on necks (B, C, h, w)."""
        sparse, dense = prompt_tokens(self.sam.prompt_encoder, prompts)  # B·N T C
        decoder = self.sam.mask_decoder
        image = (neck + dense[:1]).repeat_interleave(len(sparse) // len(neck), dim=0)
        stream = image.flatten(2).transpose(1, 2)  # B·N hw C
        positions = dense_positions(self.sam.prompt_encoder).flatten(2).transpose(1, 2)
        fixed = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([fixed.expand(len(sparse), -1, -1), sparse], dim=1)
        queries, stream = run_layers(decoder.transformer, stream, positions, tokens)
        attention = decoder.transformer.final_attn_token_to_image
        read = tokens_from_image(attention, (queries + tokens)[:, :2], stream + positions, stream)
        read = decoder.transformer.norm_final_attn(queries[:, :2] + read)  # the IoU's token, the first mask's
        embedding = stream.transpose(1, 2).unflatten(2, image.shape[-2:])
        upscaled = decoder.output_upscaling(embedding)
        masks = torch.einsum("nc,nchw->nhw", decoder.output_hypernetworks_mlps[0](read[:, 1]), upscaled)
        return Answers(masks, decoder.iou_prediction_head(read[:, 0])[:, 0])

    def weights(self) -> dict[str, Tensor]:
        """What a SAM file holds, float16, on the CPU."""
        return {key: value.detach().half().cpu().contiguous() for key, value in self.sam.state_dict().items()}


@torch.no_grad()
def _match_places(decoder: MaskDecoder) -> None:
    """Between prompts and image, queries begin with the projection of the keys: the nearer two places, the higher."""
    transformer = decoder.transformer
    attentions = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        attentions += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for attention in attentions:
        attention.k_proj.weight.mul_(_SHARPENED)
        attention.q_proj.load_state_dict(attention.k_proj.state_dict())
