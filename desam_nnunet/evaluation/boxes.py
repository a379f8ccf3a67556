"""``desam boxes``: the evaluation of the DB-SAM paper, with boxes from the reference segmentation.

Source: Qin et al., DB-SAM, MICCAI 2024, section 3.1. It asks how well a model outlines what it is shown, and says
nothing about finding it: figures with boxes from the reference are not comparable with those of nnUNetv2_predict.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd, insert_crop_into_image
from nnunetv2.configuration import default_num_processes
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder
from torch import Tensor

from desam_nnunet.networks.dbsam.network import DBSAM
from desam_nnunet.networks.frame import ABSENT_LOGIT
from desam_nnunet.nnunet.datasets import foreground_of
from desam_nnunet.nnunet.model_folder import build_network, read_checkpoint, read_description
from desam_nnunet.sam.prompts import sample_boxes
from desam_nnunet.system.files import replace_file
from desam_nnunet.system.progress import progress

TRAINER = "DBSAMTrainerBoxes"
_Files = dict[str, tuple[list[str], str]]  # of every case: one for each channel, and the reference
NOTE = ("Each class of each slice was segmented from a box around it in the REFERENCE segmentation, moved at random by "
        "up to 2 % of the input. These figures are not comparable with automatic segmentation.")


class Case(NamedTuple):
    """A preprocessed volume, with nnU-Net's properties of what it was before."""

    name: str
    data: Any  # C Z H W
    seg: Any  # 1 Z H W, labels
    properties: dict[str, Any]


def evaluate_with_boxes(
    model: Path, fold: str, checkpoint_name: str, images: Path, labels: Path, out: Path, device: torch.device
) -> float:
    """Segments a folder of raw volumes with boxes from their reference, and scores them as nnU-Net does.

    Args:
        images: Folder, as for nnUNetv2_predict.
        labels: Folder with one file for each case.

    Returns:
        Mean Dice over cases and classes, which ``summary.json`` in `out` holds with all else.

    Raises:
        FileNotFoundError: No such checkpoint, no images, or a case without reference.
        FileExistsError: There are volumes in `out` already.
        ValueError: The model takes no boxes, its checkpoint can't be read, or a reference has another shape than its
            image.
    """
    checkpoint = read_checkpoint(model, fold, checkpoint_name)
    if checkpoint.get("trainer_name") != TRAINER:
        raise ValueError(f"{model} is not of {TRAINER}: segment with nnUNetv2_predict, which needs no boxes.")
    plans_json, dataset_json = read_description(model)
    plans, name = PlansManager(plans_json), checkpoint["init_args"]["configuration"]
    configuration = plans.get_configuration(name)
    files = _with_reference(images, labels, dataset_json["file_ending"])
    if present := next(out.glob(f"*{dataset_json['file_ending']}"), None):  # would be overwritten, or scored along
        raise FileExistsError(f"{present} exists: give another folder with -o, or remove what is in it.")
    network = build_network(plans_json, dataset_json, name, TRAINER)
    assert isinstance(network, DBSAM)
    network.load_state_dict(checkpoint["network_weights"])
    out.mkdir(parents=True, exist_ok=True)
    for file in ("dataset.json", "plans.json"):
        shutil.copyfile(model / file, out / file)
    cases = _preprocessed(files, plans, configuration, dataset_json)
    segment_cases(network.to(device).eval(), cases, len(files), plans, configuration, dataset_json, out, device)
    return score(labels, out, plans, dataset_json)


def segment_cases(
    network: DBSAM, cases: Iterable[Case], number: int, plans: PlansManager, configuration: ConfigurationManager,
    dataset_json: dict[str, Any], out: Path, device: torch.device,
) -> None:
    """Writes a segmentation of each of `number` cases into `out`, with progress."""
    labels = plans.get_label_manager(dataset_json)
    for case in progress(cases, "With boxes", "cases", number):
        logits = segment_volume(network, case, labels, configuration.patch_size, device)
        export_prediction_from_logits(logits, case.properties, configuration, plans, dataset_json, str(out / case.name))


