"""What a study accepts as data, and the sentence for each thing that it does not."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from desam_nnunet.commands import cross_site as command
from desam_nnunet.commands.__main__ import main
from desam_nnunet.cross_site.opening import open_study
from desam_nnunet.cross_site.study import FILE, Study, read_study
from desam_nnunet.evaluation.tables import no_formula
from desam_nnunet.nnunet.labels import labels_of
from desam_nnunet.nnunet.sites import check_sites, read_sites
from desam_nnunet.nnunet.volumes import check_volumes
from desam_nnunet.planning.facts import check_patch
from desam_nnunet.settings.shared import read_settings

SHAPE = (4, 10, 12)


def write(
    path: Path, array: np.ndarray, *, spacing: tuple[float, ...] = (1, 1, 3), origin: tuple[float, ...] = (0, 0, 0)
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    sitk.WriteImage(image, path)
    return path


def labelled(*values: int) -> np.ndarray:
    array = np.zeros(SHAPE, np.uint8)
    for value in values:
        array[1:3, value : value + 3, 2:6] = value
    return array


def side_by_side(folder: Path, cases: int, *values: int) -> None:
    random = np.random.default_rng(list(folder.name.encode()))  # no volume is a copy of another site's
    for number in range(cases):
        write(folder / f"case{number}.nii.gz", random.random(SHAPE, np.float32))
        write(folder / f"case{number}_segmentation.nii.gz", labelled(*values))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two sites of five and one case, volumes side by side."""
    side_by_side(tmp_path / "data" / "A", 5, 1)
    side_by_side(tmp_path / "data" / "B", 1, 1)
    return tmp_path / "data"


def opened(data: Path | None, out: Path, **changes: Any) -> Study:
    given: dict[str, Any] = {"trainers": ["DeSAMTrainer"], "sources": ["A"], "targets": [], "folds": ["0"], "plans": "",
                             "settings": None, "labels": [], "channels": [], "tolerance": 2.0}
    return open_study(data, changes.pop("datasets", []), out, **given | changes)


def test_volumes_side_by_side(data: Path, tmp_path: Path) -> None:
    study = opened(data, tmp_path / "out")
    assert {site: len(cases) for site, cases in study.sites.items()} == {"A": 5, "B": 1}
    assert study.sites["A"][0].label == data / "A" / "case0_segmentation.nii.gz"
    assert study.dataset_json == {"channel_names": {"0": "image"}, "labels": {"background": 0, "label 1": 1},
                                  "file_ending": ".nii.gz"}
    assert list(study.cells()) == [("A", "DeSAMTrainer", "A"), ("A", "DeSAMTrainer", "B")]


def test_nnunets_folders_with_two_channels(tmp_path: Path) -> None:
    for site in ("A", "B"):
        for channel in (0, 1):
            array = np.full(SHAPE, 0 if channel else ord(site), np.float32)  # the second is missing
            write(tmp_path / site / "imagesTr" / f"x_{channel:04d}.nrrd", array)
        write(tmp_path / site / "labelsTr" / "x.nrrd", labelled(1))
    sites = read_sites(tmp_path)
    assert [path.name for path in sites["B"][0].images] == ["x_0000.nrrd", "x_0001.nrrd"]
    assert check_sites(sites) == {"A": [1], "B": [1]}


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_a_manifest(data: Path, tmp_path: Path, ending: str) -> None:
    rows = [{"case": path.name.split("_")[0], "site": site, "image": f"data/{site}/{path.name.split('_')[0]}.nii.gz",
             "label": f"data/{site}/{path.name}"}
            for site in "AB" for path in sorted((data / site).glob("*_segmentation.nii.gz"))]
    manifest = tmp_path / f"manifest.{ending}"
    if ending == "json":
        manifest.write_text(json.dumps(rows))
    else:
        with manifest.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    assert read_sites(manifest) == read_sites(data)


def other_values(data: Path) -> None:
    write(data / "B" / "case0_segmentation.nii.gz", labelled(2))


def other_spacing(data: Path) -> None:
    write(data / "B" / "case0_segmentation.nii.gz", labelled(1), spacing=(1, 1, 4))


def other_place(data: Path) -> None:
    write(data / "B" / "case0_segmentation.nii.gz", labelled(1), origin=(0, 5, 0))


def other_size(data: Path) -> None:
    write(data / "B" / "case0_segmentation.nii.gz", labelled(1)[:3])


