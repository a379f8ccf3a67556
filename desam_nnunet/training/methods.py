"""The methods of trainers by the name that is typed after ``-tr``; importing this imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from desam_nnunet._startup import listed_folders, shipped_folder
from desam_nnunet.networks.dbsam.section import DBSAM
from desam_nnunet.networks.desam.pdmm_section import PDMM_ALONE
from desam_nnunet.networks.desam.section import DESAM
from desam_nnunet.networks.samed.section import SAMED
from desam_nnunet.nnunet.trainer_files import classes_in_folders, is_nnunets_own
from desam_nnunet.settings.sections import Method

NEEDS_BOXES = "DBSAMTrainerBoxes"
METHODS = {
    "DeSAMTrainer": DESAM, "DeSAMTrainerWholeBox": DESAM, "PDMMTrainer": PDMM_ALONE, "SAMedTrainer": SAMED,
    "SAMedTrainerS": SAMED, "DBSAMTrainer": DBSAM, NEEDS_BOXES: DBSAM,
}


@lru_cache
def method_of(trainer: str) -> Method | None:
    """The method of a trainer of this package's kind; None for nnU-Net's own.

    Raises:
        RuntimeError: nnU-Net finds none; a file of others that fails to be imported raises what it raises.
    """
    if is_nnunets_own(trainer):
        return None
    if trainer in METHODS and shipped_folder("trainers") in listed_folders() and trainer not in classes_in_folders():
        return METHODS[trainer]
    from desam_nnunet.nnunet.lookup import look_up
    from desam_nnunet.training.base import SamTrainer

    kind = look_up(trainer)
    return kind.method if issubclass(kind, SamTrainer) else None


def methods_of(trainers: Iterable[str]) -> list[Method]:
    """The methods of those that have one, each once."""
    return list(dict.fromkeys(method for trainer in trainers if (method := method_of(trainer)) is not None))


def check_trainers(names: Iterable[str]) -> None:
    """Looks for trainers where nnU-Net does, for a comparison at sites that have no references.

    Raises:
        ValueError: There is none of that name, or it can't segment a new site.
    """
    for name in names:
        if name == NEEDS_BOXES:
            raise ValueError(f"-tr {name} needs boxes from the reference, which a new site does not have: choose "
                             "another trainer, such as DBSAMTrainer.")
        try:
            method_of(name)
        except Exception as error:  # a file of others may raise whatever it likes
            raise ValueError(f"-tr {name}: nnU-Net finds no trainer of that name ({type(error).__name__}): see desam "
                             "doctor.") from error
