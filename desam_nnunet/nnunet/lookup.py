"""Trainers as nnU-Net finds them: its own, ours, and those of others in ``nnUNet_extTrainer``."""

from __future__ import annotations

import ast
import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    names = [node.name for tree in _trees_in_folders() for node in tree.body if isinstance(node, ast.ClassDef)]
    return list(dict.fromkeys(names))


def is_mentioned(text: str) -> bool:
    """Whether a file in these folders uses `text` as a string, as where a method says its name; nothing is imported.

    Text that is only printed, raised or said in a docstring is not used.
    """
    return any(text in _used(tree) for tree in _trees_in_folders())


def _used(tree: ast.Module) -> Iterator[Any]:
    left: list[ast.AST] = [tree]
    while left:
        match left.pop():
            case ast.Raise() | ast.Expr(ast.Constant()) | ast.Call(
                    ast.Name("print") | ast.Attribute(_, "print_to_log_file")):
                pass
            case ast.Constant(value):
                yield value
            case node:
                left += ast.iter_child_nodes(node)


def _trees_in_folders() -> Iterator[ast.Module]:
    for file in sorted(file for folder in listed_folders() for file in Path(folder).rglob("*.py")):
        with contextlib.suppress(OSError, SyntaxError, ValueError):  # the look-up says what is wrong with it
            yield ast.parse(file.read_bytes())
