"""Stores of a real preprocessed data set, built by the command, by training and by several processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workspace, make_trainer, nnunet, tiny_sections
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from test_cache_store import RECIPE, unprivileged

from desam_nnunet.cache import build as building
from desam_nnunet.cache.build import Builder, Share
from desam_nnunet.cache.entry import read_entry, write_entry
from desam_nnunet.cache.manage import delete_stores, describe_stores, unreadable_stores, verify_stores
from desam_nnunet.cache.store import Store, _crc_of, open_stores
from desam_nnunet.cache.tiles import content_of, crop, tiles_of
from desam_nnunet.commands.__main__ import main
from desam_nnunet.encoders.base import Features, FeatureSpec, ImageSpec, Level
from desam_nnunet.encoders.precision import encoder_dtype
from desam_nnunet.training.dataset_cache import build_dataset, planned_for
from desam_nnunet.training.frozen import cached_loaders

CPU = torch.device("cpu")
PLANS = "CachedPlans"
SIZE = 112  # no other test has stores of it


@pytest.fixture(scope="module")
def root(workspace: Workspace) -> Path:
    return workspace.preprocessed


@pytest.fixture(scope="module")
def built(workspace: Workspace, root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path]:
    """All five cases, built by the command, and a copy of it for tests that begin after another has failed."""
    workspace.write_plans(PLANS, **tiny_sections(image_size=SIZE))
    result = nnunet("desam", "cache", "-d", 501, "-p", PLANS, "-device", "cpu")
    assert re.search(r"tiles of 5 case\(s\) to encode, about 0\.\d\d GB \(.* GB free\) and "
                     r"(\d+ s|(\d+ h )?\d+ min)\.", result.stdout)
    (store,) = (store for store in open_stores(root) if store.recipe.image_size == SIZE)
    copy = tmp_path_factory.mktemp("built") / store.folder.name
    shutil.copytree(store.folder, copy)
    return store, copy


@pytest.fixture
def store(built: tuple[Store, Path]) -> Store:
    """As it was built, whatever the tests before did to it."""
    store, copy = built
    shutil.rmtree(store.folder, ignore_errors=True)
    shutil.copytree(copy, store.folder)
    return store


@pytest.fixture
def trainer(workspace: Workspace, store: Store) -> Any:
    trainer = make_trainer("DeSAMTrainer", workspace, plans=workspace.plans(PLANS))
    trainer.initialize()
    return trainer


def in_float32(trainer: Any) -> Any:
    """Also where the CPU has bfloat16, whose products depend a little on the batch."""
    trainer.bare_network.encoder.dtype = torch.float32
    return trainer


def contents(store: Store) -> dict[str, bytes]:
    return {str(path.relative_to(store.folder)): path.read_bytes() for path in sorted(store.folder.rglob("*"))
            if path.is_file()}


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 100, 70), (1, 40, 200), (1, 30, 41)])
def test_tiles_are_those_of_the_predictor(shape: tuple[int, int, int]) -> None:
    volume = torch.randn(1, *shape)
    seen: list[torch.Tensor] = []
    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False, use_mirroring=False)
    predictor.network = torch.nn.Identity()
    predictor.network.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0][0].clone()))
    predictor.configuration_manager = type("Configuration", (), {"patch_size": [48, 64]})()
    predictor.label_manager = type("Labels", (), {"num_segmentation_heads": 1})()
    predictor.predict_sliding_window_return_logits(volume)
    ours = [torch.from_numpy(crop(volume.numpy(), tile, (48, 64), 0)) for tile in tiles_of(shape, (48, 64))]
    assert len(ours) == len(seen)
    for mine, theirs in zip(ours, seen, strict=True):
        assert torch.equal(mine, theirs)


def test_cached_features_are_those_online(store: Store, trainer: Any) -> None:
    dataset, _ = trainer.get_tr_and_val_datasets()
    case = dataset.identifiers[0]
    data, seg, *_ = dataset.load_case(case)
    content = content_of(Path(dataset.source_folder), case)
    record = store.complete(case, content)
    assert record is not None
    for number in (0, len(record.tiles) - 1):
        patch_size = trainer.configuration_manager.patch_size
        tile = torch.from_numpy(crop(data, record.tiles[number], patch_size, 0))[None]
        features, target = store.read(case, number, 0, content)
        online = trainer.bare_network.encode(tile)
        for cached, now in zip((*features.levels, features.neck), (*online.levels, online.neck), strict=True):
            assert (cached.float() - now[0]).norm() < 1e-3 * now.norm()
        np.testing.assert_array_equal(target, crop(seg, record.tiles[number], patch_size, -1)[0])


@pytest.mark.parametrize(("dtype", "tolerance", "of_gradient"), [("float16", 1e-3, 0.03), ("int8", 1e-2, 0.1)])
def test_a_training_step_from_cache_is_one_online(
    workspace: Workspace, trainer: Any, dtype: str, tolerance: float, of_gradient: float
) -> None:
    """The same tiles and the same draws. The gradient differs by more than the features, because rectifiers near zero
    switch: noise of 1e-5 in the features changes it by 3e-3, noise of 3e-4 by 1e-2."""
    sections = tiny_sections(image_size=SIZE, cache_dtype=dtype)
    workspace.write_plans("StepPlans", **sections)
    cached = make_trainer("DeSAMTrainer", workspace, plans=workspace.plans("StepPlans"))
    cached.initialize()
    in_float32(cached).network.load_state_dict(in_float32(trainer).network.state_dict())
    loader, _ = cached_loaders(cached)
    batch = loader.read(draws := loader.draw())
    dataset, _ = trainer.get_tr_and_val_datasets()
    windows = [crop(dataset.load_case(draw.case)[0], loader.records[draw.case].tiles[draw.number],
                    trainer.configuration_manager.patch_size, 0) for draw in draws]
    online = {"data": torch.from_numpy(np.stack(windows)).float(), "target": batch["target"], "keys": batch["keys"]}
    gradients = []
    for one, given in ((trainer, online), (cached, batch)):
        torch.manual_seed(5)
        one.network.eval()
        one.network.zero_grad()
        loss, _ = one.compute_loss(*one._on_device(given))
        loss.backward()
        gradients.append((loss.detach(), torch.cat([p.grad.flatten() for p in one.network.parameters()
                                                    if p.grad is not None])))
    (loss, gradient), (cached_loss, cached_gradient) = gradients
    assert abs(cached_loss - loss) < tolerance * abs(loss)
    assert (cached_gradient - gradient).norm() < of_gradient * gradient.norm()


def test_training_builds_what_is_missing_says_so_and_reuses_it(workspace: Workspace, store: Store) -> None:
    victim = store.entries(store.cases()[0])[0]
    before = victim.read_bytes()
    victim.unlink()
    log = nnunet("nnUNetv2_train", 501, "2d", 0, "-tr", "DeSAMTrainer", "-p", PLANS, "-device", "cpu").stdout
    assert "1 tiles of 1 case(s) to encode" in log
    assert "kept in memory" in log
    assert victim.read_bytes() == before
    model = workspace.model("DeSAMTrainer", PLANS)
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["inference_allowed_mirroring_axes"] is None  # views: 1 shows no mirrored tile


def test_loaders_of_all_cases_close_when_training_ends(workspace: Workspace, store: Store) -> None:
    trainer = make_trainer("DeSAMTrainer", workspace, plans=workspace.plans(PLANS), fold="all")
    trainer.on_train_start()
    loaders = trainer.dataloader_train, trainer.dataloader_val
    assert [len(loader.cases) for loader in loaders] == [5, 5]
    batch = next(loaders[0])
    assert batch["features"].neck.shape[0] == batch["target"].shape[0] == trainer.batch_size
    trainer.train_step(batch)
    trainer.on_train_end()
    assert not any(loader._kept for loader in loaders)


def test_nan_in_any_slice_names_case_and_slice(workspace: Workspace, store: Store, tmp_path: Path) -> None:
    class Dataset:
        identifiers = store.cases()[:1]
        source_folder = str(store.folder.parents[1] / store.recipe.data_identifier)

        @staticmethod
        def load_case(case: str) -> tuple[np.ndarray, np.ndarray]:
            data = np.zeros((1, 3, 96, 96), np.float32)
            data[0, 2, 5, 5] = np.nan
            return data, np.zeros((1, 3, 96, 96), np.int8)

    trainer = make_trainer("DeSAMTrainer", workspace, plans=workspace.plans(PLANS))
    trainer.initialize()
    case = store.cases()[0]
    builder = Builder(Store(tmp_path, store.recipe), Dataset(), trainer.bare_network, CPU)  # type: ignore[arg-type]
    plan = builder.plan(Share())
    with pytest.raises(ValueError, match=f"Case {case}, slice 2: The image holds NaN"):
        builder.build(plan)


class Overflowing:
    """A network whose encoder overflows on the second of three tiles; everything else is as training needs it."""

    num_channels = 1
    encoder = SimpleNamespace(spec=FeatureSpec((), Level(4, 16), ImageSpec(16)))

    def __init__(self, value: float) -> None:
        self.value = value

    def encode_in_parts(self, tiles: torch.Tensor) -> Features:
        neck = torch.zeros(len(tiles), 4, 4, 4)
        neck[tiles[:, 0, 0, 0] == 1, 2, 1, 1] = self.value
        return Features((), neck)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(("at_once", "stored"), [(1, ["00000_0.tile"]), (3, [])])
def test_features_that_are_not_finite_are_refused_and_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, at_once: int, stored: list[str]
) -> None:
    class Dataset:
        identifiers = ("case",)
        source_folder = tmp_path

        @staticmethod
        def load_case(case: str) -> tuple[np.ndarray, np.ndarray]:
            data = np.stack([np.full((64, 64), slice_, np.float32) for slice_ in range(3)])[None]
            return data, np.zeros((1, 3, 64, 64), np.int8)

    (tmp_path / "case.npz").write_bytes(b"preprocessed")
    store = Store(tmp_path, replace(RECIPE, patch_size=(64, 64), precision="float16"))
    monkeypatch.setattr(Builder, "at_once", at_once)
    builder = Builder(store, Dataset(), Overflowing(value), CPU)  # type: ignore[arg-type]
    plan = builder.plan(Share())
    assert plan.tiles == 3
    with pytest.raises(ValueError, match=r"Case case, slice 1: of tile 1, view 0, .* encoder vit_tiny, in float16, "
                                         "makes features that are not finite"):
        builder.build(plan)
    assert [path.name for path in store.entries("case")] == stored
    assert store.complete("case", plan.todo["case"].content) is None


def test_the_estimate_counts_every_step_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dataset:
        identifiers = ("case",)
        source_folder = tmp_path

        @staticmethod
        def load_case(case: str) -> tuple[np.ndarray, np.ndarray]:
            return np.full((1, 3, 64, 64), np.nan, np.float32), np.zeros((1, 3, 64, 64), np.int8)

    (tmp_path / "case.npz").write_bytes(b"preprocessed")
    store = Store(tmp_path, replace(RECIPE, patch_size=(64, 64)))
    builder = Builder(store, Dataset(), Overflowing(0.0), CPU)  # type: ignore[arg-type]
    steps: list[float] = []
    monkeypatch.setattr(Builder, "_pace", lambda self, *seconds: steps.extend(seconds) or 2.0)
    assert builder.seconds(builder.plan(Share())) == 6.0  # of three tiles
    assert len(steps) == 4
    assert all(step > 0 for step in steps)
    assert [path.name for path in tmp_path.iterdir()] == ["case.npz"]


@pytest.mark.parametrize(("device", "steps", "seconds"), [
    ("cpu", (0.02, 0.03, 0.04, 0.01), 0.06),  # the encoder has all cores, the rest share them
    ("cuda", (0.02, 0.03, 0.04, 0.01), 0.03),
    ("cuda", (0.05, 0.03, 0.01, 0.01), 0.05),  # one thread makes samples
    ("cuda", (0.01, 0.01, 0.01, 0.50), 0.50),  # the disk
])
def test_steps_go_side_by_side_as_far_as_two_cores_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, steps: tuple[float, ...], seconds: float
) -> None:
    monkeypatch.setattr(building, "usable_cores", lambda: 2)
    monkeypatch.setattr(building, "_WRITERS", 2)
    builder = Builder(Store(tmp_path, RECIPE), None, None, torch.device(device))  # type: ignore[arg-type]
    assert builder._pace(*steps) == pytest.approx(seconds)


def test_two_processes_and_two_parts_give_the_same_store(workspace: Workspace, store: Store) -> None:
    expected = contents(store)
    delete_stores("501", store.folder.name)
    desam = Path(sys.executable).with_name("desam")
    command = [str(desam), "cache", "-d", "501", "-p", PLANS, "-device", "cpu"]
    parts = [["-num_parts", "2", "-part_id", "0"], ["-num_parts", "2", "-part_id", "1"], []]
    processes = [subprocess.Popen([*command, *part], stdout=subprocess.PIPE, stderr=subprocess.PIPE) for part in parts]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()[-2000:]
    assert contents(store) == expected


def test_under_torchrun_each_process_builds_its_share(
    workspace: Workspace, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.write_plans("TorchrunPlans", **tiny_sections(image_size=64))
    monkeypatch.setenv("WORLD_SIZE", "2")  # alone, as some clusters set it, it means nothing
    monkeypatch.setenv("LOCAL_RANK", "0")
    built = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        built.append(build_dataset("501", "TorchrunPlans", "2d", "DeSAMTrainer", CPU, 1, 0).cases())
    assert built == [store.cases()[::2], store.cases()]


def test_damage_is_found_removed_and_only_that_is_built_again(store: Store) -> None:
    before = contents(store)
    first, second = (store.entries(case)[0] for case in store.cases()[:2])
    first.write_bytes(first.read_bytes()[:-3] + b"xyz")
    os.truncate(second, 100)
    findings = verify_stores("501")
    assert sum("Removed" in finding for finding in findings) == 2
    encoded = Counter[str]()
    with pytest.MonkeyPatch.context() as patch:
        write = Store.write
        patch.setattr(Store, "write", lambda self, case, *rest: encoded.update([case]) or write(self, case, *rest))
        build_dataset("501", PLANS, "2d", "DeSAMTrainer", CPU, 1, 0)
    assert encoded == dict.fromkeys(store.cases()[:2], 1)
    assert contents(store) == before


def swapped(one: Path, other: Path) -> None:
    ours, theirs = one.read_bytes(), other.read_bytes()
    one.write_bytes(theirs)
    other.write_bytes(ours)


def make_stale(case: Path) -> None:
    """A tile of another version of the case, as large as the one that was here."""
    path = sorted(case.glob("*.tile"))[0]
    size = path.stat().st_size
    arrays, meta = read_entry(path)
    write_entry(path, arrays, meta | {"content": meta["content"][::-1]})
    assert path.stat().st_size == size


SPOILT = {  # what happens to a store's first case, and what verify says of it
    "stale": (make_stale, "was made from another version of the case"),
    "two tiles swapped": (lambda case: swapped(*sorted(case.glob("*.tile"))[:2]), "in the wrong place: it is tile 1"),
    "a tile renamed": (lambda case: (case / "00000_0.tile").rename(case / "00000_7.tile"), "in the wrong place"),
    "a tile under no tile's name": (lambda case: (case / "00000_0.tile").rename(case / "x.tile"), "no name of a tile"),
    "another case's tile": (lambda case: shutil.copyfile(next(case.parent.glob("SiteA_003/*.tile")),
                                                         case / "00000_0.tile"), "of SiteA_003"),
    "a tile removed": (lambda case: (case / "00003_0.tile").unlink(), "1 of 16 tiles are missing"),
    "the record removed": (lambda case: (case / "case.json").unlink(), "case.json is missing, damaged"),
    "the record damaged": (lambda case: (case / "case.json").write_text('{"crc": 0, "record": {}}'), "case.json is"),
    "the record nested": (lambda case: (case / "case.json").write_text("[" * 10**6), "case.json is missing, damaged"),
    "the case removed": (lambda case: shutil.rmtree(case), "16 of 16 tiles are missing"),
    "a case too many": (lambda case: shutil.copytree(case, case.with_name("Other")), "Other is not in the prepro"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_verify_finds_what_training_would(store: Store, name: str) -> None:
    spoil, words = SPOILT[name]
    case = store.folder / "SiteA_000"
    sound = verify_stores("501")
    assert not [finding for finding in sound if "as they were written" not in finding]
    before = contents(store)
    spoil(case)
    findings = [finding for finding in verify_stores("501") if "as they were written" not in finding]
    assert any(words in finding for finding in findings), findings
    build_dataset("501", PLANS, "2d", "DeSAMTrainer", CPU, 1, 0)
    shutil.rmtree(store.folder / "Other", ignore_errors=True)
    assert contents(store) == before
    assert verify_stores("501") == sound


def test_entries_from_before_they_knew_their_place(store: Store) -> None:
    """They are read at their name, nothing is built again, and verify says how many they are."""
    path = store.entries("SiteA_000")[0]
    arrays, meta = read_entry(path)
    write_entry(path, arrays, {key: value for key, value in meta.items() if key != "place"})
    record = store.folder / "SiteA_000" / "case.json"
    given = json.loads(record.read_text())["record"]
    given["sizes"][path.name] = path.stat().st_size
    record.write_text(json.dumps({"crc": _crc_of(given), "record": given}))
    assert any("; of 1 the position is unknown" in finding for finding in verify_stores("501"))
    assert store.complete("SiteA_000", given["content"]) is not None
    assert store.read("SiteA_000", 0, 0, given["content"])[0].neck.any()


@pytest.mark.parametrize("name", ["00000_0.tile", "case.json"])
def test_a_folder_in_the_place_of_a_file_is_named(store: Store, name: str) -> None:
    path = store.folder / "SiteA_000" / name
    path.unlink()
    path.mkdir()
    if name.endswith("tile"):
        assert any(f"{path} can't be read (Is a directory): remove it" in line for line in verify_stores("501"))
    else:
        assert any(f"{path} is no file: remove it" in line for line in verify_stores("501"))
    with pytest.raises(OSError, match="can't be written: Is a directory"):
        build_dataset("501", PLANS, "2d", "DeSAMTrainer", CPU, 1, 0)


def test_a_case_whose_tiles_are_all_there_only_wants_its_record(store: Store) -> None:
    """As after a kill before the last case's record was written."""
    before = contents(store)
    (record,) = (store.folder / store.cases()[1]).glob("*.json")
    record.unlink()
    build_dataset("501", PLANS, "2d", "DeSAMTrainer", CPU, 1, 0)
    assert contents(store) == before


