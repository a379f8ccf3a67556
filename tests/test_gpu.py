"""On a CUDA device: ``make test-gpu``. It has not run yet, since none was at hand; tests/test_fake_device.py has."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import SimpleITK as sitk
import test_golden
import torch
from conftest import PLANS, TRAINED, Workspace, nnunet, tiny_sections
from safetensors.torch import load_file
from test_network import ANYTHING, BOX, make
from torch import Tensor

from desam_nnunet.cache.store import open_stores
from desam_nnunet.commands.__main__ import main
from desam_nnunet.encoders.attention import ExactAttention
from desam_nnunet.encoders.base import Features
from desam_nnunet.encoders.precision import encoder_dtype
from desam_nnunet.encoders.random_weights import RANDOM_IDENTITY
from desam_nnunet.encoders.weights import find_row, load_encoder
from desam_nnunet.networks.desam.prompters import GridPrompter, Prompter, WholeBoxPrompter
from desam_nnunet.planning.plan import _memory
from desam_nnunet.planning.request import Request
from desam_nnunet.sam.prompts import Prompts, whole_box
from desam_nnunet.sam.tiles import Geometry
from desam_nnunet.selftest.attention import compare_attention, plain_attention
from desam_nnunet.selftest.encoders import compare_encoder
from desam_nnunet.selftest.rows import precisions, relative_error
from desam_nnunet.selftest.run import exact_products

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
SEVERAL = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with exact_products():
        yield


@pytest.mark.parametrize(("side", "dim"), [(64, 64), (64, 80), (14, 64), (14, 80), (8, 32)])
def test_attention_is_sams(side: int, dim: int) -> None:
    """With the appended dimensions (tokens, d) is (4096, 192), (4096, 208), (196, 96), (196, 112), (64, 48)."""
    plain = plain_attention(side, dim)
    for dtype in precisions(CUDA):
        row = compare_attention(ExactAttention(copy.deepcopy(plain), 0), plain, CUDA, dtype)
        assert row.passed, row


@pytest.mark.parametrize("name", ["vit_tiny", "vit_b", "mobile_sam", "timm_random/test_vit",
                                  "timm_random/hiera_tiny_224", "timm_random/convnext_atto"])
def test_encoders_give_the_same_features(name: str) -> None:
    architecture = find_row(name).architecture
    encoder = architecture.load(architecture.random_state(), 256, RANDOM_IDENTITY).encoder
    for dtype in precisions(CUDA):
        row = compare_encoder(name, copy.deepcopy(encoder).to(CUDA), encoder, CUDA, dtype)
        assert row.passed, row


@pytest.mark.parametrize("name", ["vit_tiny", "lite_medsam", "timm_random/test_vit", "timm_random/convnext_atto"])
def test_weights_that_are_cast_once_are_those_that_autocast_makes(name: str) -> None:
    encoder = load_encoder(name, 128).encoder.to(CUDA)
    images = torch.randn(1, 3, 128, 128, device=CUDA)
    once = encoder(images)
    with torch.no_grad(), encoder.autocast(CUDA):
        each_time = encoder.run(images)
    for one, other in zip(once.tensors, each_time.tensors, strict=True):
        assert torch.equal(one, other)
    assert encoder.place[1] == torch.float32


@pytest.mark.parametrize("prompter", [GridPrompter(9), WholeBoxPrompter()])
@torch.no_grad()
def test_golden_masks(prompter: Prompter) -> None:
    golden = load_file(test_golden.GOLDEN, device="cuda")
    weights = {key.removeprefix("weights."): value for key, value in golden.items() if key.startswith("weights.")}
    network = test_golden.published(weights, prompter).to(CUDA)
    features = Features(tuple(golden[f"input.feature_{level}"] for level in range(3)), golden["input.neck"])
    if isinstance(prompter, GridPrompter):
        prompts, name = Prompts(points=golden["points.coords"]), "points"
    else:
        prompts, name = whole_box(Geometry((test_golden.SIZE,) * 2, test_golden.SIZE), 2, CUDA), "wholebox"
    masks, _ = network(features, prompts)
    assert relative_error(masks, golden[f"{name}.mask_logits"]) < 1e-4
    with torch.autocast("cuda"):
        masks, _ = network(features, prompts)
    assert relative_error(masks, golden[f"{name}.mask_logits"]) < 2e-2


@pytest.fixture(scope="module")
def on_a_gpu(workspace: Workspace) -> Workspace:
    """Every trainer, trained on the phantom by nnU-Net's own command."""
    for trainer in TRAINED:
        nnunet("nnUNetv2_train", 501, "2d", 0, "-tr", trainer, "-p", PLANS, "-device", "cuda")
    return workspace


@pytest.mark.parametrize("trainer", [trainer for trainer in TRAINED if trainer != "DBSAMTrainerBoxes"])
def test_a_trainer_trains_and_predicts(on_a_gpu: Workspace, tmp_path: Path, trainer: str) -> None:
    """On the CPU it predicts nearly the same, but where a threshold decides."""
    summary = json.loads((on_a_gpu.model(trainer) / "fold_0" / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 1
    for device in ("cuda", "cpu"):
        nnunet("nnUNetv2_predict", "-i", on_a_gpu.unseen / "images", "-o", tmp_path / device, "-d", 501, "-c", "2d",
               "-f", 0, "-tr", trainer, "-p", PLANS, "-device", device)
    cases = sorted(path.name for path in (tmp_path / "cuda").glob("*.nii.gz"))
    assert len(cases) == 2
    if trainer == "DeSAMTrainer":
        return
    for case in cases:
        ours, theirs = (sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / device / case)) for device in ("cuda", "cpu"))
        assert (ours != theirs).mean() < 0.05


