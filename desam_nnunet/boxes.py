"""``desam boxes``: the evaluation of the DB-SAM paper, with boxes from the reference segmentation.

Source: Qin et al., DB-SAM, MICCAI 2024, section 3.1. It asks how well a model outlines what it is shown, and says
nothing about finding it: figures with boxes from the reference are not comparable with those of nnUNetv2_predict.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder
from torch import Tensor
from tqdm import tqdm

from desam_nnunet.files import replace_file
from desam_nnunet.networks.dbsam import DBSAM
from desam_nnunet.networks.frame import ABSENT_LOGIT
from desam_nnunet.sam.prompts import sample_boxes

NOTE = ("Each class of each slice was segmented from a box around it in the REFERENCE segmentation, moved at random by "
        "up to 2 % of the input. These figures are not comparable with automatic segmentation.")


class Case(NamedTuple):
    """A preprocessed volume.

    Attributes:
        name: Without file ending.
        data: (C, Z, H, W).
        seg: Labels (1, Z, H, W).
        properties: nnU-Net's, of the volume before preprocessing.
    """

    name: str
    data: Any
    seg: Any
    properties: dict[str, Any]


def evaluate_with_boxes(
    model: Path, fold: str, checkpoint_name: str, images: Path, labels: Path, out: Path, device: torch.device
) -> float:
    """Segments a folder of raw volumes with boxes from their reference, and scores them as nnU-Net does.

    Args:
        images: As for nnUNetv2_predict. labels: One file for each case.

    Returns:
        Mean Dice over cases and classes, which ``summary.json`` in `out` holds with all else.

    Raises:
        FileNotFoundError: No such checkpoint, no images, or a case without reference.
        ValueError: The model takes no boxes.
    """
    for path in (model / "plans.json", model / f"fold_{fold}" / checkpoint_name):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: give the model folder, -f and -chk of a trained fold.")
    predictor = nnUNetPredictor(device=device, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (fold,), checkpoint_name)
    network = predictor.network
    if not isinstance(network, DBSAM) or network.automatic:
        raise ValueError(f"{model} is not of DBSAMTrainerBoxes: segment with nnUNetv2_predict, which needs no boxes.")
    network.load_state_dict(predictor.list_of_parameters[0])
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    ending = predictor.dataset_json["file_ending"]
    files = _with_reference(images, labels, ending)
    preprocessor = configuration.preprocessor_class(verbose=False)
    cases = (Case(name, *preprocessor.run_case(channels, str(labels / f"{name}{ending}"), plans, configuration,
                                               predictor.dataset_json)) for name, channels in files.items())
    out.mkdir(parents=True, exist_ok=True)
    for name in ("dataset.json", "plans.json"):
        shutil.copyfile(model / name, out / name)
    network = network.to(device).eval()
    segment_cases(network, cases, len(files), plans, configuration, predictor.dataset_json, out, device)
    return score(labels, out, plans, predictor.dataset_json)


def segment_cases(
    network: DBSAM, cases: Iterable[Case], number: int, plans: PlansManager, configuration: ConfigurationManager,
    dataset_json: dict[str, Any], out: Path, device: torch.device,
) -> None:
    """Writes a segmentation of each of `number` cases into `out`, with progress."""
    labels = plans.get_label_manager(dataset_json)
    for case in tqdm(cases, total=number, desc="With boxes", unit="case"):
        logits = segment_volume(network, case, labels, device)
        export_prediction_from_logits(logits, case.properties, configuration, plans, dataset_json,
                                      str(out / case.name))


@torch.inference_mode()
def segment_volume(network: DBSAM, case: Case, labels: LabelManager, device: torch.device) -> Tensor:
    """Logits (heads, Z, H, W), slice by slice; the boxes are the same in every call.

    A class without a box in a slice has :data:`~desam_nnunet.networks.frame.ABSENT_LOGIT` there, the background 0.
    """
    kinds = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    background = int(not labels.has_regions)
    volume, reference = np.asarray(case.data[:]), np.asarray(case.seg[:])[0]
    logits = torch.full((background + len(kinds), *reference.shape), ABSENT_LOGIT)
    logits[:background] = 0
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    for z, plane in enumerate(reference):
        masks = torch.from_numpy(np.stack([np.isin(plane, kind) for kind in kinds]))
        present = masks.flatten(1).any(1).nonzero()[:, 0]
        if not len(present):
            continue
        tile = torch.from_numpy(volume[:, z]).float()[None].to(device)
        geometry = network.geometry(tile)
        prompts, _ = sample_boxes(masks[present][:, None], geometry, generator)
        assert prompts.boxes is not None
        neck = network.encode(tile).expand(len(present), -1, -1, -1)
        decoded = network.decode(neck, prompts._replace(boxes=prompts.boxes.to(device)))
        logits[background + present, z] = network.tile_logits(decoded, geometry)[:, 0].float().cpu()
    return logits


def score(labels: Path, out: Path, plans: PlansManager, dataset_json: dict[str, Any]) -> float:
    """nnU-Net's ``summary.json`` of a folder of segmentations, and beside it what the figures mean."""
    manager = plans.get_label_manager(dataset_json)
    kinds = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    ending = dataset_json["file_ending"]
    workers = min(default_num_processes, len(list(out.glob(f"*{ending}"))))
    summary = compute_metrics_on_folder(
        str(labels), str(out), str(out / "summary.json"), plans.image_reader_writer_class(), ending, kinds,
        manager.ignore_label, workers)
    replace_file(out / "prompts.json", [json.dumps({"note": NOTE}, indent=4).encode()])
    return float(summary["foreground_mean"]["Dice"])


def _with_reference(images: Path, labels: Path, ending: str) -> dict[str, list[str]]:
    """The channels' files of every case."""
    if not images.is_dir():
        raise FileNotFoundError(f"{images} does not exist: give the folder of images with -i.")
    rows = create_lists_from_splitted_dataset_folder(str(images), ending)
    if not rows:
        raise FileNotFoundError(f"{images} holds no images that end in _0000{ending}.")
    files = {Path(row[0]).name.removesuffix(f"_0000{ending}"): row for row in rows}
    for name in files:
        if not (labels / f"{name}{ending}").is_file():
            raise FileNotFoundError(f"{labels / (name + ending)} does not exist: every case needs its reference, from "
                                    "which the boxes come.")
    return files
