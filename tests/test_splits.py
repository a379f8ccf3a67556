"""nnU-Net's splits, and files of that name that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from desam_nnunet.nnunet.splits import read_splits


def test_a_split_is_read(tmp_path: Path) -> None:
    path = tmp_path / "splits_final.json"
    path.write_text('[{"train": ["a", "b"], "val": ["c"]}]')
    assert read_splits(path) == [{"train": ["a", "b"], "val": ["c"]}]


@pytest.mark.parametrize("content", ["null", "3", "{}", "[null]", '[{"train": ["a"]}]', '[{"train": ["a"], "val": 3}]',
                                     '[{"train": [1], "val": []}]', "[", "[" * 10**5])
def test_what_is_no_split_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "splits_final.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"splits_final.json (holds no list of folds|can't be read as JSON)"):
        read_splits(path)
