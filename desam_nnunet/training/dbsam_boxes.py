"""DB-SAM as the paper trains and scores it: with boxes from the ground truth.

Source: Qin et al., DB-SAM, MICCAI 2024, sections 3.1 and 3.2. By how much boxes are perturbed is ours, see
:func:`desam_nnunet.sam.prompts.sample_boxes`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor
from torch import distributed as dist

from desam_nnunet.evaluation.boxes import Case, score, segment_cases
from desam_nnunet.networks.dbsam.network import DBSAM
from desam_nnunet.sam.prompts import sample_boxes
from desam_nnunet.training.base import Batch
from desam_nnunet.training.dbsam import DBSAMTrainer
from desam_nnunet.training.losses import foreground_target

VALIDATION = "validation_with_boxes"
# Two labels, since nnU-Net calls nothing else a region.
_OBJECT = LabelManager({"background": 0, "object": [1, 2], "ignore": 3}, regions_class_order=[1])


class DBSAMTrainerBoxes(DBSAMTrainer):
    """Each tile shows one class and a box around it; the one mask is of whatever the box is around.

    nnU-Net's predictor knows no boxes, so a model is evaluated with ``desam boxes``, as is the fold's validation.
    """

    boxes = True

    @property
    def target_labels(self) -> LabelManager:
        return _OBJECT

    def _set_batch_size_and_oversample(self) -> None:
        self.oversample_foreground_percent = 1.0  # a tile without foreground teaches nothing
        super()._set_batch_size_and_oversample()

    def compute_loss(self, inputs: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        """As the frame's. Args: inputs: Tiles and their boxes. target: (B, 2, H, W), the object and what not to count.
        """
        logits = self.network(*inputs)
        return self.loss(logits, target), logits

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Scores the fold's validation cases with boxes from their reference, in a folder of another name."""
        folder = Path(self.output_folder) / VALIDATION
        folder.mkdir(exist_ok=True)
        self.print_to_log_file(f"Validation with boxes from the reference, into {folder}: not to be compared with "
                               "what nnUNetv2_predict reaches without them.")
        _, keys = self.do_split()
        if self.is_ddp:
            keys = keys[dist.get_rank()::dist.get_world_size()]
        dataset = self.dataset_class(self.preprocessed_dataset_folder, keys)
        cases = (Case(key, *(dataset.load_case(key)[place] for place in (0, 1, 3))) for key in dataset.identifiers)
        self.network.eval()
        network = self.bare_network
        assert isinstance(network, DBSAM)
        segment_cases(network, cases, len(keys), self.plans_manager, self.configuration_manager,
                      self.dataset_json, folder, self.device)
        if self.is_ddp:
            dist.barrier()
        if self.local_rank == 0:
            reference = Path(self.preprocessed_dataset_folder_base) / "gt_segmentations"
            dice = score(reference, folder, self.plans_manager, self.dataset_json)
            self.print_to_log_file(f"Mean Dice with boxes: {dice:.4f}")

    def _on_device(self, batch: Batch) -> tuple[tuple[Tensor, Tensor], Tensor]:
        tiles, target = super()._on_device(batch)
        assert isinstance(tiles, Tensor)
        truth, labelled = foreground_target(target, self.label_manager)
        truth = truth & labelled[:, None]
        prompts, chosen = sample_boxes(truth, self.bare_network.geometry(tiles))
        uncounted = ~(labelled & chosen.flatten(1).any(1)[:, None, None])
        assert prompts.boxes is not None
        return (tiles, prompts.boxes), torch.stack([chosen, uncounted], dim=1)
