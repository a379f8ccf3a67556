"""The sites of a study: which images and references each has, checked before any work begins."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from desam_nnunet.nnunet.names import FOLDERS
from desam_nnunet.nnunet.volumes import check_volumes
from desam_nnunet.system.files import read_object, replace_file
from desam_nnunet.system.progress import progress

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")
LABEL_WORDS = ("_segmentation", "_seg", "_label", "_mask")
_DESCRIBED = ("channel_names", "labels", "file_ending")  # in dataset.json
ALL = "all"  # what stands for every site together, and so is no site's name
_SITE = re.compile(r"[A-Za-z0-9_-]+")
_CASE = re.compile(r"[^/\\:*?\"<>|\x00-\x1f]+")
_LONGEST = 200  # bytes of a name
_COLUMNS = {"case", "site", "image", "label"}


class Case(NamedTuple):
    """A volume with its reference."""

    name: str
    images: tuple[Path, ...]  # a file per channel
    label: Path


Sites = dict[str, list[Case]]


def read_sites(data: Path) -> Sites:
    """From a folder with a folder per site, or a manifest.

    A site's folder holds ``imagesTr`` and ``labelsTr`` (or ``images`` and ``labels``) as in nnU-Net's raw data sets, or
    all volumes side by side, where a reference has the name of its image and ``_segmentation``, ``_seg``, ``_label`` or
    ``_mask``. A manifest is CSV with the columns ``case``, ``site``, ``image`` and ``label``, the files of several
    channels separated by semicolons, or JSON with a list of such rows; paths are relative to it.

    Raises:
        FileNotFoundError: There is no such folder or file, or no cases in it.
        ValueError: A manifest that is not as above, or a case that occurs twice at a site.
    """
    if data.is_dir():
        sites = {folder.name: _cases_in(folder) for folder in sorted(data.iterdir())
                 if folder.is_dir() and not folder.name.startswith(".")}
    elif data.is_file():
        sites = _from_manifest(data)
    else:
        raise FileNotFoundError(f"{data} does not exist: give a folder with a folder per site, or a manifest.")
    if not sites:
        raise FileNotFoundError(f"{data} holds no folders: give one that has a folder for each site.")
    return {name: sorted(cases) for name, cases in sorted(sites.items())}


def check_sites(sites: Sites) -> dict[str, list[int]]:
    """Looks into every file, with progress.

    Returns:
        Per site the values that occur in its references, without 0.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A name that can't be a file's, a file or an image that occurs twice, cases with different numbers of
            channels or file endings, or volumes as :func:`~desam_nnunet.nnunet.volumes.check_volumes` refuses them.
    """
    _check_names("The sites", "", sites)
    for site, cases in sites.items():
        if not _SITE.fullmatch(site) or site == ALL:
            raise ValueError(f"The site's name {site!r} is '{ALL}' or has characters other than letters, digits, - and "
                             "_: rename it.")
        for case in cases:
            if not _CASE.fullmatch(case.name) or case.name.startswith("."):
                raise ValueError(f"Site {site} has a case called {case.name!r}, which can't be a file's name: rename "
                                 "it.")
        if long := [name for name in (site, *(case.name for case in cases)) if len(name.encode()) > _LONGEST]:
            raise ValueError(f"The name {long[0][:20]}... of site {site[:20]} has {len(long[0].encode())} bytes, but "
                             f"file systems hold {_LONGEST} and an ending: shorten it.")
        _check_names("The cases", f" of site {site}", [case.name for case in cases])
    every = [(site, case) for site, cases in sites.items() for case in cases]
    _check_apart(every)
    first = every[0][1]
    values: dict[str, set[int]] = {site: set() for site in sites}
    for site, case in progress(every, "Checking volumes", "cases"):
        if len(case.images) != len(first.images):
            raise ValueError(f"Case {case.name} of site {site} has {len(case.images)} channel(s), but {first.name} has "
                             f"{len(first.images)}: all cases need the same ones.")
        for path in (*case.images, case.label):
            if ending_of(path) != ending_of(first.label):
                raise ValueError(f"{path} is not {ending_of(first.label)} like {first.label}: nnU-Net needs one file "
                                 "format in all of a study, so convert it.")
        values[site] |= check_volumes(f"Case {case.name} of site {site}", case.images, case.label)
    _check_copies(every)
    return {site: sorted(occurring - {0}) for site, occurring in values.items()}


def _check_names(what: str, where: str, names: Iterable[str]) -> None:
    """Refuses names that are the same, or would be on a disk that takes no notice of capitals."""
    seen: dict[str, str] = {}
    for name in names:
        if (key := name.casefold()) in seen:
            raise ValueError(f"{what} {seen[key]} and {name}{where} need different names, in more than capitals: "
                             "rename one.")
        seen[key] = name


def _check_apart(every: list[tuple[str, Case]]) -> None:
    """No file may be of two cases: a model would be tested on what it was trained with."""
    seen: dict[Path, tuple[str, str]] = {}
    for site, case in every:
        for path in (*case.images, case.label):
            there, other = seen.setdefault(path.resolve(), (site, case.name))
            if (there, other) != (site, case.name):
                raise ValueError(f"{path} is a file of case {case.name} of site {site} and of case {other} of site "
                                 f"{there}: a volume may be in a study only once.")


def _check_copies(every: list[tuple[str, Case]]) -> None:
    """No more may a copy of a case's images, all of them: a channel of zeros may stand for one that is missing."""
    sizes = defaultdict(list)
    for site, case in every:
        sizes[tuple(image.stat().st_size for image in case.images)].append((site, case))
    for alike in sizes.values():
        seen: dict[tuple[bytes, ...], tuple[str, Case]] = {}
        for site, case in alike if len(alike) > 1 else ():
            there, other = seen.setdefault(tuple(map(_digest, case.images)), (site, case))
            if other is not case:
                raise ValueError(f"{case.images[0]} of case {case.name} of site {site} is a copy of {other.images[0]} "
                                 f"of case {other.name} of site {there}: a volume may be in a study only once.")


