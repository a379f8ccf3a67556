"""A raw data set's dataset.json that nnU-Net could not read."""

from __future__ import annotations

from typing import Any

import pytest

from desam_nnunet.nnunet.description import check_description

GOOD: dict[str, Any] = {"labels": {"background": 0, "organ": 1}, "channel_names": {"0": "MR"}, "file_ending": ".nii.gz"}


@pytest.mark.parametrize("more", [
    {}, {"dataset": {"a": {"images": ["a.nii.gz"], "label": "b.nii.gz"}}},
    {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}])
def test_what_nnunet_reads_is_accepted(more: dict[str, Any]) -> None:
    check_description(GOOD | more, "dataset.json")


def test_the_names_of_nnunets_first_version_are_accepted() -> None:
    given = {"modality" if key == "channel_names" else key: value for key, value in GOOD.items()}
    check_description(given, "dataset.json")


@pytest.mark.parametrize(("key", "value"), [
    ("channel_names", None), ("channel_names", []), ("file_ending", 3), ("file_ending", "nii"), ("dataset", None),
    ("dataset", {"a": 3}), ("dataset", {"a": {"images": "x", "label": "y"}}), ("labels", None),
    ("labels", {"organ": 1})])
def test_what_nnunet_can_not_read_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{key} .*dataset\.json"):
        check_description(GOOD | {key: value}, "x/dataset.json")
