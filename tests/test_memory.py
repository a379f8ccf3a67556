"""The features of a volume are kept, so that several folds encode each tile once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from test_network import BOX, make
from torch import Tensor

from desam_nnunet.encoders.base import Features
from desam_nnunet.encoders.memory import FeatureMemory, content_key
from desam_nnunet.networks import frame
from desam_nnunet.networks.desam.network import DeSAM
from desam_nnunet.networks.desam.prompters import GridPrompter, Prompter
from desam_nnunet.system.machine import _groups, free_memory, memory_limit

TILE_BYTES = 10 * 4


def tile_features() -> Features:
    return Features((torch.zeros(6),), torch.zeros(4))


def look_up(memory: FeatureMemory, *tiles: str) -> list[bool]:
    """Which of the tiles were known."""
    known = []
    for tile in tiles:
        found = memory.find(tile.encode())
        known.append(found is not None)
        if found is None:
            memory.keep(tile.encode(), tile_features())
    return known


def test_each_fold_after_the_first_finds_every_tile() -> None:
    memory = FeatureMemory(budget=100 * TILE_BYTES)
    for fold in range(5):
        memory.weights_loaded(fold)
        assert look_up(memory, "a", "b", "c") == [fold > 0] * 3


def test_full_memory_admits_no_more_and_drops_nothing() -> None:
    memory = FeatureMemory(budget=2 * TILE_BYTES)
    for fold in range(3):
        memory.weights_loaded(fold)
        assert look_up(memory, "a", "b", "c", "d") == [fold > 0, fold > 0, False, False]
    assert len(memory) == 2


def test_a_new_volume_takes_the_place_of_the_last_one() -> None:
    memory = FeatureMemory(budget=2 * TILE_BYTES)
    for volume in ("a", "b"):
        for fold in (1, 2):
            memory.weights_loaded(fold)
            assert look_up(memory, volume, volume + "'") == [fold == 2] * 2


def test_a_new_volume_is_recognised_though_it_begins_with_the_same_tile() -> None:
    """Air in the corner of every CT: only the weights that come back tell."""
    memory = FeatureMemory(budget=2 * TILE_BYTES)
    for volume in ("a", "b"):
        for fold in (1, 2):
            memory.weights_loaded(fold)
            assert look_up(memory, "air", volume) == [fold == 2] * 2


def test_a_new_volume_is_recognised_though_weights_are_read_anew() -> None:
    memory = FeatureMemory(budget=1 * TILE_BYTES)
    memory.weights_loaded(1)
    look_up(memory, "a")
    memory.weights_loaded(2)
    assert look_up(memory, "b", "b") == [False, True]


def test_a_single_fold_keeps_nothing_from_the_second_volume_on() -> None:
    memory = FeatureMemory(budget=9 * TILE_BYTES)
    memory.weights_loaded(1)  # nnU-Net loads the first fold once more than it predicts
    for volume, kept in (("a", 1), ("b", 0), ("c", 0)):
        memory.weights_loaded(1)
        assert memory.is_open == (kept > 0)
        look_up(memory, volume)
        assert len(memory) == kept
    memory.weights_loaded(2)  # an ensemble after all
    assert memory.is_open
    assert look_up(memory, "d", "d") == [False, True]


def test_no_key_is_made_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(frame, "content_key", lambda *given: made.append(given) or content_key(*given))
    network, tile = make(prompter=BOX), torch.randn(1, 1, 64, 64)
    with torch.inference_mode():
        expected = network(tile)
        assert len(made) == 1
        network.memory.clear()
        network.memory.budget = 0
        assert torch.equal(network(tile), expected)
        for _ in range(3):  # volumes, of one fold: the second is known to need nothing
            network.memory.budget = None
            network.load_state_dict(network.state_dict())
            network(tile)
    assert len(made) == 2


def test_a_device_that_runs_out_of_memory_is_given_back_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make(prompter=BOX)
    tiles = torch.randn(2, 1, 1, 64, 64)
    encode = network.encode

    def scarce(tile: Tensor) -> Features:
        if len(network.memory):
            raise torch.OutOfMemoryError("no room")
        return encode(tile)

    with torch.inference_mode():
        expected = [network(tile) for tile in tiles]
        network.memory.clear()
        monkeypatch.setattr(network, "encode", scarce)
        for tile, logits in zip(tiles, expected, strict=True):
            assert torch.equal(network(tile), logits)
        assert len(network.memory) == 0
        monkeypatch.setattr(network, "encode", lambda tile: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
        with pytest.raises(torch.OutOfMemoryError, match="none"):
            network(tiles[0])


def test_budget_is_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("desam_nnunet.encoders.memory.free_memory", lambda device: 4 * 3 * TILE_BYTES)
    memory = FeatureMemory()
    look_up(memory, *"abcde")
    assert len(memory) == 3


def test_keys_tell_values_shapes_types_and_settings_apart() -> None:
    tile = torch.zeros(1, 1, 4, 6)
    changed = tile.clone()
    changed[0, 0, 3, 5] = 1e-30
    keys = {content_key(x, setting) for x in (tile, changed, tile.view(1, 1, 6, 4), tile.double())
            for setting in ("percentile", "unit")}
    assert len(keys) == 8
    assert content_key(tile.clone(), "unit") in keys


class Counted:
    """Counts the tiles that a network's encoder sees."""

    def __init__(self, network: DeSAM) -> None:
        self.tiles = 0
        network.encoder.register_forward_hook(self)

    def __call__(self, _module: Any, inputs: tuple[Tensor], _output: Any) -> None:
        self.tiles += len(inputs[0])


