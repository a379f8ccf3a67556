"""SAMed and DB-SAM through nnU-Net's own commands, and SAMed's published format from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import SimpleITK as sitk
import torch
from conftest import TRAINED, Workspace, nnunet, tiny_sections
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from desam_nnunet.commands.__main__ import main
from desam_nnunet.published.formats import official_samed_names

METHOD_PLANS = "MethodPlans"
METHODS = ("SAMedTrainer", "DBSAMTrainer", "SAMedTrainerS")


@pytest.fixture(scope="module")
def planned(workspace: Workspace) -> Workspace:
    workspace.write_plans(METHOD_PLANS, **tiny_sections(), samed={"rank": 2})
    return workspace


def train(workspace: Workspace, trainer: str, fold: int) -> Path:
    folder = workspace.model(trainer, METHOD_PLANS) / f"fold_{fold}"
    if not (folder / "checkpoint_final.pth").is_file():
        nnunet("nnUNetv2_train", 501, "2d", fold, "-tr", trainer, "-p", METHOD_PLANS, "-device", "cpu", "--npz")
    return folder


def predict(workspace: Workspace, trainer: str, out: Path, *folds: int) -> dict[str, bytes]:
    nnunet("nnUNetv2_predict", "-i", workspace.unseen / "images", "-o", out, "-d", 501, "-c", "2d", "-f", *folds, "-tr",
           trainer, "-p", METHOD_PLANS, "-device", "cpu", "-npp", 0, "-nps", 0, "--disable_tta",
           "--save_probabilities")
    return {path.name: sitk.GetArrayFromImage(sitk.ReadImage(path)).tobytes() for path in out.glob("*.nii.gz")}


@pytest.mark.slow
@pytest.mark.parametrize("trainer", METHODS)
def test_trains_and_predicts_through_nnunets_commands(planned: Workspace, trainer: str, tmp_path: Path) -> None:
    folder = train(planned, trainer, 0)
    assert "foreground_mean" in json.loads((folder / "validation" / "summary.json").read_text())
    log = next(folder.glob("training_log_*.txt")).read_text()
    assert "tiles are encoded as they come, nothing is cached" in log
    checkpoint = torch.load(folder / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    assert {key.split(".")[0] for key in checkpoint["network_weights"]} == TRAINED[trainer] | {"prompt_encoder"}
    method = checkpoint["init_args"]["plans"]["configurations"]["2d"]["samed" if "SAMed" in trainer else "dbsam"]
    assert method["lr"] == (0.005 if "SAMed" in trainer else 1e-4)
    assert len(predict(planned, trainer, tmp_path, 0)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["SAMedTrainer", "SAMedTrainerS", "DBSAMTrainer"])
def test_two_folds_predict_together_and_are_compared(planned: Workspace, trainer: str, tmp_path: Path) -> None:
    for fold in (0, 1):
        train(planned, trainer, fold)
    assert len(predict(planned, trainer, tmp_path / "both", 0, 1)) == 2
    nnunet("nnUNetv2_find_best_configuration", 501, "-c", "2d", "-p", METHOD_PLANS, "-tr", trainer, "-f", 0, 1,
           "-np", 1)
    predict(planned, trainer, tmp_path / "one", 0)
    nnunet("nnUNetv2_ensemble", "-i", tmp_path / "both", tmp_path / "one", "-o", tmp_path / "together", "-np", 1)
    assert len(list((tmp_path / "together").glob("*.nii.gz"))) == 2


@pytest.mark.parametrize("trainer", ["SAMedTrainer", pytest.param("SAMedTrainerS", marks=pytest.mark.slow)])
def test_samed_goes_out_and_comes_back(planned: Workspace, trainer: str, tmp_path: Path) -> None:
    folder, file = train(planned, trainer, 0), tmp_path / "samed.pth"
    assert main(["weights", "export", str(folder.parent), str(file)]) == 0
    published = torch.load(file, weights_only=True)
    assert published["w_a_015"].shape == (2, 192)  # q and v of eight blocks, rank 2
    assert ("mask_decoder.transformer.norm_final_attn.weight" in published) == (trainer == "SAMedTrainer")
    assert ("fati_vb" in published) == (trainer == "SAMedTrainerS")
    planned.write_plans("BackPlans", **tiny_sections())
    model = tmp_path / "model"
    assert main(["weights", "import", str(file), "-d", "501", "-p", "BackPlans", "-o", str(model)]) == 0
    plans = json.loads((model / "plans.json").read_text())
    assert plans["configurations"]["2d"]["samed"]["rank"] == 2
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), ("all",))
    back = official_samed_names(predictor.network.state_dict())
    assert back.keys() == published.keys()
    assert all(torch.equal(back[key], value) for key, value in published.items())


def test_export_refuses_what_it_can_not_write(
    planned: Workspace, trained: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "samed.pth"
    file.write_text("mine")
    model = train(planned, "SAMedTrainer", 0).parent
    for arguments, message in (
        ([model, file], "exists: remove it or choose another name"),
        ([model, tmp_path / "new.pth", "-f", "7"], "does not exist: give the model folder"),
        ([trained.model("DeSAMTrainer"), tmp_path / "new.pth"], "only SAMedTrainer and SAMedTrainerS have"),
    ):
        assert main(["weights", "export", *map(str, arguments)]) == 1
        assert message in capsys.readouterr().err
    assert file.read_text() == "mine"
    assert not (tmp_path / "new.pth").exists()


def test_import_refuses_another_rank_and_another_trainer(
    planned: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "samed.pth"
    assert main(["weights", "export", str(train(planned, "SAMedTrainer", 0).parent), str(file)]) == 0
    planned.write_plans("RankPlans", **tiny_sections(), samed={"rank": 8})
    given = ["weights", "import", str(file), "-d", "501", "-o", str(tmp_path / "model")]
    assert main([*given, "-p", "RankPlans"]) == 1
    assert "has samed.rank 2, but the plans say 8: take the key out" in capsys.readouterr().err
    assert main([*given, "-tr", "DeSAMTrainer"]) == 1
    assert "is a checkpoint for SAMedTrainer, not for -tr DeSAMTrainer" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
