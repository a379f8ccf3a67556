"""PRIM, DeSAM's prompt-relevant IoU module.

Source: Gao et al., DeSAM, MICCAI 2024, section 2.2: SAM's two-way transformer, whose image stream becomes
the mask embedding and whose IoU token says whether the prompt lies on the organ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from segment_anything.modeling import MaskDecoder, TwoWayTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from desam_nnunet.sam.many_prompts import ManyPrompts
from desam_nnunet.sam.two_way import freeze_key_biases, run_layers, tokens_from_image

NUM_MASK_TOKENS = 4  # SAM's; they carry no mask here, but they take part in the attention


class PrimOutput(NamedTuple):
    """The mask embedding (N, C, h, w), and raw scores (N, K), None where they are not asked for."""

    mask_embedding: Tensor
    iou: Tensor | None


class IoUHead(nn.Module):
    """SAM's IoU head, an MLP of three layers, with one output per foreground class.

    The last layer's key holds ``.seg_layers.``, so that nnU-Net's transfer of pretrained weights skips it
    where the classes differ.
    """

    def __init__(self, dim: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, hidden), nn.Linear(hidden, hidden)])
        self.seg_layers = nn.Linear(hidden, num_classes)

    def forward(self, token: Tensor) -> Tensor:
        for layer in self.layers:
            token = F.relu(layer(token))
        return self.seg_layers(token)


class PRIM(nn.Module):
    """SAM's transformer as the source has it, with one IoU score for each of K foreground classes or regions."""

    def __init__(self, *, transformer: TwoWayTransformer, num_classes: int, iou_hidden: int) -> None:
        super().__init__()
        dim = transformer.embedding_dim
        self.transformer = transformer
        freeze_key_biases(transformer)
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(NUM_MASK_TOKENS, dim)
        self.iou_head = IoUHead(dim, iou_hidden, num_classes)

    def forward(self, image: Tensor, positions: Tensor, sparse: Tensor, *, score: bool) -> PrimOutput:
        """Mask embedding and, if wanted, scores of N prompts.

        Args:
            image: Neck output plus dense prompt embedding, (N, C, h, w), or (1, C, h, w) for all prompts.
            positions: Dense positional encoding, (1, C, h, w).
            sparse: Prompt tokens, (N, T, C).
        """
        tokens = self._tokens(sparse)
        stream = image.flatten(2).transpose(1, 2)  # B C h w -> B hw C
        key_pe = positions.flatten(2).transpose(1, 2)
        queries, stream = run_layers(self.transformer, stream, key_pe, tokens)
        embedding = stream.transpose(1, 2).unflatten(2, image.shape[-2:])  # N hw C -> N C h w
        return PrimOutput(embedding, self._iou(queries, stream, tokens, key_pe) if score else None)

    def for_many(self, image: Tensor, positions: Tensor) -> ManyPrompts:
        """One image (1, C, h, w), prepared for :meth:`scores`; positions as in :meth:`forward`."""
        stream, key_pe = (x[0].flatten(1).T.contiguous() for x in (image, positions))  # 1 C h w -> hw C
        return ManyPrompts(self.transformer, stream, key_pe)

    def scores(self, image: ManyPrompts, sparse: Tensor) -> Tensor:
        """Raw scores (N, K) of N prompts (N, T, C) without mask embeddings, which takes a fraction of the time."""
        return self.iou_head(image.first_token(self._tokens(sparse)))

    def _tokens(self, sparse: Tensor) -> Tensor:
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        return torch.cat([output_tokens.expand(len(sparse), -1, -1), sparse], dim=1)

    def _iou(self, queries: Tensor, stream: Tensor, tokens: Tensor, key_pe: Tensor) -> Tensor:
        """The final attention of the IoU token, the only one that is read."""
        iou = queries[:, :1]
        attention = self.transformer.final_attn_token_to_image
        iou = iou + tokens_from_image(attention, iou + tokens[:, :1], stream + key_pe, stream)
        return self.iou_head(self.transformer.norm_final_attn(iou)[:, 0])

    def freeze_scores(self) -> None:
        """Freezes what only the scores need, so that whole-box training leaves no parameter without gradient."""
        for module in (self.iou_head, self.transformer.final_attn_token_to_image, self.transformer.norm_final_attn):
            module.requires_grad_(False)

    def load_from_sam(self, decoder: MaskDecoder) -> None:
        """Starts from SAM's mask decoder; each class's IoU output starts from SAM's output 0, the one DeSAM uses."""
        for name in ("transformer", "iou_token", "mask_tokens"):
            getattr(self, name).load_state_dict(getattr(decoder, name).state_dict())
        *hidden, last = decoder.iou_prediction_head.layers
        self.iou_head.layers.load_state_dict(nn.ModuleList(hidden).state_dict())
        with torch.no_grad():
            self.iou_head.seg_layers.weight.copy_(last.weight[:1])
            self.iou_head.seg_layers.bias.copy_(last.bias[:1])
