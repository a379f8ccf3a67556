"""Logits resampled with PyTorch are nnU-Net's."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import Workspace
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from desam_nnunet.planning.resampling import faster_resampling

STOCK = {
    "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
    "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}}


def logits(shape: tuple[int, ...]) -> torch.Tensor:
    """Three smooth channels."""
    coarse = torch.randn(1, 3, *(max(2, side // 8) for side in shape), generator=torch.Generator().manual_seed(0))
    return 5 * torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0]


@pytest.mark.parametrize(("shape", "wanted", "spacing", "new_spacing"), [
    ((9, 60, 60), (9, 77, 77), (3.6, 0.78, 0.78), (3.6, 0.61, 0.61)),  # slices apart: each on its own
    ((9, 61, 59), (9, 47, 45), (3.6, 0.61, 0.61), (3.6, 0.79, 0.79)),
    ((30, 60, 60), (30, 86, 86), (1.5, 1.0, 1.0), (1.5, 0.7, 0.7)),  # nearly isotropic: in three dimensions
    ((9, 60, 60), (9, 60, 60), (3.6, 0.61, 0.61), (3.6, 0.61, 0.61)),
])
def test_labels_are_those_of_nnunets_default(
    workspace: Workspace, shape: tuple[int, ...], wanted: tuple[int, ...], spacing: tuple[float, ...],
    new_spacing: tuple[float, ...],
) -> None:
    """Labels may differ where two classes are equal but for rounding."""
    plans = workspace.plans("nnUNetPlans")
    found = []
    for keys in (STOCK, faster_resampling(STOCK)):
        plans["configurations"]["2d"] |= keys
        resample = PlansManager(json.loads(json.dumps(plans))).get_configuration("2d").resampling_fn_probabilities
        found.append(torch.as_tensor(resample(logits(shape), wanted, spacing, new_spacing)))
    stock, ours = found
    assert ours.shape == (3, *wanted)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4)
    values = stock.topk(2, dim=0).values
    clear = values[0] - values[1] > 2e-4
    assert clear.float().mean() > 0.99
    assert torch.equal(ours.argmax(0)[clear], stock.argmax(0)[clear])


def test_what_is_not_the_default_stays(workspace: Workspace) -> None:
    for other in ({"resampling_fn_probabilities": "resample_torch_fornnunet"},
                  {"resampling_fn_probabilities_kwargs": STOCK["resampling_fn_probabilities_kwargs"] | {"order": 3}}):
        assert faster_resampling(STOCK | other) == {}
    stock = workspace.plans("nnUNetPlans")["configurations"]["2d"]
    assert {key: stock[key] for key in STOCK} == STOCK, "nnU-Net has another default"
