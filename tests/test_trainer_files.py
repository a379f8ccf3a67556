"""What is said of trainers without importing them, beside what nnU-Net finds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from desam_nnunet.nnunet.lookup import look_up
from desam_nnunet.nnunet.trainer_files import is_nnunets_own
from desam_nnunet.training.methods import METHODS, check_trainers, method_of
from desam_nnunet.training.registry import TRAINERS

OURS = """
from desam_nnunet.training.pdmm import PDMMTrainer as Base
class {name}({base}):
    pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of somebody's trainers, which nnU-Net looks into before ours."""
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path), prepend=":")
    method_of.cache_clear()
    return tmp_path


def test_the_methods_are_those_of_the_trainers() -> None:
    assert {name: trainer.method for name, trainer in TRAINERS.items()} == METHODS
    assert [method_of(name) for name in TRAINERS] == list(METHODS.values())


@pytest.mark.parametrize("name", ["nnUNetTrainer", "nnUNetTrainer_5epochs", "nnUNetTrainerDA5", "PDMMTrainer", "None"])
def test_nnunets_own_are_told_by_their_files(name: str) -> None:
    assert is_nnunets_own(name) == name.startswith("nnUNet")
    if name != "None":
        assert look_up(name).__module__.startswith("nnunetv2.") == is_nnunets_own(name)


def test_what_was_copied_into_nnunets_folder_is_not_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainers = tmp_path / "nnunetv2" / "training" / "nnUNetTrainer"
    trainers.mkdir(parents=True)
    (tmp_path / "nnunetv2" / "__init__.py").touch()
    (trainers / "nnUNetTrainer.py").write_text("class nnUNetTrainer(object): pass\nclass Other: pass\n")
    (trainers / "copied.py").write_text(OURS.format(name="Copied", base="Base"))
    (trainers / "variants.py").write_text(
        "class A(nnUNetTrainer): pass\nclass B(nnUNetTrainer): pass\nclass Both(A, B): pass\nclass Loop(Loop): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nnunetv2")
    names = ("nnUNetTrainer", "A", "Both", "Copied", "Other", "Loop")
    assert [name for name in names if is_nnunets_own(name)] == ["nnUNetTrainer", "A", "Both"]


def test_somebodys_trainer_of_our_name_has_its_own_method(folder: Path) -> None:
    assert method_of("SAMedTrainer") is METHODS["SAMedTrainer"]
    method_of.cache_clear()
    (folder / "mine_of_that_name.py").write_text(OURS.format(name="SAMedTrainer", base="Base"))
    assert method_of("SAMedTrainer") is METHODS["PDMMTrainer"]


def test_without_our_folder_ours_are_not_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(folder))
    with pytest.raises(ValueError, match="-tr PDMMTrainer: nnU-Net finds no trainer of that name"):
        check_trainers(["PDMMTrainer"])


def test_a_class_that_is_no_trainer_and_a_file_that_fails_are_refused(folder: Path) -> None:
    (folder / "no_trainer_here.py").write_text("class NoTrainer:\n    pass\n")
    with pytest.raises(ValueError, match=r"-tr NoTrainer: .* \(AssertionError\)"):
        check_trainers(["NoTrainer"])
    (folder / "failing_trainer.py").write_text("raise ZeroDivisionError\n")
    with pytest.raises(ValueError, match=r"-tr Failing: .* \(ZeroDivisionError\)"):
        check_trainers(["Failing"])


def test_a_study_is_opened_without_heavy_imports() -> None:
    """nnU-Net's trainers and PyTorch take seconds, and a dry run needs neither."""
    words = ("import sys; from desam_nnunet.cross_site import engine, opening; "
             "opening.check_trainers(['DeSAMTrainer', 'nnUNetTrainer']); print(*sys.modules)")
    loaded = subprocess.run([sys.executable, "-c", words], check=True, capture_output=True, text=True).stdout.split()
    assert "snakemake" in loaded
    assert not {"torch", "nnunetv2", "timm", "matplotlib", "scipy"}.intersection(loaded)
