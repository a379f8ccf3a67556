"""This package's trainers by the name that is typed after ``-tr``, and others of their kind that nnU-Net finds."""

from __future__ import annotations

from desam_nnunet.nnunet.lookup import look_up
from desam_nnunet.training.base import SamTrainer
from desam_nnunet.training.dbsam import DBSAMTrainer, DBSAMTrainerBoxes
from desam_nnunet.training.desam import DeSAMTrainer, DeSAMTrainerWholeBox
from desam_nnunet.training.pdmm import PDMMTrainer
from desam_nnunet.training.samed import SAMedTrainer, SAMedTrainerS

TRAINERS: dict[str, type[SamTrainer]] = {
    trainer.__name__: trainer
    for trainer in (DeSAMTrainer, DeSAMTrainerWholeBox, PDMMTrainer, SAMedTrainer, SAMedTrainerS, DBSAMTrainer,
                    DBSAMTrainerBoxes)
}


def find_trainer(name: str) -> type[SamTrainer]:
    """A trainer of this package's kind, ours or another's, as nnU-Net finds it.

    Raises:
        ValueError: nnU-Net finds none of that name, or it trains no network of this package's kind.
    """
    try:
        trainer = look_up(name)
    except Exception as error:  # there is none, it is no trainer, or a file of others raises whatever it likes
        raise ValueError(f"nnU-Net finds no trainer '{name}' ({type(error).__name__}): choose {', '.join(TRAINERS)}, "
                         "or list its folder in nnUNet_extTrainer.") from error
    if not issubclass(trainer, SamTrainer):
        raise ValueError(f"{name} trains no network on a foundation encoder: choose {', '.join(TRAINERS)}, or a "
                         "trainer that subclasses SamTrainer.")
    return trainer
