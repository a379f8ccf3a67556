"""This package's trainers by the name that is typed after ``-tr``, and any other that nnU-Net finds."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from desam_nnunet.nnunet.lookup import look_up
from desam_nnunet.settings.sections import Method
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
    except (RuntimeError, AssertionError, ImportError) as error:  # none, no trainer, or a file of others that fails
        raise ValueError(f"nnU-Net finds no trainer '{name}' ({type(error).__name__}): choose {', '.join(TRAINERS)}, "
                         "or list its folder in nnUNet_extTrainer.") from error
    if not issubclass(trainer, SamTrainer):
        raise ValueError(f"{name} trains no network on a foundation encoder: choose {', '.join(TRAINERS)}, or a "
                         "trainer that subclasses SamTrainer.")
    return trainer


@lru_cache
def method_of(trainer: str) -> Method | None:
    """The method of a trainer of this package's kind; None for nnU-Net's own."""
    kind = look_up(trainer)
    return kind.method if issubclass(kind, SamTrainer) else None


def methods_of(trainers: Iterable[str]) -> list[Method]:
    """The methods of those that have one, each once."""
    return list(dict.fromkeys(method for trainer in trainers if (method := method_of(trainer)) is not None))


def check_trainers(names: Iterable[str]) -> None:
    """Looks trainers up as nnU-Net does, for a comparison at sites that have no references.

    Raises:
        ValueError: There is none of that name, or it can't segment a new site.
    """
    for name in names:
        if name == DBSAMTrainerBoxes.__name__:
            raise ValueError(f"-tr {name} needs boxes from the reference, which a new site does not have: choose "
                             "another trainer, such as DBSAMTrainer.")
        try:
            look_up(name)
        except RuntimeError as error:
            raise ValueError(f"-tr {name}: nnU-Net finds no trainer of that name: see desam doctor.") from error
