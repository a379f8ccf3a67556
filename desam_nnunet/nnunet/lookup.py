"""Trainers as nnU-Net finds them: its own, ours, and those of others in ``nnUNet_extTrainer``.

Importing this takes seconds.
"""

from __future__ import annotations

import contextlib
import io

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name


def look_up(name: str) -> type[nnUNetTrainer]:
    """nnU-Net's look-up, which talks, in silence.

    Raises:
        RuntimeError: It finds none; a file of others that fails to be imported raises what it raises.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        return recursive_find_trainer_class_by_name(name)
