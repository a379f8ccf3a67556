"""DeSAM: SAM's frozen encoder, PRIM and PDMM, assembled behind nnU-Net's network contract.

Source: Gao et al., DeSAM: Decoupled Segment Anything Model for Generalizable Medical Image Segmentation,
MICCAI 2024. Several classes, regions and voting over absent classes are ours; for one class they come
down to the published rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from segment_anything.modeling import PromptEncoder
from torch import Tensor, nn

from desam_nnunet.networks.pdmm import PDMM
from desam_nnunet.networks.prim import PRIM
from desam_nnunet.sam.encoder import Features, FrozenEncoder
from desam_nnunet.sam.prompts import Prompts, dense_positions, point_grid, prompt_tokens, whole_box
from desam_nnunet.sam.tiles import Geometry, TileToImage, logits_to_tile
from desam_nnunet.sam.variants import build_transformer
from desam_nnunet.sam.weights import LoadedSam

# An absent class gets this logit everywhere in the tile: low enough to lose against a background of 0,
# high enough that other tiles, mirrors and folds can outvote it.
ABSENT_LOGIT = -10.0
# nnU-Net sums logits times ten in float16 and gives a volume up where they overflow. No decision changes.
MAX_LOGIT = 100.0
# Image tokens that PRIM holds at once when it scores the grid; bounds the memory, not the result.
_TOKENS_AT_ONCE = 65536


class DeSAM(nn.Module):
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
        super().__init__()
        self._unregistered = (encoder,)
        self.prompt_encoder = prompt_encoder.requires_grad_(False)
        self.prim = prim
        self.pdmm = pdmm
        self.to_image = to_image
        self.num_channels = num_channels
        self.background = background
        self.grid = grid
        self.iou_threshold = iou_threshold
        if grid is None:
            prim.freeze_scores()

    @property
    def encoder(self) -> FrozenEncoder:
        encoder = self._unregistered[0]
        assert encoder is not None, "this network was built without an encoder"
        return encoder

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeSAM:
        """Takes the encoder along to another device."""
        super()._apply(fn, recurse)
        if self._unregistered[0] is not None:
            self._unregistered[0]._apply(fn, recurse)
        return self

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
        return self._decode(x, self.pdmm.context(x.levels), prompts)

    def encode(self, tiles: Tensor) -> Features:
        """Frozen features of (B, C, H, W) tiles; channel groups are encoded one by one and averaged."""
        self._check(tiles)
        images = self.to_image(tiles)  # B G 3 S S
        batch, groups = images.shape[:2]
        levels, neck = self.encoder(images.flatten(0, 1))
        if groups == 1:
            return Features(levels, neck)
        averaged = [x.unflatten(0, (batch, groups)).mean(1) for x in (*levels, neck)]
        return Features(tuple(averaged[:-1]), averaged[-1])

    def geometry(self, tiles: Tensor) -> Geometry:
        return Geometry((tiles.shape[-2], tiles.shape[-1]), self.to_image.image_size)

    def tile_logits(self, masks: Tensor, geometry: Geometry) -> Tensor:
        """Mask logits (B, K, S/4, S/4) as nnU-Net wants them: at tile size, with the background's 0 in front."""
        return self._with_background(logits_to_tile(masks, geometry))

    def grid_scores(self, features: Features, geometry: Geometry) -> Tensor:
        """PRIM's raw scores (N, K) of every point of the grid on one tile, row by row."""
        assert self.grid is not None
        points = point_grid(geometry, self.grid, features.neck.device).points
        assert points is not None
        at_once = max(1, _TOKENS_AT_ONCE // features.neck[0, 0].numel())
        scores = []
        for chunk in points.split(at_once):
            output = self._prim(features.neck, Prompts(points=chunk), score=True)
            scores.append(output.iou)
        return torch.cat(scores)

    def _predict(self, tiles: Tensor) -> Tensor:
        geometry = self.geometry(tiles)
        features = self.encode(tiles)
        if self.grid is None:
            prompts = whole_box(geometry, len(tiles), tiles.device)
            masks, _ = self._decode(features, self.pdmm.context(features.levels), prompts)
            return self.tile_logits(masks, geometry)
        singles = (Features(tuple(x[i : i + 1] for x in features.levels), features.neck[i : i + 1])
                   for i in range(len(tiles)))
        return torch.cat([self._predict_from_grid(single, geometry) for single in singles])

    def _predict_from_grid(self, features: Features, geometry: Geometry) -> Tensor:
        """Logits (1, K or K + 1, H, W) of one tile: each present class from the mask of its best point."""
        best_score, best_point = self.grid_scores(features, geometry).max(0)  # K
        present = best_score > self.iou_threshold
        logits = features.neck.new_full((1, len(present), *geometry.tile), ABSENT_LOGIT, dtype=torch.float32)
        if present.any():
            points = point_grid(geometry, self.grid or 0, features.neck.device).points
            assert points is not None
            contexts = self.pdmm.context(features.levels)
            for point in best_point[present].unique():  # equal points share a run
                masks, _ = self._decode(features, contexts, Prompts(points=points[point][None]))
                classes = (present & (best_point == point)).nonzero()[:, 0]
                logits[0, classes] = logits_to_tile(masks[:, classes], geometry)[0].float()
        return self._with_background(logits)

    def _decode(self, features: Features, contexts: list[Tensor], prompts: Prompts) -> tuple[Tensor, Tensor | None]:
        """Masks and scores of one prompt per image."""
        output = self._prim(features.neck, prompts, score=self.grid is not None)
        return self.pdmm(output.mask_embedding, contexts), output.iou

    def _prim(self, neck: Tensor, prompts: Prompts, *, score: bool) -> Any:
        sparse, dense = prompt_tokens(self.prompt_encoder, prompts)
        return self.prim(neck + dense, dense_positions(self.prompt_encoder), sparse, score=score)

    def _with_background(self, logits: Tensor) -> Tensor:
        if not self.background:
            return logits
        return torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1)

    def _check(self, tiles: Tensor) -> None:
        if tiles.shape[1] != self.num_channels:
            raise ValueError(
                f"The image has {tiles.shape[1]} channel(s), but the model was planned for {self.num_channels}: "
                "give one file per planned channel (_0000, _0001, ...)."
            )
        if not torch.isfinite(tiles).all():
            raise ValueError("The image holds NaN or infinite values after preprocessing: repair or remove it.")


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
    if sam.mask_decoder is not None:
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
