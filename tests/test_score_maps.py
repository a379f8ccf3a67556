"""Score maps of the report: which slice is shown, and that its number is the volume's own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import SIZE, tiny_sam
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from desam_nnunet.evaluation.score_maps import score_maps
from desam_nnunet.networks.desam.network import build_desam
from desam_nnunet.networks.desam.prompters import GridPrompter
from desam_nnunet.networks.frame import Outline
from desam_nnunet.sam.tiles import TileToImage

SHAPE = (36, 40, 44)
ORGAN, EMPTY = 21, 5  # along the axis of the slices: the organ's only one, and how many the cropping takes away


def predictor_of(transpose: list[int]) -> Any:
    """What score maps ask of nnU-Net's predictor, on plans that leave intensities and spacing as they are."""
    resampling = "resample_data_or_seg_to_shape"
    configuration = {
        "preprocessor_name": "DefaultPreprocessor", "patch_size": [24, 24], "spacing": [1.0, 1.0],
        "normalization_schemes": ["NoNormalization"], "use_mask_for_norm": [False], "architecture": {},
        "resampling_fn_data": resampling, "resampling_fn_seg": resampling,
        "resampling_fn_data_kwargs": {"is_seg": False}, "resampling_fn_seg_kwargs": {"is_seg": True, "order": 0},
    }
    plans = PlansManager({
        "image_reader_writer": "SimpleITKIO", "transpose_forward": transpose, "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {}}, "configurations": {"2d": configuration}})
    return SimpleNamespace(plans_manager=plans, configuration_manager=plans.get_configuration("2d"),
                           dataset_json={"labels": {"background": 0, "organ": 1}, "channel_names": {"0": "MR"}})


@pytest.mark.parametrize("transpose", [[0, 1, 2], [1, 0, 2], [2, 0, 1]])
def test_the_number_is_that_of_the_volumes_own_slice(tmp_path: Path, transpose: list[int]) -> None:
    """Whatever axis nnU-Net cuts along, and whatever it crops: every voxel holds the number of its slice."""
    axis = transpose[0]
    image = np.moveaxis(np.broadcast_to(np.arange(SHAPE[axis])[:, None, None],
                                        [SHAPE[other] for other in transpose]).astype(np.float32), 0, axis).copy()
    organ = np.zeros(SHAPE, np.uint8)
    np.moveaxis(organ, axis, 0)[ORGAN, 10:16, 12:20] = 1
    np.moveaxis(image, axis, 0)[:EMPTY] = 0
    paths = [str(tmp_path / f"{name}.nii.gz") for name in ("image", "label")]
    for path, array in zip(paths, (image, organ), strict=True):
        sitk.WriteImage(sitk.GetImageFromArray(array), path)
    outline = Outline(tiny_sam(), TileToImage(tiny_sam().encoder.spec.image, SIZE, "percentile"), 1, 2, True, None)
    network = build_desam(outline, GridPrompter(3)).eval()
    with_organ, without = score_maps(network, predictor_of(transpose), [paths[0]], paths[1], [1])
    assert with_organ.slice == with_organ.image.max() == with_organ.image.min() == ORGAN
    assert (with_organ.labels == 1).sum() == 6 * 8
    assert without.slice == without.image.max() == without.image.min() != ORGAN
    assert (without.labels == 1).sum() == 0
