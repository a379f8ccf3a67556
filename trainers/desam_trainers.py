"""What nnU-Net's look-up finds after -tr; the classes live in the installed package."""

from desam_nnunet.training.desam import DeSAMTrainer, DeSAMTrainerWholeBox

__all__ = ["DeSAMTrainer", "DeSAMTrainerWholeBox"]