def test_a_changed_case_alone_is_built_again(store: Store, root: Path) -> None:
    folder = root / store.recipe.data_identifier
    case = store.cases()[2]
    image = folder / f"{case}.b2nd"
    original, before = image.read_bytes(), contents(store)
    other = (folder / f"{store.cases()[3]}.b2nd").read_bytes()
    try:
        image.write_bytes(other)
        build_dataset("501", PLANS, "2d", "DeSAMTrainer", CPU, 1, 0)
        changed = {name.split("/")[0] for name, content in contents(store).items() if before.get(name) != content}
        assert changed == {case}
    finally:
        image.write_bytes(original)
    build_dataset("501", PLANS, "2d", "DeSAMTrainer", CPU, 1, 0)
    assert contents(store) == before


def test_a_disk_that_is_too_small_is_refused_with_the_numbers(
    workspace: Workspace, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"total": 10**9, "free": 6 * 10**7})
    monkeypatch.setattr(building.shutil, "disk_usage", lambda path: usage)
    workspace.write_plans("BigPlans", **tiny_sections(image_size=1024))
    with pytest.raises(OSError, match=r"needs \d+\.\d GB for \d+ tiles, but .* has 0\.0 GB .*'int8' for half of it"):
        build_dataset("501", "BigPlans", "2d", "DeSAMTrainer", CPU, 1, 0)
    assert len(open_stores(store.folder.parents[1])) >= 1


