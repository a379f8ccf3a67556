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
    """Attributes: present: (K,) bool, whether a class is in the tile. prompt: (K,), whose mask each class takes."""

    present: Tensor
    prompt: Tensor


class Prompter(ABC):
    """Given to the network, which asks all prompts of each tile and takes each class's mask from the one chosen."""

    @abstractmethod
    def prompts(self, geometry: Geometry, device: torch.device) -> Prompts:
        """All prompts of one tile: N points (N, 1, 2), or one box (1, 4)."""

    @property
    @abstractmethod
    def reads_scores(self) -> bool:
        """Whether PRIM's scores are wanted, and so trained."""

    @abstractmethod
    def choose(self, scores: Tensor) -> Choice:
        """Args: scores: PRIM's, raw, (N, K)."""


@dataclass(frozen=True)
class GridPrompter(Prompter):
    """Points at the centres of a grid's cells; a class whose best score is not above the threshold is absent.

    Attributes:
        side: Points per side.
        threshold: Of the scores.
        offset: Added to the centres, in pixels of the encoder's input; 0 is published, see
            :class:`~desam_nnunet.networks.desam.section.DesamSection`.
    """

    side: int = 9
    threshold: float = 0.5
    offset: float = 0.0

    reads_scores = True

    def prompts(self, geometry: Geometry, device: torch.device) -> Prompts:
        return point_grid(geometry, self.side, device, self.offset)

    def choose(self, scores: Tensor) -> Choice:
        best, point = scores.max(0)
        return Choice(best > self.threshold, point)


class WholeBoxPrompter(Prompter):
    """One box around the whole tile; every class takes its mask from it."""

    reads_scores = False

    def prompts(self, geometry: Geometry, device: torch.device) -> Prompts:
        return whole_box(geometry, 1, device)

    def choose(self, scores: Tensor) -> Choice:
        classes = scores.new_zeros(scores.shape[1], dtype=torch.int64)
        return Choice(torch.ones_like(classes, dtype=torch.bool), classes)
