"""What DeSAM asks at prediction, and which answers count.

Source: Gao et al., DeSAM, MICCAI 2024, section 2.4 and the published code: a grid of points of which the best decides,
or one box around everything. Several classes are ours; for one class they come down to the published rule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from desam_nnunet.sam.prompts import Prompts, point_grid, whole_box
from desam_nnunet.sam.tiles import Geometry


class Choice(NamedTuple):
    """Which classes are in a tile, (K,) bool, and the number of the point whose mask each class takes, (K,)."""

    present: Tensor
    prompt: Tensor


class PointPrompter(ABC):
    """Asks points, and chooses by PRIM's scores of them, which are trained: whether the point lies on the class."""

    @abstractmethod
    def points(self, geometry: Geometry, device: torch.device) -> Tensor:
        """The points of a tile (N, 1, 2), N from 1 on: x and y in pixels of the encoder's input."""

    @abstractmethod
    def choose(self, scores: Tensor) -> Choice:
        """The choice among the points of one tile, from their raw scores (N, K)."""


class SinglePrompter(ABC):
    """Asks one prompt of a tile, from which every class takes its mask. It is trained with; no score is."""

    @abstractmethod
    def prompts(self, geometry: Geometry, batch: int, device: torch.device) -> Prompts:
        """The prompt of each tile of a batch: points (B, 1, 2) or boxes (B, 4)."""


Prompter = PointPrompter | SinglePrompter


@dataclass(frozen=True)
class GridPrompter(PointPrompter):
    """Points at the centres of a grid's cells; a class whose best score is not above the threshold is absent.

    Attributes:
        side: Points per side.
        offset: Added to the centres, see :class:`~desam_nnunet.networks.desam.section.DesamSection`.
    """

    side: int = 9
    threshold: float = 0.5
    offset: float = 0.0

    def points(self, geometry: Geometry, device: torch.device) -> Tensor:
        return point_grid(geometry, self.side, device, self.offset)

    def choose(self, scores: Tensor) -> Choice:
        best, point = scores.max(0)
        return Choice(best > self.threshold, point)


class WholeBoxPrompter(SinglePrompter):
    """One box around the whole tile."""

    def prompts(self, geometry: Geometry, batch: int, device: torch.device) -> Prompts:
        return whole_box(geometry, batch, device)
