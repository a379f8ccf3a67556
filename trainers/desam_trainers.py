"""What nnU-Net's look-up finds after -tr; the classes live in the installed package."""

from desam_nnunet.training.dbsam import DBSAMTrainer, DBSAMTrainerBoxes
from desam_nnunet.training.desam import DeSAMTrainer, DeSAMTrainerWholeBox
from desam_nnunet.training.pdmm import PDMMTrainer
from desam_nnunet.training.samed import SAMedTrainer, SAMedTrainerS

__all__ = [
    "DBSAMTrainer", "DBSAMTrainerBoxes", "DeSAMTrainer", "DeSAMTrainerWholeBox", "PDMMTrainer", "SAMedTrainer",
    "SAMedTrainerS",
]