def other_format(data: Path) -> None:
    for name in ("case0", "case0_segmentation"):
        (data / "B" / f"{name}.nii.gz").unlink()
        write(data / "B" / f"{name}.mha", labelled(1))


def no_cases(data: Path) -> None:
    for path in (data / "B").iterdir():
        path.unlink()


def a_damaged_file(data: Path) -> None:
    (data / "B" / "case0.nii.gz").write_bytes(b"no image")


def fractions(data: Path) -> None:
    write(data / "B" / "case0_segmentation.nii.gz", labelled(1).astype(np.float32) / 2)


def a_strange_name(data: Path) -> None:
    (data / "B").rename(data / "B C")


def one_volume_twice(data: Path) -> None:
    (data / "B" / "case0.nii.gz").unlink()
    (data / "B" / "case0.nii.gz").symlink_to(data / "A" / "case0.nii.gz")


def one_reference_twice(data: Path) -> None:
    (data / "B" / "case0_segmentation.nii.gz").unlink()
    (data / "B" / "case0_segmentation.nii.gz").symlink_to(data / "A" / "case0_segmentation.nii.gz")


def a_copy(data: Path) -> None:
    for name in ("case0.nii.gz", "case0_segmentation.nii.gz"):
        shutil.copy(data / "A" / name, data / "B" / name)


def voxels_in_the_header(data: Path) -> None:
    path = data / "B" / "case0.nii.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[108:112] = struct.pack("<f", 0.0)  # vox_offset
    path.write_bytes(gzip.compress(bytes(content)))


def a_label_cut_off(data: Path) -> None:
    """ITK fills what is missing with zeros."""
    path = data / "B" / "case0_segmentation.nii.gz"
    write(path, np.random.default_rng(0).integers(0, 2, (60, 40, 40)).astype(np.int16))
    write(data / "B" / "case0.nii.gz", np.zeros((60, 40, 40), np.int16))
    path.write_bytes(path.read_bytes()[:3000])
    sitk.ReadImage(path)


def an_image_cut_off(data: Path) -> None:
    path = data / "B" / "case0.nii.gz"
    path.write_bytes(path.read_bytes()[:-20])


def an_image_with_too_few_voxels(data: Path) -> None:
    path = data / "B" / "case0.nii.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-8]))


def its_own_label(data: Path) -> None:
    path = data / "B" / "case0.nii.gz"
    path.unlink()
    path.symlink_to(data / "B" / "case0_segmentation.nii.gz")


def a_copy_of_the_label(data: Path) -> None:
    (data / "B" / "case0.nii.gz").write_bytes((data / "B" / "case0_segmentation.nii.gz").read_bytes())


def a_pipe(data: Path) -> None:
    (data / "B" / "case0.nii.gz").unlink()
    os.mkfifo(data / "B" / "case0.nii.gz")


def colours(data: Path) -> None:
    image = sitk.GetImageFromArray(np.zeros((4, 10, 12, 3), np.uint8), isVector=True)
    sitk.WriteImage(image, data / "B" / "case0.nii.gz")


def complex_numbers(data: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 10, 12), np.complex64)), data / "B" / "case0.nii.gz")