@torch.inference_mode()
def segment_volume(
    network: DBSAM, case: Case, labels: LabelManager, patch_size: Sequence[int], device: torch.device
) -> Tensor:
    """Logits (heads, Z, H, W), slice by slice; the boxes are the same in every call.

    Each object is seen in a window of the patch's size around it, as in training, or larger where it is larger. A class
    without a box in a slice has :data:`~desam_nnunet.networks.frame.ABSENT_LOGIT` there, the background 0.
    """
    kinds = foreground_of(labels)
    background = int(not labels.has_regions)
    volume, reference = np.asarray(case.data[:]), np.asarray(case.seg[:])[0]
    logits = torch.full((background + len(kinds), *reference.shape), ABSENT_LOGIT)
    logits[:background] = 0
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    for z, plane in enumerate(reference):
        necks: dict[Window, Tensor] = {}
        for channel, kind in enumerate(kinds, start=background):
            mask = np.isin(plane, kind)
            if not mask.any():
                continue
            window = window_around(mask, patch_size)
            target = torch.from_numpy(window.crop(mask[None]))[None]
            geometry = network.geometry(target)
            prompts, _ = sample_boxes(target, geometry, generator)
            assert prompts.boxes is not None
            if window not in necks:
                tile = torch.from_numpy(window.crop(volume[:, z])).float()[None]
                necks[window] = network.encode(tile.to(device))
            masks = network.decode(necks[window], prompts._replace(boxes=prompts.boxes.to(device)))
            window.paste(network.tile_logits(masks, geometry)[0, 0].float().cpu(), logits[channel, z])
    return logits


class Window(NamedTuple):
    """A rectangle of a slice, which it may exceed, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def bounds(self) -> list[list[int]]:
        """First and last, exclusive, of rows and columns."""
        return [[self.top, self.top + self.height], [self.left, self.left + self.width]]

    def crop(self, planes: np.ndarray) -> np.ndarray:
        """What it shows of planes (C, H, W); 0 where it exceeds them."""
        return crop_and_pad_nd(planes, self.bounds, 0)

    def paste(self, values: Tensor, plane: Tensor) -> None:
        """Writes `values`, of the window's size, into a plane (H, W)."""
        insert_crop_into_image(plane, values, self.bounds)


def window_around(mask: np.ndarray, patch_size: Sequence[int]) -> Window:
    """A window of the patch's size with the mask (H, W) in its middle, as far as the slice goes.

    Along an axis that is shorter than the patch all of it is shown, padded on both sides; where the mask is larger than
    the patch, so is the window.
    """
    begins, sides = [], []
    for axis, (size, patch) in enumerate(zip(mask.shape, patch_size, strict=True)):
        occupied = np.flatnonzero(mask.any(1 - axis))
        first, last = int(occupied[0]), int(occupied[-1]) + 1
        side = max(patch, last - first)
        begin = (first + last - side) // 2
        begins.append(min(max(begin, 0), size - side) if side < size else -((side - size) // 2))
        sides.append(side)
    return Window(*begins, *sides)


def score(labels: Path, out: Path, plans: PlansManager, dataset_json: dict[str, Any]) -> float:
    """nnU-Net's ``summary.json`` of a folder of segmentations, and beside it what the figures mean."""
    manager = plans.get_label_manager(dataset_json)
    ending = dataset_json["file_ending"]
    workers = min(default_num_processes, len(list(out.glob(f"*{ending}"))))
    summary = compute_metrics_on_folder(
        str(labels), str(out), str(out / "summary.json"), plans.image_reader_writer_class(), ending,
        foreground_of(manager), manager.ignore_label, workers)
    replace_file(out / "prompts.json", [json.dumps({"note": NOTE}, indent=4).encode()])
    return float(summary["foreground_mean"]["Dice"])


def _with_reference(images: Path, labels: Path, ending: str) -> _Files:
    if not images.is_dir():
        raise FileNotFoundError(f"{images} does not exist: give the folder of images with -i.")
    rows = [row for row in create_lists_from_splitted_dataset_folder(str(images), ending) if row]  # empty: other names
    if not rows:
        raise FileNotFoundError(f"{images} holds no images that end in _0000{ending}.")
    files = {}
    for row in rows:
        name = Path(row[0]).name.removesuffix(f"_0000{ending}")
        reference = labels / f"{name}{ending}"
        if not reference.is_file():
            raise FileNotFoundError(f"{reference} does not exist: every case needs its reference, from which the boxes "
                                    "come.")
        files[name] = row, str(reference)
    return files


def _preprocessed(
    files: _Files, plans: PlansManager, configuration: ConfigurationManager, dataset_json: dict[str, Any]
) -> Iterator[Case]:
    preprocessor = configuration.preprocessor_class(verbose=False)
    for name, (images, reference) in files.items():
        try:
            case = Case(name, *preprocessor.run_case(images, reference, plans, configuration, dataset_json))
        except AssertionError as error:  # nnU-Net's way to say so
            raise ValueError(f"Case {name}: {error}") from error
        yield case