def predictor_of(network: DeSAM, folds: int) -> nnUNetPredictor:
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.network, predictor.allowed_mirroring_axes = network, (0,)
    predictor.configuration_manager = type("Configuration", (), {"patch_size": [64, 64]})()
    predictor.label_manager = LabelManager({"background": 0, "organ": 1}, None)
    predictor.list_of_parameters = []
    for fold in range(folds):
        torch.manual_seed(fold)
        weights = {key: value + 0.02 * torch.randn_like(value) for key, value in network.state_dict().items()}
        predictor.list_of_parameters.append(weights)
    return predictor


@pytest.mark.parametrize("prompter", [BOX, GridPrompter(2, -1e9)])
def test_an_ensemble_of_five_encodes_each_tile_once(prompter: Prompter) -> None:
    network = make(prompter=prompter)
    counted = Counted(network)
    predictor = predictor_of(network, folds=5)
    tiles = 2 * 3 * 2  # slices, places, mirrors
    volumes = [torch.randn(1, 2, 64, 128) for _ in range(2)]
    predicted = []
    for number, volume in enumerate(volumes, start=1):
        predicted.append(predictor.predict_logits_from_preprocessed_data(volume))
        assert counted.tiles == number * tiles
        assert len(network.memory) == tiles
    network.memory.budget = 0
    for volume, logits in zip(volumes, predicted, strict=True):
        assert torch.equal(predictor.predict_logits_from_preprocessed_data(volume), logits)
    assert counted.tiles == 2 * tiles + 2 * 5 * tiles


def test_nothing_is_kept_in_training_or_with_gradients() -> None:
    network = make(prompter=BOX)
    tile = torch.randn(1, 1, 64, 64)
    network(tile)  # with gradients
    network.train()
    with torch.no_grad():
        network(tile)
        network.encode(tile)
    assert len(network.memory) == 0


@torch.no_grad()
def test_training_and_moving_forget_but_staying_does_not() -> None:
    network = make(prompter=BOX)
    tile = torch.randn(1, 1, 64, 64)
    network(tile)
    assert len(network.to(torch.device("cpu")).memory) == 1
    assert len(network.eval().memory) == 1
    assert len(network.train().memory) == 0
    network.eval()(tile)
    assert len(network.to(torch.float64).memory) == 0


def test_machine_memory_is_plausible() -> None:
    assert 2**28 < free_memory(torch.device("cpu")) <= memory_limit() < 2**48


@pytest.mark.parametrize(("line", "files"), [
    ("0::/slurm/job_7/step_0", {"slurm/job_7/memory.max": "4096", "slurm/job_7/step_0/memory.max": "max",
                                "slurm/job_7/memory.current": "1000",
                                "slurm/job_7/memory.stat": "anon 300\ninactive_file 600"}),
    ("5:cpu,cpuacct:/x", {}),
    ("7:memory:/job", {"memory/job/memory.limit_in_bytes": "4096", "memory/job/memory.usage_in_bytes": "400",
                       "memory/memory.limit_in_bytes": str(2**63 - 4096)}),
    ("7:memory:/docker/abc", {"memory/memory.limit_in_bytes": "4096", "memory/memory.usage_in_bytes": "400"}),
])
def test_limits_of_control_groups_count(tmp_path: Path, line: str, files: dict[str, str]) -> None:
    (tmp_path / "cgroup").write_text(f"11:cpuset:/\n{line}\n")
    for name, text in files.items():
        file = tmp_path / "fs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    assert list(_groups(tmp_path / "cgroup", tmp_path / "fs")) == ([(4096, 400)] if files else [])
