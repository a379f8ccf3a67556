"""Every trainer on real prostate MRI of two hospitals, on a few of its cases and for a few iterations."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pandas as pd
import pytest
from conftest import TRAINED, nnunet

DATA = Path(os.environ.get("DESAM_PROMISE12", "promise12 is not here"))
SETTINGS = {
    "batch_size": 4,
    "sam": {"encoder": "vit_tiny", "image_size": 128, "features": "online", "epochs": 2, "iterations_per_epoch": 5,
            "val_iterations_per_epoch": 1},
}


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="DESAM_PROMISE12 does not name the folder with RUNMC and UCL")
def test_every_trainer_trains_ensembles_and_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for site, count in (("RUNMC", 5), ("UCL", 1)):
        (tmp_path / "sites" / site).mkdir(parents=True)
        for label in sorted((DATA / site).glob("*_segmentation.nii.gz"))[:count]:
            for path in (label, label.with_name(label.name.replace("_segmentation", ""))):
                (tmp_path / "sites" / site / path.name).symlink_to(path)
    monkeypatch.setenv("nnUNet_def_n_proc", "2")
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    trainers = [name for name in TRAINED if name != "DBSAMTrainerBoxes"]
    nnunet("desam", "cross-site", tmp_path / "sites", "-o", tmp_path / "study", "-tr", *trainers, "nnUNetTrainer",
           "--sources", "RUNMC", "-f", "0", "1", "--settings", tmp_path / "settings.json", "-device", "cpu")
    scores = pd.read_csv(tmp_path / "study" / "scores.csv").query("protocol == 'volume'")
    assert scores.dice.between(0, 1).all()
    for name in [*trainers, "nnUNetTrainer"]:
        found = scores[scores.trainer == name].target.value_counts()
        assert found.to_dict() == {"RUNMC": 2, "UCL": 1}, name
    report = json.loads((tmp_path / "study" / "report.json").read_text())
    assert {cost["trainer"] for cost in report["costs"]} == {*trainers, "nnUNetTrainer"}
