"""The example on real prostate MRI, on a few of its cases and for a few iterations."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "promise12.py"
DATA = Path(os.environ.get("DESAM_PROMISE12", "promise12 is not here"))


WORKERS = {"nnUNet_def_n_proc": "2", "nnUNet_n_proc_DA": "1"}
SHORT = ["--image-size", "128", "--disable_tta", "--epochs", "2", "--iterations", "5"]
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="DESAM_PROMISE12 does not name the folder with RUNMC and UCL")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five cases of one hospital, one of the other."""
    folder = tmp_path_factory.mktemp("data")
    for site, count in (("RUNMC", 5), ("UCL", 1)):
        (folder / site).mkdir()
        for label in sorted((DATA / site).glob("*_segmentation.nii.gz"))[:count]:
            for path in (label, label.with_name(label.name.replace("_segmentation", ""))):
                (folder / site / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def work(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one trainer, to which the others are added."""
    return tmp_path_factory.mktemp("work") / "run"


@pytest.mark.slow
@real_data
@pytest.mark.parametrize("trainer", ["SAMedTrainer", "SAMedTrainerS", "DBSAMTrainer", "DeSAMTrainerWholeBox"])
def test_every_trainer_trains_resumes_and_ensembles_on_real_data(data: Path, work: Path, trainer: str) -> None:
    words = [sys.executable, SCRIPT, data, work, *SHORT, "-tr", trainer]
    subprocess.run(words, check=True, env=os.environ | WORKERS)
    assert f"| {trainer} | " in (work / "promise12.md").read_text()
    folders = {name: str(work / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    environment = os.environ | folders | WORKERS
    programs = Path(sys.executable).parent
    given = ["-tr", trainer, "-p", "Promise12Plans", "-device", "cpu"]
    train = [programs / "nnUNetv2_train", "512", "2d", "1", *given, "--c"]
    fold = work / "nnUNet_results" / "Dataset512_RUNMC" / f"{trainer}__Promise12Plans__2d" / "fold_1"
    with subprocess.Popen(train, env=environment, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        while not (fold / "checkpoint_latest.pth").exists() and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    assert not (fold / "checkpoint_final.pth").exists()
    log = subprocess.run(train, env=environment, check=True, capture_output=True, text=True).stdout
    assert "Epoch 0" not in log
    assert "Epoch 1" in log
    out = work / "both" / trainer
    subprocess.run([programs / "nnUNetv2_predict", "-i", work / "UCL" / "images", "-o", out, "-d", "512", "-c", "2d",
                    "-f", "0", "1", *given, "-npp", "1", "-nps", "1", "--disable_tta"], env=environment, check=True)
    assert len(list(out.glob("*.nii.gz"))) == 1


@pytest.mark.slow
@real_data
def test_real_data_from_end_to_end(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, data, tmp_path / "work", *SHORT]
    subprocess.run(command, check=True, env=os.environ | WORKERS)
    report = (tmp_path / "work" / "promise12.md").read_text()
    assert "vit_tiny, RANDOM weights" in report
    assert re.search(r"embedding cache: \d+ tiles in [\d.]+ minutes, [\d.]+ GB as float16", report)
    other = subprocess.run([*command[:-1], "6"], capture_output=True, text=True)
    assert other.returncode == 2
    assert "holds a run with other settings" in other.stderr
    rows = re.findall(r"\| (\w+Trainer\w*) \| ([\d.]+) \| ([\d.]+) \| [\d.]+ \| [\d.]+ \|", report)
    assert [name for name, *_ in rows] == ["DeSAMTrainer", "DeSAMTrainerWholeBox", "nnUNetTrainer"]
    assert all(0 <= float(score) <= 1 for _, *scores in rows for score in scores)


def test_a_folder_without_the_sites_is_refused(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, SCRIPT, tmp_path, tmp_path / "work"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "RUNMC does not exist: DATA must hold the folders RUNMC and UCL" in result.stderr
    assert not (tmp_path / "work").exists()
