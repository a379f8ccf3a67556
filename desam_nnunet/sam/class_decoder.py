"""SAM's mask decoder with one mask token per class instead of SAM's four masks of different extent.

Source: Kirillov et al., Segment Anything, ICCV 2023, appendix A; one token per class is SAMed's (Zhang and Liu, 2023).
"""

from __future__ import annotations

import torch
from segment_anything.modeling import MaskDecoder, TwoWayTransformer
from torch import Tensor, nn

from desam_nnunet.sam.two_way import freeze_key_biases

UPSCALING = 4  # of the masks over the image's map


class ClassHeads(nn.Module):
    """Mask tokens, hyper-networks and IoU head. The last gets no loss and is frozen; published checkpoints hold it.

    Nor does a hyper-network get a loss whose token makes no mask: those after the first `outputs`.
    """

    def __init__(self, decoder: MaskDecoder, outputs: int) -> None:
        super().__init__()
        self.mask_tokens = decoder.mask_tokens
        self.hypernetworks = decoder.output_hypernetworks_mlps
        self.hypernetworks[outputs:].requires_grad_(False)
        self.iou_head = decoder.iou_prediction_head.requires_grad_(False)


class ClassDecoder(nn.Module):
    """Makes `outputs` masks. What depends on their number is ``seg_layers``, which nnU-Net's transfer of weights skips.

    Args:
        silent: How many tokens more take part in the attention and make no mask, as in SAM, which decodes one of four.
        frozen_transformer: Whether the transformer is known by reference, and so no submodule.
    """

    def __init__(
        self, transformer: TwoWayTransformer, outputs: int, *, silent: int = 0, frozen_transformer: bool = False
    ) -> None:
        super().__init__()
        dim = transformer.embedding_dim
        stock = MaskDecoder(transformer_dim=dim, transformer=transformer, num_multimask_outputs=outputs + silent - 1,
                            iou_head_hidden_dim=dim)
        self._two_way = (transformer,)
        if not frozen_transformer:
            self.transformer = transformer
            freeze_key_biases(transformer)
        self.iou_token = stock.iou_token
        self.output_upscaling = stock.output_upscaling
        self.outputs = outputs
        self.seg_layers = ClassHeads(stock, outputs)

    def forward(self, image: Tensor, positions: Tensor, sparse: Tensor) -> Tensor:
        """Mask logits (B, outputs, 4h, 4w).

        Args:
            image: Neck output plus dense prompt embedding, (B, C, h, w).
            positions: Dense positional encoding, (1, C, h, w).
            sparse: Prompt tokens, (B, T, C); T may be 0.
        """
        (transformer,) = self._two_way
        output_tokens = torch.cat([self.iou_token.weight, self.seg_layers.mask_tokens.weight])
        tokens = torch.cat([output_tokens.expand(len(image), -1, -1), sparse.expand(len(image), -1, -1)], dim=1)
        read, stream = transformer(image, positions.expand(len(image), -1, -1, -1), tokens)
        embedding = stream.transpose(1, 2).unflatten(2, image.shape[-2:])  # B hw C -> B C h w
        upscaled = self.output_upscaling(embedding)
        networks = enumerate(self.seg_layers.hypernetworks[:self.outputs])
        hyper = torch.stack([network(read[:, k + 1]) for k, network in networks], dim=1)  # B outputs C/8
        return torch.einsum("bkc,bchw->bkhw", hyper, upscaled)

    def load_from_sam(self, decoder: MaskDecoder, *, heads: bool) -> None:
        """Starts from SAM's decoder, the transformer's weights excepted, which are shared or loaded by the caller.

        Args:
            heads: Whether every class's token and hyper-network start from SAM's first, the one that SAM uses for
                boxes, and silent ones from SAM's others; else they start fresh.
        """
        self.iou_token.load_state_dict(decoder.iou_token.state_dict())
        self.output_upscaling.load_state_dict(decoder.output_upscaling.state_dict())
        for number, network in enumerate(self.seg_layers.hypernetworks if heads else ()):
            theirs = max(0, number + 1 - self.outputs)
            network.load_state_dict(decoder.output_hypernetworks_mlps[theirs].state_dict())
            self.seg_layers.mask_tokens.weight.data[number] = decoder.mask_tokens.weight.data[theirs]
