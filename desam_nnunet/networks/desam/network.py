"""DeSAM: a frozen encoder, PRIM and PDMM, assembled behind nnU-Net's network contract.

Source: Gao et al., DeSAM: Decoupled Segment Anything Model for Generalizable Medical Image Segmentation, MICCAI 2024.
Several classes, regions and voting over absent classes are ours; for one class they come down to the published rule.
"""

from __future__ import annotations

import torch
from segment_anything.modeling import PromptEncoder
from torch import Tensor, nn

from desam_nnunet.encoders.base import Encoder, Features
from desam_nnunet.encoders.sam_vit import build_transformer
from desam_nnunet.networks.desam.pdmm import PDMM
from desam_nnunet.networks.desam.prim import PRIM, PrimOutput
from desam_nnunet.networks.desam.prompters import PointPrompter, Prompter, SinglePrompter
from desam_nnunet.networks.frame import ABSENT_LOGIT, FrozenSamNetwork, Outline, uncompiled
from desam_nnunet.sam.many_prompts import ManyPrompts
from desam_nnunet.sam.prompts import Prompts, dense_positions, prompt_tokens
from desam_nnunet.sam.tiles import MASK_STRIDE, Geometry, TileToImage, logits_to_tile

# Image tokens that PRIM works on at once when it scores the grid on a CPU: about what its cache holds. Elsewhere it
# scores as many points at once as the memory holds.
_TOKENS_AT_ONCE = 32768


class DeSAM(FrozenSamNetwork):
    """PRIM and PDMM on frozen features; there are no scores where the prompter reads none.

    Args:
        prompt_encoder: SAM's, frozen.
        prompter: Decides what is asked at prediction.
        through_input: Whether mask logits are first enlarged to the encoder's input and then brought to the tile, as
            published, a slight blur; else they go there at once.
    """

    def __init__(
        self, *, encoder: Encoder, prompt_encoder: PromptEncoder, prim: PRIM, pdmm: PDMM, prompter: Prompter,
        to_image: TileToImage, num_channels: int = 1, background: bool = True, neck: nn.Module | None = None,
        mask_stride: int = MASK_STRIDE, through_input: bool = False, depth: int = 1,
    ) -> None:
        super().__init__(encoder=encoder, to_image=to_image, num_channels=num_channels, background=background,
                         neck=neck, mask_stride=mask_stride, depth=depth)
        self.prompt_encoder = prompt_encoder.requires_grad_(False)
        self.prim = prim
        self.pdmm = pdmm
        self.prompter = prompter
        self.through_input = through_input
        if isinstance(prompter, SinglePrompter):
            prim.freeze_scores()

    def decode(self, features: Features, prompts: Prompts) -> tuple[Tensor, Tensor | None]:
        output = self._prim(features.neck, prompts, score=isinstance(self.prompter, PointPrompter))
        contexts = self.pdmm.context(features.levels)
        return self.pdmm(output.mask_embedding, contexts, self.there(features)), output.iou

    @uncompiled
    def predict(self, features: Features, geometry: Geometry) -> Tensor:
        """Logits (B, K or K + 1, H, W): each present class from the mask of its prompt, slice by slice."""
        batch, prompter = len(features.neck), self.prompter
        if isinstance(prompter, SinglePrompter):
            masks, _ = self.decode(features, prompter.prompts(geometry, batch, features.neck.device))
            return self.with_background(self._to_tile(masks, geometry))
        return torch.cat([self._predict_by_scores(prompter, features.part(number, self.depth), geometry)
                          for number in range(batch // self.depth)])

    @uncompiled
    @torch.no_grad()
    def scores(self, features: Features, geometry: Geometry) -> Tensor:
        """PRIM's raw scores (N, K) of every point that is asked on one tile, features as the decoder reads them."""
        assert isinstance(self.prompter, PointPrompter)
        neck = features.neck.float()
        points = self.prompter.points(geometry, neck.device)
        with torch.autocast(neck.device.type, enabled=False):
            sparse, dense = prompt_tokens(self.prompt_encoder, Prompts(points=points))
            image = self.prim.for_many(neck + dense[:1], dense_positions(self.prompt_encoder))
            on_cpu = max(1, _TOKENS_AT_ONCE // neck[0, 0].numel())
            parts = sparse.split(on_cpu if neck.device.type == "cpu" else len(sparse))
            return torch.cat([self._scores_in_parts(image, part) for part in parts])

    def _scores_in_parts(self, image: ManyPrompts, sparse: Tensor) -> Tensor:
        """Of prompts (N, T, C); in halves where a GPU's memory is too small for all at once."""
        try:
            return self.prim.scores(image, sparse)
        except torch.OutOfMemoryError:
            if len(sparse) == 1:
                raise
        return torch.cat([self._scores_in_parts(image, half) for half in sparse.tensor_split(2)])

    @uncompiled
    def _predict_by_scores(self, prompter: PointPrompter, features: Features, geometry: Geometry) -> Tensor:
        """Of one tile or slab. A class that is in some of a slab's slices asks its best point in each."""
        chosen = [prompter.choose(self.scores(features.part(number), geometry)) for number in range(self.depth)]
        present, best = (torch.stack(rows, dim=1) for rows in zip(*chosen, strict=True))  # K D
        found = present.any(1)
        logits = features.neck.new_full((*present.T.shape, *geometry.tile), ABSENT_LOGIT, dtype=torch.float32)
        if found.any():
            points, there = prompter.points(geometry, features.neck.device), self.there(features)
            contexts = self.pdmm.context(features.levels)
            for numbers in best[found].unique(dim=0):  # equal points share a run
                prompts = Prompts(points=points[numbers])
                masks = self.pdmm(self._prim(features.neck, prompts, score=False).mask_embedding, contexts, there)
                classes = (found & (best == numbers).all(1)).nonzero()[:, 0]
                masks = self._to_tile(masks[:, classes], geometry).float()
                logits[:, classes] = masks.where(present[classes].T[..., None, None], logits[:, classes])
        return self.with_background(logits)

    def _to_tile(self, masks: Tensor, geometry: Geometry) -> Tensor:
        if self.through_input:
            masks = nn.functional.interpolate(masks.float(), scale_factor=self.mask_stride, mode="bilinear")
            geometry = Geometry(geometry.tile, geometry.image_size, 1)
        return logits_to_tile(masks, geometry)

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
        pdmm=PDMM(spec=loaded.encoder.spec, prompt_dim=dim, num_classes=outline.num_classes, mask_stride=mask_stride,
                  depth=outline.depth),
        prompter=prompter, to_image=outline.to_image, num_channels=outline.num_channels,
        background=outline.background, neck=loaded.neck, mask_stride=mask_stride, through_input=through_input,
        depth=outline.depth)