def _digest(path: Path) -> bytes:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def ending_of(path: Path) -> str:
    """Of the formats that a study can hold.

    Raises:
        ValueError: It is another format.
    """
    for ending in ENDINGS:
        if path.name.endswith(ending):
            return ending
    raise ValueError(f"{path} is none of the volume formats {', '.join(ENDINGS)}: convert it.")


def _cases_in(folder: Path) -> list[Case]:
    pairs = [(folder / f"images{ending}", folder / f"labels{ending}") for ending in ("Tr", "")]
    pair = next((pair for pair in pairs if all(path.is_dir() for path in pair)), None)
    cases = list(_in_two_folders(*pair) if pair else _side_by_side(folder))
    if not cases:
        raise FileNotFoundError(
            f"Site {folder} holds no case: it needs imagesTr and labelsTr as nnU-Net's raw data, or volumes beside "
            f"references called <image>{LABEL_WORDS[0]}.nii.gz.")
    return cases


def _in_two_folders(images: Path, labels: Path) -> Iterator[Case]:
    references = {_stem(path): path for path in _volumes(labels)}
    channels = defaultdict(list)
    for path in _volumes(images):
        stem = _stem(path)
        channels[stem if stem in references else re.sub(r"_\d{4}$", "", stem)].append(path)
    for name, label in references.items():
        if name not in channels:
            raise FileNotFoundError(f"{label} has no image {images / name}_0000{ending_of(label)}.")
        paths = channels.pop(name)
        numbers = [_stem(path).removeprefix(name) for path in paths]
        if numbers not in ([""], [f"_{number:04d}" for number in range(len(paths))]):
            raise ValueError(f"{images} has {', '.join(path.name for path in paths)} for the case {name}, but channels "
                             "count from _0000 on: rename them.")
        yield Case(name, tuple(paths), label)
    if channels:
        print(f"{images}: {len(channels)} image(s) without a reference are left out, such as {min(channels)}.")


def _side_by_side(folder: Path) -> Iterator[Case]:
    volumes = {_stem(path): path for path in _volumes(folder)}
    single = set(volumes)
    for stem, path in volumes.items():
        for word in LABEL_WORDS:
            name = stem[:-len(word)]
            if stem.lower().endswith(word) and name in volumes:
                yield Case(name, (volumes[name],), path)
                single -= {stem, name}
    if single:
        print(f"{folder}: {len(single)} volume(s) are left out, without a reference or without an image, such as "
              f"{min(single)}.")


def _volumes(folder: Path) -> list[Path]:
    return sorted(path.absolute() for path in folder.iterdir()
                  if path.name.endswith(ENDINGS) and not path.name.startswith("."))


def _stem(path: Path) -> str:
    return path.name.removesuffix(ending_of(path))


def _table(path: Path, text: str) -> list[dict[str, str]]:
    """The rows of CSV.

    Raises:
        ValueError: A column occurs twice, or a row has more fields than there are columns.
    """
    reader = csv.DictReader(io.StringIO(text))
    heads = reader.fieldnames or []
    if twice := next((name for name in heads if heads.count(name) > 1), None):
        raise ValueError(f"{path} has two columns called {twice!r}: remove one.")
    rows = list(reader)
    if long := next((number for number, row in enumerate(rows, 1) if None in row), 0):
        raise ValueError(f"{path} has more fields in row {long} than columns: put quotation marks around names with "
                         "commas.")
    return rows


