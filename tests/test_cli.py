"""The `desam` command, in this process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from conftest import nnunet

from desam_nnunet import __version__
from desam_nnunet.commands import findings
from desam_nnunet.commands.__main__ import main
from desam_nnunet.commands.words import columns
from desam_nnunet.encoders.registry import ENCODERS
from desam_nnunet.encoders.weights import find_weights
from desam_nnunet.training.registry import TRAINERS

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights anywhere, nnU-Net's folders in place."""
    monkeypatch.setenv("DESAM_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("nnUNet_extTrainer", str(ROOT / "trainers"))
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))


def test_doctor_of_a_sound_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert "ok  DeSAMTrainer            desam_nnunet.training.desam.DeSAMTrainer" in report
    assert f"{tmp_path / 'weights'} (does not exist)" in report
    assert "desam weights get vit_b (375 MB)" in report
    assert f"ok  weights vit_tiny        {find_weights('vit_tiny')}, verified" in report
    assert "weights vit_tiny_random RANDOM, not pretrained" in report
    assert "Nothing is wrong." in report


def test_doctor_says_what_threads_to_set(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(findings, "usable_cores", lambda: 3)
    main(["doctor"])
    report = capsys.readouterr().out
    assert "our training takes 3, but nnU-Net's own and its prediction 64" in report
    assert "-> export nnUNet_def_n_proc=3 OMP_WAIT_POLICY=passive" in report
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    main(["doctor"])
    assert "ok  threads                 3, one for each core" in capsys.readouterr().out


def test_doctor_names_the_remedy(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_raw", "")
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "nowhere"))
    monkeypatch.delenv("nnUNet_extTrainer")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / ENCODERS["vit_b"].file).write_bytes(b"half")
    assert main(["doctor"]) == 1
    report = capsys.readouterr().out
    assert "-> export nnUNet_raw=" in report
    assert f"-> mkdir -p {tmp_path / 'nowhere'}" in report
    assert f"-> export nnUNet_extTrainer=$nnUNet_extTrainer:{ROOT / 'trainers'}" in report
    assert f"{ENCODERS['vit_b'].file} is not the published file" in report
    assert f"{len(TRAINERS) + 3} thing(s) marked !!" in report  # every trainer, one file, two folders


def test_doctor_of_a_broken_file_of_the_users(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "broken.py").write_text("raise NotImplementedError\n")
    listed = f"{tmp_path / 'own'}{os.pathsep}{ROOT / 'trainers'}"
    monkeypatch.setenv("nnUNet_extTrainer", listed)
    assert main(["doctor"]) == 1
    report = capsys.readouterr().out
    assert "not found by nnU-Net: NotImplementedError" in report
    assert f"-> a file in {listed} fails to be imported: repair it" in report


def test_trainers_prints_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trainers"]) == 0
    assert capsys.readouterr().out == f"{ROOT / 'trainers'}\n"


def test_the_installed_command() -> None:
    assert nnunet("desam", "--version").stdout.strip() == __version__
    result = nnunet("desam", check=False)
    assert result.returncode == 2
    assert "usage: desam" in result.stderr


def test_weights_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "list"]) == 0
    output = capsys.readouterr().out
    assert "--  weights vit_h           not here" in output
    for name, row in ENCODERS.items():
        assert f"weights {name} " in output
        assert row.is_random or f"{row.architecture.family}, {row.licence}, trained on {row.trained_on}" in output


def test_weights_get_of_nothing_published(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "get", "vit_tiny_random"]) == 1
    assert capsys.readouterr().err == (
        "desam: No weights are published for 'vit_tiny_random': choose from vit_b, vit_l, vit_h, mobile_sam, or "
        "timm/<a model of timm's>.\n")
    assert main(["weights", "get", "vit_tiny"]) == 1
    assert capsys.readouterr().err == (
        "desam: 'vit_tiny' needs no download: its weights come with the package desam-nnunet; where they are missing, "
        "install desam-nnunet again.\n")


def test_weights_verify(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.pth"
    torch.save(ENCODERS["vit_tiny"].architecture.random_state(), path)
    assert main(["weights", "verify", str(path)]) == 0
    output = capsys.readouterr().out
    assert "vit_tiny, MD5 " in output
    assert "not one of the published files" in output
    os.truncate(path, 1000)
    assert main(["weights", "verify", str(path)]) == 1
    assert "truncated or not a weights file" in capsys.readouterr().err


def test_what_was_typed_is_not_printed_raw(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "verify", "\x1b[31mred.pth"]) == 1
    said = capsys.readouterr().err
    assert "red.pth" in said
    assert said.strip().isprintable()


def test_weights_verify_of_the_packaged_file(capsys: pytest.CaptureFixture[str]) -> None:
    path, md5 = find_weights("vit_tiny"), ENCODERS["vit_tiny"].md5
    assert main(["weights", "verify", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: vit_tiny, MD5 {md5}, vit_tiny of this package\n"


def test_weights_verify_of_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["weights", "verify", str(tmp_path / "none.pth")]) == 1
    assert "none.pth" in capsys.readouterr().err


def test_columns_are_as_wide_as_their_longest_text() -> None:
    assert columns([("a", "long text", "why"), ("longer", "b", "")]) == ["a       long text  why", "longer  b"]