def test_a_folder_that_can_not_be_written_is_one_sentence(
    workspace: Workspace, store: Store, trainer: Any, tmp_path: Path
) -> None:
    dataset, _ = trainer.get_tr_and_val_datasets()
    builder = Builder(Store(tmp_path, store.recipe), dataset, trainer.bare_network, CPU)
    plan = builder.plan(Share())
    tmp_path.chmod(0o555)
    message = r"can't be written: Permission denied\. What is stored stays valid\. Make room"
    with pytest.raises(OSError, match=message), unprivileged():
        builder.build(plan)
    tmp_path.chmod(0o755)


def test_a_store_in_another_precision_is_named(
    workspace: Workspace, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Store(store.folder.parents[1], replace(store.recipe, precision="float64"))
    other.create()
    store.entries(store.cases()[0])[0].unlink()
    build_dataset("501", PLANS, "2d", "DeSAMTrainer", CPU, 1, 0)
    delete_stores("501", other.folder.name)
    assert f"{other.folder.name} has these tiles in float64, but the encoder computes in" in capsys.readouterr().out


def test_the_disk_must_hold_the_shares_of_all(
    workspace: Workspace, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer("DeSAMTrainer", workspace, plans=workspace.plans(PLANS))
    trainer.initialize()
    dataset, _ = trainer.get_tr_and_val_datasets()
    builder = Builder(Store(tmp_path, store.recipe), dataset, trainer.bare_network, CPU)
    alone = builder.plan(Share())
    halves = [builder.plan(Share(part, 2)) for part in (0, 1)]
    assert sorted([*halves[0].todo, *halves[1].todo]) == sorted(alone.todo)
    assert halves[0].tiles + halves[1].tiles == alone.tiles
    assert halves[0].needed == halves[1].needed == alone.needed
    usage = type("Usage", (), {"total": 0, "free": alone.needed - 1})
    monkeypatch.setattr(building.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="The cache needs"):
        builder.plan(Share(0, 2))


def test_stores_are_listed_and_deleted_by_name(
    workspace: Workspace, store: Store, capsys: pytest.CaptureFixture[str],
) -> None:
    row = next(row for row in describe_stores("501") if row.store == store.folder.name)
    assert (row.cases, row.encoder, row.stored_as) == (
        "5", f"vit_tiny at {SIZE}", f"float16, computed in {str(encoder_dtype(CPU))[6:]}")
    foreign = store.folder.with_name("older")
    foreign.mkdir()
    assert any("older: damaged, or made by another version" in line for line in unreadable_stores("501"))
    main(["cache", "-d", "501", "--list"])
    heads, *rows = capsys.readouterr().out.splitlines()[1:]
    assert {line.index("vit_tiny") for line in rows} == {heads.index("encoder")}
    with pytest.raises(ValueError, match="no store 'nothing'"):
        delete_stores("501", "nothing")
    assert delete_stores("501", "older") == [foreign]
    assert store.folder.is_dir()


@pytest.mark.parametrize(("arguments", "message"), [
    (("-device", "cpu", "-num_parts", "2", "-part_id", "2"), "-part_id 2 of -num_parts 2 does not exist"),
    (("-device", "cpu", "-p", "NoPlans"), "NoPlans.json does not exist: make these plans with desam plan"),
    (("-device", "cpu", "-tr", "nnUNetTrainer"), "nnUNetTrainer trains no network on a foundation encoder"),
    (("-device", "mps"), "PyTorch finds no mps device here: add -device cpu"),
])
def test_bad_input_is_one_sentence(
    workspace: Workspace, store: Store, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert main(["cache", "-d", "501", "-p", PLANS, *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("key", "value"), [("plans_name", None), ("dataset_name", ""), ("data_identifier", 3),
                                            ("data_identifier", None)])
def test_plans_that_nnunet_never_writes_build_nothing(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], key: str, value: object
) -> None:
    workspace.write_plans("Odd", **tiny_sections())
    path = workspace.preprocessed / "Odd.json"
    content = json.loads(path.read_text())
    place = content["configurations"]["2d"] if key == "data_identifier" else content
    path.write_text(json.dumps(content | {key: value}) if place is content else json.dumps(
        content | {"configurations": {"2d": place | {key: value}}}))
    assert main(["cache", "-d", "501", "-p", "Odd", "-device", "cpu"]) == 1
    assert re.search(rf"key {key} of .* is .*, but must be", capsys.readouterr().err)
    path.unlink()


def test_a_data_set_without_cases_builds_nothing(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.write_plans("Empty", **tiny_sections())
    path = workspace.preprocessed / "Empty.json"
    content = json.loads(path.read_text())
    content["configurations"]["2d"]["data_identifier"] = "empty"
    path.write_text(json.dumps(content))
    folder = workspace.preprocessed / "empty"
    folder.mkdir()
    (folder / ".DS_Store").touch()
    assert main(["cache", "-d", "501", "-p", "Empty", "-device", "cpu"]) == 1
    assert "empty holds no preprocessed cases" in capsys.readouterr().err
    shutil.rmtree(folder)
    path.unlink()


def test_a_process_of_torchruns_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks for the device that is current gets it too."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name, value in {"WORLD_SIZE": "3", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="-part_id 3 of -num_parts 3"):  # before anything else is looked at
        build_dataset("501", PLANS, "2d", "DeSAMTrainer", torch.device("cuda"), 1, 0)
    assert chosen == [torch.device("cuda", 1)]


def test_the_plans_of_desam_plan_are_found(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / workspace.preprocessed.name
    folder.mkdir()
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    assert planned_for("SAMedTrainer", "501") == "nnUNetPlans"
    (folder / "SAMedPlansQuick.json").write_text("{}")
    assert planned_for("SAMedTrainer", "501") == "SAMedPlansQuick"
    (folder / "SAMedPlans.json").write_text("{}")
    assert planned_for("SAMedTrainer", "501") == "SAMedPlans"
    (folder / "PDMMPlans.json").write_text("{}")
    assert planned_for("PDMMTrainer", "501") == "PDMMPlans"
    with pytest.raises(ValueError, match="is planned as PDMMPlans, but not for DeSAMTrainer: .* -p PDMMPlans"):
        planned_for("DeSAMTrainer", "501")
