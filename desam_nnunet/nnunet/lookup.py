"""Trainers as nnU-Net finds them: its own, ours, and those of others in ``nnUNet_extTrainer``."""

from __future__ import annotations

import ast
import contextlib
import io
from pathlib import Path

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from desam_nnunet._startup import listed_folders


def look_up(name: str) -> type[nnUNetTrainer]:
    """nnU-Net's look-up, which talks, in silence.

    Raises:
        RuntimeError: It finds none; a file of others that fails to be imported raises what it raises.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        return recursive_find_trainer_class_by_name(name)


def classes_in_folders() -> list[str]:
    """The names of all classes that files in the folders of ``nnUNet_extTrainer`` define; nothing is imported."""
    names: list[str] = []
    for file in sorted(file for folder in listed_folders() for file in Path(folder).rglob("*.py")):
        with contextlib.suppress(OSError, SyntaxError, ValueError):  # the look-up says what is wrong with it
            tree = ast.parse(file.read_bytes())
            names += [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    return list(dict.fromkeys(names))
