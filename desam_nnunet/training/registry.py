"""Every trainer by the name that is typed after ``-tr``."""

from __future__ import annotations

from desam_nnunet.training.base import SamTrainer
from desam_nnunet.training.dbsam import DBSAMTrainer
from desam_nnunet.training.dbsam_boxes import DBSAMTrainerBoxes
from desam_nnunet.training.desam import DeSAMTrainer, DeSAMTrainerWholeBox
from desam_nnunet.training.samed import SAMedTrainer, SAMedTrainerS

TRAINERS: dict[str, type[SamTrainer]] = {
    trainer.__name__: trainer
    for trainer in (DeSAMTrainer, DeSAMTrainerWholeBox, SAMedTrainer, SAMedTrainerS, DBSAMTrainer,
                    DBSAMTrainerBoxes)
}


def find_trainer(name: str) -> type[SamTrainer]:
    """Raises: ValueError: It is none of ours."""
    if name not in TRAINERS:
        raise ValueError(f"There is no trainer '{name}' here: choose {', '.join(TRAINERS)}.")
    return TRAINERS[name]