@pytest.mark.parametrize(("spoil", "message"), [
    (a_label_cut_off, r"case0_segmentation.nii.gz can't be read to its end: it is damaged or cut off"),
    (an_image_cut_off, r"case0.nii.gz can't be read to its end: it is damaged or cut off"),
    (an_image_with_too_few_voxels, r"case0.nii.gz is cut off: it ends before its last voxel"),
    (its_own_label, r"Case case0 of site B: .* is the image and its own reference"),
    (a_copy_of_the_label, r"Case case0 of site B: .* is the image and its own reference"),
    (a_pipe, r"Case case0 of site B: .*case0.nii.gz does not exist, or is no file"),
    (colours, r"case0.nii.gz has voxels of the type 'vector of 8-bit unsigned integer', but must have one number"),
    (complex_numbers, r"case0.nii.gz has voxels of the type 'complex of 32-bit float', but must have one number"),
    (other_values, r"references of A have the values \{1\}, those of B \{2\}: say which class has which .*--labels"),
    (other_spacing, r"Case case0 of site B: the image's spacing is \(1, 1, 3\), its reference's \(1, 1, 4\): resample"),
    (other_place, r"Case case0 of site B: the image's origin is \(0, 0, 0\), its reference's \(0, 5, 0\)"),
    (other_size, r"Case case0 of site B: the image's size is \(12, 10, 4\), its reference's \(12, 10, 3\)"),
    (other_format, r"case0.mha is not .nii.gz like .*nnU-Net needs one file format"),
    (no_cases, r"Site .*B holds no case: it needs imagesTr and labelsTr"),
    (a_damaged_file, r"case0.nii.gz can't be read as an image"),
    (fractions, r"Case case0 of site B: .* has values that are not whole numbers"),
    (a_strange_name, r"The site's name 'B C' is 'all' or has characters other than"),
    (one_volume_twice, r"is a file of case case0 of site B and of case case0 of site A: .* only once"),
    (one_reference_twice, r"is a file of case case0 of site B and of case case0 of site A: .* only once"),
    (a_copy, r"case0.nii.gz of case case0 of site B is a copy of .*case0.nii.gz of case case0 of site A: a volume"),
    (voxels_in_the_header, r"case0.nii.gz can't be read to its end"),
])
def test_bad_data_is_one_sentence(
    data: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(data)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        opened(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_an_image_of_whole_numbers_with_a_slope_is_whole(tmp_path: Path, ending: str) -> None:
    """ITK says that its voxels are float, as they are once they are read; a scanner's CT is int16 with a slope."""
    image, label = tmp_path / f"ct{ending}", tmp_path / "label.nii.gz"
    write(tmp_path / "plain.nii", np.zeros((4, 10, 12), np.int16))
    write(label, labelled(1))
    content = bytearray((tmp_path / "plain.nii").read_bytes())
    content[112:120] = struct.pack("<2f", 0.5, -1024)  # scl_slope and scl_inter
    for cut in (0, 1):
        whole = bytes(content[: len(content) - cut])
        image.write_bytes(gzip.compress(whole) if ending.endswith(".gz") else whole)
        if not cut:
            assert check_volumes("x", [image], label) == {0, 1}
    with pytest.raises(ValueError, match="is cut off: it ends before its last voxel"):
        check_volumes("x", [image], label)


def test_what_is_left_out_is_said(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A reference may have its word in capitals; one with another word is none."""
    reference = data / "A" / "case0_segmentation.nii.gz"
    reference.rename(data / "A" / "case0_Segmentation.nii.gz")
    number = len(read_sites(data)["A"])
    assert capsys.readouterr().out == ""
    (data / "A" / "case0_Segmentation.nii.gz").rename(data / "A" / "case0-contour.nii.gz")
    assert len(read_sites(data)["A"]) == number - 1
    assert "A: 2 volume(s) are left out, without a reference or without an image, such as case0." in (
        capsys.readouterr().out)


def test_names_that_end_in_four_digits(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path / "A" / "images" / f"patient_{number:04d}.nii.gz", labelled(1))
        write(tmp_path / "A" / "labels" / f"patient_{number:04d}.nii.gz", labelled(1))
    cases = read_sites(tmp_path)["A"]
    assert [(case.name, [path.name for path in case.images]) for case in cases] == [
        ("patient_0001", ["patient_0001.nii.gz"]), ("patient_0002", ["patient_0002.nii.gz"])]
    write(tmp_path / "B" / "imagesTr" / "x_0000.nii.gz", labelled(1))
    write(tmp_path / "B" / "imagesTr" / "x_0002.nii.gz", labelled(1))
    write(tmp_path / "B" / "labelsTr" / "x.nii.gz", labelled(1))
    with pytest.raises(ValueError, match=r"has x_0000.nii.gz, x_0002.nii.gz for the case x, but channels count from"):
        read_sites(tmp_path)


@pytest.mark.parametrize(("changes", "message"), [
    ({"sources": ["C"]}, r"--sources C is not among the sites A, B"),
    ({"sources": ["B"]}, r"Site B has 1 case\(s\), but nnU-Net's 5 folds need 5: add -f all"),
    ({"targets": ["A"]}, "There is no other site to segment"),
    ({"folds": ["7"]}, "-f 7 is no fold: give some of 0 to 4, or all"),
    ({"folds": ["0", "all"]}, "-f all trains on all cases and can't be mixed"),
    ({"tolerance": 0}, "--tolerance is 0, but must be a distance"),
    ({"tolerance": float("nan")}, "--tolerance is nan, but must be a distance"),
    ({"labels": ["organ=2"]}, "The labels are organ=2, but nnU-Net needs consecutive values from 1 to 1"),
    ({"labels": ["organ"]}, "--labels organ is not NAME=VALUE"),
    ({"labels": ["organ=1", "tumour=3"]}, "nnU-Net needs consecutive values from 1 to 2"),
    ({"channels": ["T2", "ADC"]}, r"--channels names 2 channel\(s\), but case0 has 1 image file"),
    ({"plans": "MyPlans"}, "There are no plans 'MyPlans' of data sets that are yet to be made"),
    ({"datasets": ["A=1"]}, "Give the sites' data: a folder or manifest, or"),
])
def test_bad_wishes_are_one_sentence(data: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(data, tmp_path / "out", **changes)


def test_a_patch_that_nnunets_network_can_not_halve_is_refused_before_training() -> None:
    strides = {"arch_kwargs": {"strides": [[1, 1], [2, 2], [2, 2], [2, 2], [2, 2], [2, 1]]}}
    check_patch({"architecture": strides, "patch_size": [64, 48]}, "nnUNetTrainer")  # multiples of 32 and 16
    with pytest.raises(ValueError, match=r"\[48, 48\], but nnUNetTrainer's network needs multiples of \[32, 16\]"):
        check_patch({"architecture": strides, "patch_size": [48, 48]}, "nnUNetTrainer")


def test_settings_are_checked(data: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    for text, message in (
        ("{", "can't be read as JSON"), ("[]", "must hold an object"), ('{"batchsize": 2}', "has the key 'batchsize'"),
        ('{"sam": {"grid": 3}}', "The plans' section 'sam' has an unknown key 'grid'"),
        ('{"sam": "vit_b"}', "The plans' section 'sam' is 'vit_b', but must be an object"),
        ('{"sam": {"encoder": "vit_tiny"}}', "must give batch_size"), ('{"batch_size": true}', "must give batch_size"),
        ('{"batch_size": 2, "patch_size": 256}', "has the patch_size 256, but it must be two numbers"),
        ('{"batch_size": 2, "patch_size": [64, 0]}', r"has the patch_size \[64, 0\], but it must be two numbers"),
        ('{"batch_size": 2, "sam": {"encoder": "vit_tiny", "image_size": 100}}', "sam.image_size is 100, but must be"),
    ):
        settings.write_text(text)
        with pytest.raises(ValueError, match=message):
            opened(data, tmp_path / "out", settings=settings)


def test_a_weights_file_is_found_by_jobs_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.pth").touch()
    Path("settings.json").write_text('{"batch_size": 2, "sam": {"encoder": "mine.pth"}}')
    assert read_settings(Path("settings.json"), [])["sam"]["encoder"] == str(tmp_path / "mine.pth")
    Path("settings.json").write_text('{"batch_size": 2, "sam": {"encoder": "vit_b"}}')
    assert read_settings(Path("settings.json"), [])["sam"]["encoder"] == "vit_b"


def test_weights_that_are_not_here_are_missed_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DESAM_WEIGHTS", str(tmp_path / "weights"))
    settings = tmp_path / "settings.json"
    settings.write_text('{"batch_size": 2, "sam": {"encoder": "vit_h"}}')
    with pytest.raises(FileNotFoundError, match="vit_h"):
        opened(data, tmp_path / "out", settings=settings)
    assert opened(data, tmp_path / "out", settings=settings, trainers=["nnUNetTrainer"]).settings


@pytest.mark.parametrize("name", ["../other", "a/b", ".hidden"])
def test_a_case_can_not_lie_elsewhere(data: Path, tmp_path: Path, name: str) -> None:
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(f"case,site,image,label\n{name},B,data/B/case0.nii.gz,data/B/case0_segmentation.nii.gz\n")
    with pytest.raises(ValueError, match="which can't be a file's name"):
        check_sites(read_sites(manifest))


@pytest.mark.parametrize(("text", "message"), [
    ("case,site,image,label,image\na,B,x,y,z\n", "has two columns called 'image': remove one"),
    ("case,site,image,label\na,B,x,y,z\n", "has more fields in row 1 than columns"),
])
def test_a_table_that_means_two_things_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_sites(tmp_path / "manifest.csv")


def test_a_manifest_as_excel_writes_it(data: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.csv"
    text = "case,site,image,label\r\ncase0,B,data/B/case0.nii.gz,data/B/case0_segmentation.nii.gz\r\n"
    manifest.write_text(text, encoding="utf-8-sig", newline="")
    assert [case.name for case in read_sites(manifest)["B"]] == ["case0"]


def test_links_keep_the_names_that_they_have(data: Path, tmp_path: Path) -> None:
    for path in (data / "A").iterdir():
        hidden = tmp_path / "store" / f"{abs(hash(path.name))}.nii.gz"
        hidden.parent.mkdir(exist_ok=True)
        path.rename(hidden)
        path.symlink_to(hidden)
    assert [case.name for case in read_sites(data)["A"]] == [f"case{number}" for number in range(5)]


@pytest.mark.parametrize("content", [
    b"null", b"3", b"NaN", b'"text"', b"{}", b"[null]", b"[3]", b"[[]]", b'[{"case": NaN}]', b'[{"case": null}]', b"[",
    b"[" * 10**5, "[]".encode("utf-16"), "[\"\u00e9\"]".encode("latin-1"), b"", b"\xff\xfe\x00",
])
def test_json_that_is_no_manifest_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest.json (can't be read as json in UTF-8|holds \w+, but|lacks|has no)"):
        read_sites(manifest)


@pytest.mark.parametrize("site", ["B", "B" * 201])
def test_names_that_no_file_system_holds(data: Path, tmp_path: Path, site: str) -> None:
    manifest = tmp_path / "manifest.csv"
    name = "x" * 201 if site == "B" else "x"
    manifest.write_text(f"case,site,image,label\n{name},{site},data/B/case0.nii.gz,data/B/case0_segmentation.nii.gz\n")
    with pytest.raises(ValueError, match="has 201 bytes, but file systems hold 200"):
        check_sites(read_sites(manifest))


@pytest.mark.parametrize(("rows", "message"), [
    ("case,site,image\nx,A,x.nii.gz\n", "Row 1 of .* lacks one of case, image, label, site"),
    ("case,site,image,label\n", "has no rows"),
])
def test_a_bad_manifest_is_one_sentence(tmp_path: Path, rows: str, message: str) -> None:
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(rows)
    with pytest.raises(ValueError, match=message):
        read_sites(manifest)


def test_a_case_twice_and_a_missing_file(data: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.csv"
    row = "case0,B,data/B/case0.nii.gz,data/B/case0_segmentation.nii.gz\n"
    manifest.write_text("case,site,image,label\n" + 2 * row)
    with pytest.raises(ValueError, match="The cases case0 and case0 of site B need different names"):
        check_sites(read_sites(manifest))
    manifest.write_text("case,site,image,label\n" + row + row.replace(",B,", ",b,"))
    with pytest.raises(ValueError, match="The sites B and b need different names, in more than capitals"):
        check_sites(read_sites(manifest))
    manifest.write_text("case,site,image,label\n" + row.replace("B/case0.nii", "B/case9.nii"))
    with pytest.raises(FileNotFoundError, match="Case case0 of site B: .*case9.nii.gz does not exist"):
        check_sites(read_sites(manifest))


def test_an_organ_missing_in_a_case_is_no_error(data: Path, tmp_path: Path) -> None:
    write(data / "A" / "case1_segmentation.nii.gz", labelled())
    assert opened(data, tmp_path / "out").dataset_json["labels"] == {"background": 0, "label 1": 1}
    with pytest.raises(ValueError, match="The references of A have the value 2, which --labels does not name"):
        labels_of({"A": [1, 2], "B": [1]}, ["organ=1"])
    assert labels_of({"A": [1, 2], "B": [1]}, ["organ=1", "lesion=2"]) == {"background": 0, "organ": 1, "lesion": 2}


def test_a_study_goes_on_with_its_own_settings_alone(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    opened(data, out).write(out / FILE)
    assert read_study(out / FILE, out) == opened(data, out)
    grown = opened(data, out, trainers=["nnUNetTrainer"])
    assert list(grown.trainers) == ["DeSAMTrainer", "nnUNetTrainer"]
    with pytest.raises(ValueError, match=r"holds a study with other tolerance \(2.0, now 3.0\)"):
        opened(data, out, tolerance=3.0)
    content = (out / "study.json").read_text()
    nothing = [json.dumps(json.loads(content) | {key: None}) for key in ("sites", "trainers", "folds")]
    for damaged in (content[:100], "{}", "[]", *nothing):
        (out / "study.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"study.json is damaged or of another version: give another folder"):
            opened(data, out)
    earlier = {key: value for key, value in json.loads(content).items() if key != "version"}
    (out / "study.json").write_text(json.dumps(earlier | {"trainers": ["DeSAMTrainer"]}))
    with pytest.raises(FileExistsError, match=r"holds a study of an earlier version, .* begin it again in another"):
        opened(data, out)
    (out / "study.json").write_text(content)
    assert opened(data, tmp_path / "folds", folds=["3", "0", "3"]).folds == ("0", "3")
    side_by_side(data / "B", 2, 1)
    os.utime(data / "B" / "case0.nii.gz", (0, 0))
    with pytest.raises(ValueError, match="other data: case case0 of site B has changed since. Give another folder"):
        opened(data, out)
    (data / "A" / "case0_segmentation.nii.gz").unlink()
    with pytest.raises(ValueError, match="other data: case case0 of site A is gone"):
        opened(data, out, folds=["all"])


def test_a_package_that_is_too_old_is_named_before_anything_runs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for name, least in command.EXTRA.items():
        assert f'"{name}{">=" if least else ""}{".".join(map(str, least))}' in wanted
    real = command.version
    monkeypatch.setattr(command, "version", lambda name: "1.14.1" if name == "scipy" else real(name))
    assert main(["cross-site", str(data), "-o", str(tmp_path / "out"), "--dry-run", "-device", "cpu"]) == 1
    assert "desam cross-site needs scipy, perhaps newer than installed: pip install" in capsys.readouterr().err


def test_a_folder_of_other_things_is_left_alone(data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="holds other things than a study"):
        opened(data, tmp_path / "out")


@pytest.mark.parametrize(("arguments", "message"), [
    (("-tr", "NoTrainer"), "-tr NoTrainer: nnU-Net finds no trainer of that name"),
    (("-tr", "DBSAMTrainerBoxes"), "-tr DBSAMTrainerBoxes needs boxes from the reference"),
    (("--sources", "A", "--targets", "X"), "--targets X is not among the sites A, B"),
])
def test_the_command_says_it_in_one_sentence(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    words = ["cross-site", str(data), "-o", str(tmp_path / "out"), "-device", "cpu", "--sources", "A", *arguments]
    assert main(words) == 1
    assert message in capsys.readouterr().err


def test_a_dry_run_says_everything_and_does_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 3 sources, 3 targets and 3 trainers."""
    for site in "BC":
        side_by_side(data / site, 5, 1)
    out = tmp_path / "out"
    assert main(["cross-site", str(data), "-o", str(out), "-device", "cpu", "-tr", "DeSAMTrainer", "SAMedTrainer",
                 "nnUNetTrainer", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert not out.exists()
    assert f"nnUNet_raw={out / 'nnUNet_raw'}" in said
    assert "[to do] plan A DeSAMPlans    desam plan -d 1 --trainer DeSAMTrainer -device cpu\n" in said
    assert "[to do] encode B desam    desam cache -d 2 -p DeSAMPlans -tr DeSAMTrainer" in said
    assert "[to do] train A DeSAMTrainer 0    nnUNetv2_train 1 2d 0 -tr DeSAMTrainer -p DeSAMPlans" in said
    assert "[to do] train A nnUNetTrainer 0    nnUNetv2_train 1 2d 0 -tr nnUNetTrainer -p nnUNetPlans" in said
    assert "[to do] predict A nnUNetTrainer B    nnUNetv2_predict -i" in said
    jobs = [line.split()[2] for line in said.splitlines() if line.startswith("[to do] ")]
    assert {rule: jobs.count(rule) for rule in dict.fromkeys(sorted(jobs))} == {
        "encode": 3, "picture": 27, "plan": 6, "predict": 18, "prepare": 3, "report": 1, "score": 27, "train": 9}


def test_what_snakemake_does_not_know_is_said(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["cross-site", str(data), "-o", str(tmp_path / "out"), "-device", "cpu", "--sources", "A", "--dry-run"]
    assert main([*words, "--snakemake", "--jbos", "3"]) == 1
    assert "unrecognized arguments: --jbos" in capsys.readouterr().err
    assert main([*words, "--executor", "slrum"]) == 1
    assert "slrum" in capsys.readouterr().err
    assert main([*words, "--profile", str(tmp_path / "slrum")]) == 1
    assert re.search("profile.*slrum.*not|not.*profile.*slrum", capsys.readouterr().err, re.I | re.S)
    assert main([*words, "--cores", "0"]) == 1
    assert "--cores is 0, but must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(("cell", "written"), [
    ("=cmd()", "'=cmd()"), ("+1", "'+1"), ("-x", "'-x"), ("@x", "'@x"), ("case=1", "case=1"), (-1.5, -1.5), ("", ""),
])
def test_no_name_becomes_a_formula(cell: object, written: object) -> None:
    assert no_formula(cell) == written
