"""The example on real prostate MRI, on a few of its cases and for a few iterations."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "promise12.py"
DATA = Path(os.environ.get("DESAM_PROMISE12", "promise12 is not here"))


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="DESAM_PROMISE12 does not name the folder with RUNMC and UCL")
def test_real_data_from_end_to_end(tmp_path: Path) -> None:
    for site, count in (("RUNMC", 5), ("UCL", 1)):
        (tmp_path / "data" / site).mkdir(parents=True)
        for label in sorted((DATA / site).glob("*_segmentation.nii.gz"))[:count]:
            for path in (label, label.with_name(label.name.replace("_segmentation", ""))):
                (tmp_path / "data" / site / path.name).symlink_to(path)
    short = ["--image-size", "128", "--disable_tta", "--epochs", "2", "--iterations", "5"]
    command = [sys.executable, SCRIPT, tmp_path / "data", tmp_path / "work", *short]
    subprocess.run(command, check=True, env=os.environ | {"nnUNet_def_n_proc": "2"})
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