def test_a_trainer_of_boxes_is_validated_with_them(on_a_gpu: Workspace) -> None:
    folder = on_a_gpu.model("DBSAMTrainerBoxes") / "fold_0" / "validation_with_boxes"
    assert (folder / "summary.json").is_file()


def test_a_cache_is_built(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.write_plans("GpuCachePlans", **tiny_sections(image_size=96))
    assert main(["cache", "-d", "501", "-p", "GpuCachePlans", "-device", "cuda"]) == 0
    assert "to encode" in capsys.readouterr().out
    (store,) = (store for store in open_stores(workspace.preprocessed) if store.recipe.image_size == 96)
    assert store.recipe.precision == str(encoder_dtype(CUDA)).removeprefix("torch.")
    assert len(store.cases()) == 5
    assert main(["cache", "-d", "501", "-p", "GpuCachePlans", "-device", "cuda"]) == 0
    assert "to encode" not in capsys.readouterr().out


@SEVERAL
def test_torchrun_shares_a_cache_among_gpus(workspace: Workspace) -> None:
    workspace.write_plans("TorchrunPlans", **tiny_sections(image_size=64))
    desam = Path(sys.executable).with_name("desam")
    nnunet("torchrun", "--nproc_per_node", 2, desam, "cache", "-d", 501, "-p", "TorchrunPlans", "-device", "cuda")
    (store,) = (store for store in open_stores(workspace.preprocessed) if store.recipe.image_size == 64)
    assert len(store.cases()) == 5


@torch.inference_mode()
def test_memory_that_runs_out_is_made_by_what_is_kept() -> None:
    """Features of earlier tiles fill what the process may take; a tile is predicted all the same."""
    network, tile = make(prompter=BOX).to(CUDA), torch.randn(1, 1, 64, 64, device=CUDA)
    expected = network(tile)
    network.memory.clear()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(CUDA) + 2**28) / total, CUDA)
        network.memory._kept[b"earlier"] = Features((), fill(CUDA))
        assert torch.equal(network(tile), expected)
        assert len(network.memory) == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)


@torch.inference_mode()
def test_a_batch_that_does_not_fit_is_encoded_in_halves() -> None:
    network, tiles = make(prompter=BOX).to(CUDA), torch.randn(256, 1, 64, 64, device=CUDA)
    expected = Features.joined([network.encode(part) for part in tiles.split(4)])
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    sizes: list[int] = []
    network.encoder.register_forward_hook(lambda _m, inputs, _o: sizes.append(len(inputs[0])))
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(CUDA) + 150e6) / total, CUDA)
        features = network.encode_in_parts(tiles)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)
    assert sum(sizes) == 256
    assert max(sizes) < 256
    for one, other in zip(features.tensors, expected.tensors, strict=True):
        assert relative_error(one, other) < 1e-2


def fill(device: torch.device) -> Tensor:
    """A tensor of all that the process may still take, but for 1 MB."""
    size = 2**30
    while size > 2**20:
        try:
            return torch.empty(size, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            size -= 2**20
    raise AssertionError("nothing is free")


def test_the_planner_counts_with_what_is_free() -> None:
    before = _memory(Request(), CUDA).value
    taken = torch.empty(2**28, dtype=torch.uint8, device=CUDA)
    assert _memory(Request(), CUDA).value <= before - 0.8 * taken.nbytes


@pytest.mark.parametrize("features", ["cached", "online"])
def test_compiled_training(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, features: str) -> None:
    name = f"Compiled{features}Plans"
    workspace.write_plans(name, **tiny_sections(features=features))
    monkeypatch.setenv("nnUNet_compile", "1")
    said = nnunet("nnUNetv2_train", 501, "2d", 0, "-tr", "DeSAMTrainer", "-p", name, "-device", "cuda").stdout
    assert "torch.compile" in said
    assert (workspace.model("DeSAMTrainer", name) / "fold_0" / "checkpoint_final.pth").is_file()


@torch.inference_mode()
def test_compiled_prediction() -> None:
    network, tile = make(2, ANYTHING).to(CUDA), torch.randn(1, 1, 64, 64, device=CUDA)
    expected = network(tile)
    network.memory.clear()
    torch.testing.assert_close(torch.compile(network)(tile), expected, rtol=0, atol=1e-3)


@SEVERAL
def test_two_gpus_train_and_validate_fewer_cases_than_there_are_gpus(workspace: Workspace) -> None:
    workspace.write_plans("TwoPlans", **tiny_sections())
    words = (501, "2d", 0, "-tr", "DeSAMTrainer", "-p", "TwoPlans", "-device", "cuda", "-num_gpus", 2)
    nnunet("nnUNetv2_train", *words)
    nnunet("nnUNetv2_train", *words, "--val")
    summary = workspace.model("DeSAMTrainer", "TwoPlans") / "fold_0" / "validation" / "summary.json"
    assert len(json.loads(summary.read_text())["metric_per_case"]) == 1


def test_the_self_test(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--self-test", "-device", "cuda"]) == 0, capsys.readouterr().out


def test_a_benchmark_finds_outputs_equal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It compares them before it measures."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    measure, training = (importlib.import_module(name) for name in ("measure", "training"))
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    assert training.run(CUDA, 1).passed
