"""What the files say in which nnU-Net looks for trainers. None of them is imported, nor anything heavy."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from desam_nnunet._startup import listed_folders

_TRAINER = "nnUNetTrainer"


def is_nnunets_own(name: str) -> bool:
    """Whether nnU-Net's own folder has a trainer `name` that descends from classes there alone."""
    spec = find_spec("nnunetv2")
    folders = [Path(place) / "training" / _TRAINER for place in (spec and spec.submodule_search_locations) or ()]
    bases = {node.name: [ast.unparse(base) for base in node.bases] for node in _classes(folders)}
    bases[_TRAINER] = []
    left, seen = [name], set[str]()
    while left:
        if (one := left.pop()) not in bases:
            return False
        left += bases[one] if one not in seen else ()
        seen.add(one)
    return _TRAINER in seen


def classes_in_folders() -> list[str]:
    """The names of all classes that files in the folders of ``nnUNet_extTrainer`` define; nothing is imported."""
    return list(dict.fromkeys(node.name for node in _classes(listed_folders())))


def is_mentioned(text: str) -> bool:
    """Whether a file in these folders uses `text` as a string, as where a method says its name; nothing is imported.

    Text that is only printed, raised or said in a docstring is not used.
    """
    return any(text in _used(tree) for tree in _trees(listed_folders()))


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


def _classes(folders: Iterable[str | Path]) -> Iterator[ast.ClassDef]:
    return (node for tree in _trees(folders) for node in tree.body if isinstance(node, ast.ClassDef))


def _trees(folders: Iterable[str | Path]) -> Iterator[ast.Module]:
    for file in sorted(file for folder in folders for file in Path(folder).rglob("*.py")):
        with contextlib.suppress(OSError, SyntaxError, ValueError):  # the look-up says what is wrong with it
            yield ast.parse(file.read_bytes())
