"""DeSAM: a frozen encoder, PRIM and PDMM, assembled behind nnU-Net's network contract.

Source: Gao et al., DeSAM: Decoupled Segment Anything Model for Generalizable Medical Image Segmentation,
MICCAI 2024. Several classes, regions and voting over absent classes are ours; for one class they come
down to the published rule.
"""

from __future__ import annotations

import torch
from segment_anything.modeling import PromptEncoder
from torch import Tensor, nn

from desam_nnunet.encoders.base import Encoder, Features
from desam_nnunet.encoders.sam_vit import build_transformer
from desam_nnunet.networks.desam.pdmm import PDMM
from desam_nnunet.networks.desam.prim import PRIM, PrimOutput
from desam_nnunet.networks.desam.prompters import Prompter
from desam_nnunet.networks.frame import ABSENT_LOGIT, FrozenSamNetwork, Outline, uncompiled
from desam_nnunet.sam.prompts import Prompts, dense_positions, prompt_tokens
from desam_nnunet.sam.tiles import MASK_STRIDE, Geometry, TileToImage, logits_to_tile

# Image tokens that PRIM holds at once when it scores the grid; bounds the memory, not the result.
_TOKENS_AT_ONCE = 32768


class DeSAM(FrozenSamNetwork):
    """As the frame says; its scores are None where the prompter does not read them.

    Args:
        encoder: Frozen; it is no submodule, so that no checkpoint, optimiser or DDP bucket ever sees it.
        prompt_encoder: SAM's, frozen.
        prompter: Decides what is asked at prediction.
        to_image: Maps nnU-Net's tiles to the encoder's images.
        through_input: Whether mask logits are first enlarged to the encoder's input and then brought to the tile, as
            published, a slight blur; else they go there at once.
    """

    def __init__(
        self,
        *,
        encoder: Encoder | None,
        prompt_encoder: PromptEncoder,
        prim: PRIM,
        pdmm: PDMM,
        prompter: Prompter,
        to_image: TileToImage,
        num_channels: int = 1,
        background: bool = True,
        neck: nn.Module | None = None,
        mask_stride: int = MASK_STRIDE,
        through_input: bool = False,
    ) -> None:
        super().__init__(encoder=encoder, to_image=to_image, num_channels=num_channels, background=background,
                         neck=neck, mask_stride=mask_stride)
        self.prompt_encoder = prompt_encoder.requires_grad_(False)
        self.prim = prim
        self.pdmm = pdmm
        self.prompter = prompter
        self.through_input = through_input
        if not prompter.reads_scores:
            prim.freeze_scores()

    def decode(self, features: Features, prompts: Prompts) -> tuple[Tensor, Tensor | None]:
        return self._decode(features, self.pdmm.context(features.levels), prompts, score=self.prompter.reads_scores)

    @uncompiled
    def predict(self, features: Features, geometry: Geometry) -> Tensor:
        """Logits (B, K or K + 1, H, W): each present class from the mask of its best prompt."""
        if not self.prompter.reads_scores:
            prompts = self.prompter.prompts(geometry, features.neck.device).expand(len(features.neck))
            masks, _ = self._decode(features, self.pdmm.context(features.levels), prompts, score=False)
            return self.with_background(self._to_tile(masks, geometry))
        singles = (features.part(number) for number in range(len(features.neck)))
        return torch.cat([self._predict_by_scores(single, geometry) for single in singles])

    @uncompiled
    def scores(self, features: Features, geometry: Geometry) -> Tensor:
        """PRIM's raw scores (N, K) of every prompt on one tile, features as the decoder reads them."""
        prompts = self.prompter.prompts(geometry, features.neck.device)
        at_once = max(1, _TOKENS_AT_ONCE // features.neck[0, 0].numel())
        scores = []
        for chunk in prompts.split(at_once):
            iou = self._prim(features.neck, chunk, score=True).iou
            assert iou is not None
            scores.append(iou)
        return torch.cat(scores)

    @uncompiled
    def _predict_by_scores(self, features: Features, geometry: Geometry) -> Tensor:
        present, best = self.prompter.choose(self.scores(features, geometry))
        logits = features.neck.new_full((1, len(present), *geometry.tile), ABSENT_LOGIT, dtype=torch.float32)
        if present.any():
            prompts = self.prompter.prompts(geometry, features.neck.device)
            contexts = self.pdmm.context(features.levels)
            for number in best[present].unique():  # equal prompts share a run
                masks, _ = self._decode(features, contexts, prompts.one(number), score=False)
                classes = (present & (best == number)).nonzero()[:, 0]
                logits[0, classes] = self._to_tile(masks[:, classes], geometry)[0].float()
        return self.with_background(logits)

    def _to_tile(self, masks: Tensor, geometry: Geometry) -> Tensor:
        if self.through_input:
            masks = nn.functional.interpolate(masks, scale_factor=self.mask_stride, mode="bilinear")
            geometry = Geometry(geometry.tile, geometry.image_size, 1)
        return logits_to_tile(masks, geometry)

    def _decode(
        self, features: Features, contexts: list[Tensor], prompts: Prompts, *, score: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Masks and scores of one prompt per image."""
        output = self._prim(features.neck, prompts, score=score)
        return self.pdmm(output.mask_embedding, contexts), output.iou

    def _prim(self, neck: Tensor, prompts: Prompts, *, score: bool) -> PrimOutput:
        """PRIM on N prompts: one per image of the neck (N, C, h, w), or all on one image (1, C, h, w)."""
        sparse, dense = prompt_tokens(self.prompt_encoder, prompts)
        return self.prim(neck + dense[:1], dense_positions(self.prompt_encoder), sparse, score=score)


def build_desam(
    outline: Outline, prompter: Prompter, *, mask_stride: int = MASK_STRIDE, through_input: bool = False
) -> DeSAM:
    """A DeSAM on an encoder; PRIM starts from SAM's decoder where that is pretrained.

    Raises:
        ValueError: The encoder's neck is finer than the masks.
    """
    loaded = outline.loaded
    dim = loaded.prompt_dim
    prim = PRIM(transformer=build_transformer(dim), num_classes=outline.num_classes, iou_hidden=dim)
    if loaded.trained:
        prim.load_from_sam(loaded.mask_decoder)
    return DeSAM(
        encoder=loaded.encoder, prompt_encoder=loaded.prompt_encoder, prim=prim,
        pdmm=PDMM(spec=loaded.encoder.spec, prompt_dim=dim, num_classes=outline.num_classes, mask_stride=mask_stride),
        prompter=prompter, to_image=outline.to_image, num_channels=outline.num_channels,
        background=outline.background, neck=loaded.neck, mask_stride=mask_stride, through_input=through_input)