def _from_manifest(path: Path) -> Sites:
    try:
        text = path.read_text(encoding="utf-8-sig")  # as Excel writes it, too
        rows = json.loads(text) if path.suffix == ".json" else _table(path, text)
    except (json.JSONDecodeError, UnicodeDecodeError, csv.Error, RecursionError) as error:
        raise ValueError(f"{path} can't be read as {path.suffix[1:] or 'a manifest'} in UTF-8: {error}.") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds {type(rows).__name__}, but must hold a list of rows.")
    sites = defaultdict(list)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) and row[key] for key in _COLUMNS):
            raise ValueError(f"Row {number} of {path} lacks one of {', '.join(sorted(_COLUMNS))}.")
        if odd := [key for key in _COLUMNS if not row[key].isprintable()]:
            raise ValueError(f"Row {number} of {path} has a {odd[0]} with characters that can't be printed: "
                             f"{row[odd[0]]!r}.")
        images = tuple((path.parent / image.strip()).absolute() for image in row["image"].split(";"))
        sites[row["site"]].append(Case(row["case"], images, (path.parent / row["label"]).absolute()))
    if not sites:
        raise ValueError(f"{path} has no rows: it needs the columns {', '.join(sorted(_COLUMNS))}.")
    return dict(sites)


def sites_of_datasets(datasets: Sequence[str]) -> tuple[Sites, dict[str, str]]:
    """Sites that are nnU-Net's data sets, ``SITE=DATASET``, and the full name of each.

    Raises:
        FileNotFoundError, ValueError: There is none of that name, or it is given wrongly.
    """
    for name in FOLDERS:
        if not os.environ.get(name):
            raise ValueError(f"-d needs nnU-Net's own folders: set {name}.")
    sites: Sites = {}
    names = {}
    for text in datasets:
        site, _, dataset = text.partition("=")
        if not site or not dataset or site in sites:
            raise ValueError(f"-d {text} is not SITE=DATASET with a name of its own, such as RUNMC=501.")
        from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
        from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

        try:
            names[site] = maybe_convert_to_dataset_name(int(dataset) if dataset.isdigit() else dataset)
        except RuntimeError as error:
            raise FileNotFoundError(f"-d {text}: nnU-Net has no data set {dataset}.") from error
        raw = Path(os.environ[FOLDERS[0]]).absolute() / names[site]  # links to its images lie elsewhere
        if not (raw / "dataset.json").is_file():
            raise FileNotFoundError(f"{raw / 'dataset.json'} does not exist: a study needs the raw images.")
        from desam_nnunet.nnunet.description import check_description

        check_description(read_object(raw / "dataset.json"), str(raw / "dataset.json"))
        files = get_filenames_of_train_images_and_targets(str(raw))
        sites[site] = sorted(Case(case, tuple(map(Path, row["images"])), Path(row["label"]))
                             for case, row in files.items())
    return sites, names


def common_description(raw: Path, datasets: dict[str, str]) -> dict[str, Any]:
    """``dataset.json`` of sites that are data sets in `raw`, without what may differ between them.

    Raises:
        ValueError: They differ in something else.
    """
    descriptions = {}
    for site, dataset in datasets.items():
        given = read_object(raw / dataset / "dataset.json")
        if "channel_names" not in given and "modality" in given:
            given["channel_names"] = given["modality"]  # its name in nnU-Net's first version
        descriptions[site] = {key: given[key] for key in (*_DESCRIBED, "regions_class_order") if key in given}
        if lacking := [key for key in _DESCRIBED if key not in given]:
            raise ValueError(f"The data set of {site}, {dataset}, has no {lacking[0]} in dataset.json: add it.")
    (first, description), *others = descriptions.items()
    for site, theirs in others:
        for key in ("labels", "file_ending", "regions_class_order"):
            if theirs.get(key) != description.get(key):
                raise ValueError(f"The data sets of {first} and {site} differ in {key} ({description.get(key)} and "
                                 f"{theirs.get(key)}): make them alike, or no model of one can be scored at the other.")
        here, there = (len(each["channel_names"]) for each in (description, theirs))
        if here != there:
            raise ValueError(f"The data sets of {first} and {site} have {here} and {there} channels, but need the "
                             "same.")
    return description


def write_dataset(folder: Path, description: dict[str, Any], cases: list[Case]) -> None:
    """Writes a raw data set: ``dataset.json`` with `description`, which names the cases' files where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {case.name: {"images": [str(path) for path in case.images], "label": str(case.label)} for case in cases}
    content = description | {"numTraining": len(files), "dataset": files}
    replace_file(folder / "dataset.json", [json.dumps(content, indent=4).encode()])


def link_images(folder: Path, cases: list[Case], ending: str) -> None:
    """Links the cases' images under nnU-Net's names, as nnUNetv2_predict wants them; copies where links can't be."""
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases:
        for channel, image in enumerate(case.images):
            link = folder / f"{case.name}_{channel:04d}{ending}"
            if link.exists():
                continue
            link.unlink(missing_ok=True)
            try:
                link.symlink_to(image)
            except OSError:
                replace_file(link, [image.read_bytes()])
