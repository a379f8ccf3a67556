"""DeSAM: SAM's frozen encoder, PRIM and PDMM, assembled behind nnU-Net's network contract.

Source: Gao et al., DeSAM: Decoupled Segment Anything Model for Generalizable Medical Image Segmentation,
MICCAI 2024. Several classes, regions and voting over absent classes are ours; for one class they come
down to the published rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from segment_anything.modeling import PromptEncoder
from torch import Tensor

from desam_nnunet.encoders.base import Features, FrozenEncoder
from desam_nnunet.encoders.memory import FeatureMemory, content_key
from desam_nnunet.encoders.registry import build_transformer
from desam_nnunet.encoders.weights import LoadedSam
from desam_nnunet.networks.desam.pdmm import PDMM
from desam_nnunet.networks.desam.prim import PRIM, PrimOutput
from desam_nnunet.networks.frame import ABSENT_LOGIT, MAX_LOGIT, SamNetwork, mean_over_groups, uncompiled
from desam_nnunet.sam.prompts import Prompts, dense_positions, point_grid, prompt_tokens, whole_box
from desam_nnunet.sam.tiles import Geometry, TileToImage, logits_to_tile

# Image tokens that PRIM holds at once when it scores the grid; bounds the memory, not the result.
_TOKENS_AT_ONCE = 32768


class DeSAM(SamNetwork):
    """``network(tile)`` gives logits at tile size, ``network(features, prompts)`` is what training calls.

    Args:
        encoder: Frozen; it is no submodule, so that no checkpoint, optimiser or DDP bucket ever sees it.
        prompt_encoder: SAM's, frozen.
        to_image: Maps nnU-Net's tiles to SAM images.
        num_channels: Channels of the tiles.
        background: Whether logits start with a background channel, which is 0 by definition (labels), or
            not (regions).
        grid: Points per side of the prompt grid; None for whole-box prompts.
        iou_threshold: A class whose best score is not above it is absent from the tile.
    """

    def __init__(
        self,
        *,
        encoder: FrozenEncoder | None,
        prompt_encoder: PromptEncoder,
        prim: PRIM,
        pdmm: PDMM,
        to_image: TileToImage,
        num_channels: int = 1,
        background: bool = True,
        grid: int | None = 9,
        iou_threshold: float = 0.5,
    ) -> None:
        held = [] if encoder is None else [encoder]
        super().__init__(held=held, to_image=to_image, num_channels=num_channels, background=background)
        self.prompt_encoder = prompt_encoder.requires_grad_(False)
        self.prim = prim
        self.pdmm = pdmm
        self.grid = grid
        self.iou_threshold = iou_threshold
        self.memory = FeatureMemory()
        if grid is None:
            prim.freeze_scores()

    @property
    def encoder(self) -> FrozenEncoder:
        (encoder,) = self.held
        assert isinstance(encoder, FrozenEncoder)
        return encoder

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeSAM:
        """Forgets the features that lie on another device."""
        before = [encoder.place for encoder in self.held]
        super()._apply(fn, recurse)
        if before != [encoder.place for encoder in self.held]:
            self.memory.clear()
        return self

    def train(self, mode: bool = True) -> DeSAM:
        if mode:
            self.memory.clear()
        return super().train(mode)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """nnU-Net's predictor calls this for every fold of every volume."""
        self.memory.weights_loaded(next((value.data_ptr() for value in state_dict.values()), 0))
        return super().load_state_dict(state_dict, *args, **options)

    def forward(self, x: Tensor | Features, prompts: Prompts | None = None) -> Any:
        """Dispatches on the input, because DDP and torch.compile see nothing but ``forward``.

        Args:
            x: A batch of tiles (B, C, H, W), or their features.
            prompts: With features only, one per image.

        Returns:
            For tiles: logits (B, K or K + 1, H, W), no nonlinearity applied.
            For features: mask logits (B, K, S/4, S/4) and the scores (B, K), None in whole-box mode.

        Raises:
            ValueError: The tiles have another number of channels than planned, or hold NaN or infinity.
        """
        if isinstance(x, Tensor):
            return self._predict(x).clamp(-MAX_LOGIT, MAX_LOGIT)
        assert prompts is not None
        return self._decode(x, self.pdmm.context(x.levels), prompts, score=self.grid is not None)

    @uncompiled
    def encode(self, tiles: Tensor) -> Features:
        """Frozen features of (B, C, H, W) tiles; channel groups are encoded one by one and averaged."""
        images = self.images(tiles)  # B G 3 S S
        features = self.encoder(images.flatten(0, 1))
        return features.map(lambda x: mean_over_groups(x, images.shape[1]))

    @uncompiled
    def grid_scores(self, features: Features, geometry: Geometry) -> Tensor:
        """PRIM's raw scores (N, K) of every point of the grid on one tile, row by row."""
        assert self.grid is not None
        points = point_grid(geometry, self.grid, features.neck.device).points
        assert points is not None
        at_once = max(1, _TOKENS_AT_ONCE // features.neck[0, 0].numel())
        scores = []
        for chunk in points.split(at_once):
            iou = self._prim(features.neck, Prompts(points=chunk), score=True).iou
            assert iou is not None
            scores.append(iou)
        return torch.cat(scores)

    @uncompiled
    def _predict(self, tiles: Tensor) -> Tensor:
        """Predicts, without the features of other tiles if a device's memory is too small for both."""
        try:
            return self._predict_tiles(tiles)
        except torch.OutOfMemoryError:
            if len(self.memory) == 0:
                raise
        self.memory.clear()
        self.memory.budget = 0
        return self._predict_tiles(tiles)

    @uncompiled
    def _predict_tiles(self, tiles: Tensor) -> Tensor:
        geometry = self.geometry(tiles)
        features = self._remembered(tiles)
        if self.grid is None:
            prompts = whole_box(geometry, len(tiles), tiles.device)
            masks, _ = self._decode(features, self.pdmm.context(features.levels), prompts, score=False)
            return self.tile_logits(masks, geometry)
        singles = (features.map(lambda x, i=i: x[i : i + 1]) for i in range(len(tiles)))
        return torch.cat([self.predict_from_grid(single, geometry) for single in singles])

    @uncompiled
    def _remembered(self, tiles: Tensor) -> Features:
        """Features of `tiles`, encoded once per volume. Training draws its tiles anew: nothing to remember."""
        if self.training or torch.is_grad_enabled():
            return self.encode(tiles)
        key = content_key(tiles, self.encoder.identity, self.encoder.precision(tiles.device), vars(self.to_image))
        known = self.memory.find(key)
        if known is None:
            known = self.encode(tiles)
            self.memory.keep(key, known)
        return known

    @uncompiled
    def predict_from_grid(self, features: Features, geometry: Geometry) -> Tensor:
        """Logits (1, K or K + 1, H, W) of one tile: each present class from the mask of its best point."""
        best_score, best_point = self.grid_scores(features, geometry).max(0)  # K
        present = best_score > self.iou_threshold
        logits = features.neck.new_full((1, len(present), *geometry.tile), ABSENT_LOGIT, dtype=torch.float32)
        if present.any():
            points = point_grid(geometry, self.grid or 0, features.neck.device).points
            assert points is not None
            contexts = self.pdmm.context(features.levels)
            for point in best_point[present].unique():  # equal points share a run
                masks, _ = self._decode(features, contexts, Prompts(points=points[point][None]), score=False)
                classes = (present & (best_point == point)).nonzero()[:, 0]
                logits[0, classes] = logits_to_tile(masks[:, classes], geometry)[0].float()
        return self.with_background(logits)

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
    *,
    sam: LoadedSam,
    to_image: TileToImage,
    num_channels: int,
    num_classes: int,
    background: bool,
    grid: int | None,
    iou_threshold: float,
) -> DeSAM:
    """A DeSAM on `sam`; PRIM starts from SAM's decoder where SAM's weights are pretrained.

    Args:
        num_classes: Foreground classes or regions, K.
    """
    dim = sam.variant.prompt_dim
    prim = PRIM(transformer=build_transformer(dim), num_classes=num_classes, iou_hidden=dim)
    if not sam.random:
        prim.load_from_sam(sam.mask_decoder)
    return DeSAM(
        encoder=sam.encoder,
        prompt_encoder=sam.prompt_encoder,
        prim=prim,
        pdmm=PDMM(encoder_dim=sam.variant.embed_dim, prompt_dim=dim, num_classes=num_classes),
        to_image=to_image,
        num_channels=num_channels,
        background=background,
        grid=grid,
        iou_threshold=iou_threshold,
    )
