"""Another prompt rule: a class is in a tile only if two points of the grid say so, and the second best decides.

A single point can err on a look-alike; two rarely do. Training is DeSAM's.
"""

from __future__ import annotations

from torch import Tensor

from desam_nnunet.networks.desam.prompters import Choice, GridPrompter, Prompter
from desam_nnunet.networks.desam.section import DesamSection
from desam_nnunet.training.desam import DeSAMTrainer


class TwoWitnesses(GridPrompter):
    """Reads the second best score of each class instead of the best."""

    def choose(self, scores: Tensor) -> Choice:
        best, points = scores.topk(min(2, len(scores)), dim=0)  # of N points, for K classes
        return Choice(best[-1] > self.threshold, points[-1])


class DeSAMTrainerTwoWitnesses(DeSAMTrainer):
    """DeSAM with that rule at prediction."""

    @classmethod
    def prompter(cls, section: DesamSection) -> Prompter:
        return TwoWitnesses(section.grid, section.iou_threshold, section.grid_offset)
