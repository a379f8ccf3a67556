"""DB-SAM's two trainers: with a box around the whole tile, and with the paper's boxes from the ground truth.

Source: Qin et al., DB-SAM, MICCAI 2024, section 3, and the published settings: AdamW, weight decay 0.01, learning rate
1e-4 with one epoch of warm-up and polynomial decay; Dice (squared denominators) + cross-entropy. By how much boxes are
perturbed is ours, see :func:`desam_nnunet.sam.prompts.sample_boxes`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor
from torch import distributed as dist

from desam_nnunet.evaluation.boxes import Case, score, segment_cases
from desam_nnunet.networks.dbsam.network import DBSAM
from desam_nnunet.networks.dbsam.section import DBSAM as METHOD
from desam_nnunet.networks.dbsam.section import DbsamSection
from desam_nnunet.networks.frame import Outline
from desam_nnunet.sam.prompts import sample_boxes
from desam_nnunet.training.adapted import AdaptedSamTrainer, Optimization
from desam_nnunet.training.base import Batch
from desam_nnunet.training.losses import DiceCELoss, foreground_target

VALIDATION = "validation_with_boxes"
# Two labels, since nnU-Net calls nothing else a region.
_OBJECT = LabelManager({"background": 0, "object": [1, 2], "ignore": 3}, regions_class_order=[1])


class DBSAMTrainer(AdaptedSamTrainer):
    """Trains a convolution branch beside SAM's frozen encoder, the neck and the decoder.

    Attributes:
        boxes: Whether each tile comes with a box, and the network has one mask, of what the box is around.
    """

    method = METHOD
    decay = 0.01
    boxes: ClassVar[bool] = False

    @classmethod
    def build_network(cls, outline: Outline) -> DBSAM:
        own: DbsamSection = outline.section
        return DBSAM(outline, checkpointing=own.checkpointing, boxes=own.mask_tokens if cls.boxes else None)

    def configure_optimizers(self) -> Optimization:
        return self.adamw(self.num_iterations_per_epoch)

    def _build_loss(self) -> DiceCELoss:
        return DiceCELoss(self.target_labels, ce=1.0, dice=1.0, background=False, ddp=self.is_ddp)

    def compute_loss(self, inputs: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        """As the frame's; with boxes of tiles and these, and a target (B, 2, H, W): object, and what not to count."""
        logits = self.network(*inputs) if self.boxes else self.network(inputs)
        return self.loss(logits, target), logits


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
        network = self.bare_network.eval()
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
        prompts, chosen = sample_boxes(truth & labelled[:, None], self.bare_network.geometry(tiles))
        assert prompts.boxes is not None
        uncounted = ~(labelled & chosen.flatten(1).any(1)[:, None, None])
        return (tiles, prompts.boxes), torch.stack([chosen, uncounted], dim=1)
