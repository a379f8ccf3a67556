"""Weights files whose keys, types, shapes, values or bytes nobody would write."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fuzzing import outcome
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from desam_nnunet.encoders.registry import ENCODERS
from desam_nnunet.encoders.weights import describe_file, load_encoder

STATE = ENCODERS["vit_tiny"].architecture.random_state()
KEYS = sorted(STATE)
CHANGES: dict[str, Any] = {
    "dtype": lambda x: x.to(torch.int32), "bool": lambda x: x > 0, "complex": lambda x: x.to(torch.complex64),
    "half": lambda x: x.half(), "double": lambda x: x.double(), "sparse": lambda x: x.to_sparse(),
    "huge": lambda x: x.double() * 0 + 1e300, "float8": lambda x: x.to(torch.float8_e4m3fn),
    "without values": lambda x: x.to("meta"),
    "nan": lambda x: torch.full_like(x, float("nan")), "infinite": lambda x: torch.full_like(x, float("inf")),
    "scalar": lambda x: x.flatten()[:1].sum(), "empty": lambda x: x[:0], "longer": lambda x: torch.cat([x, x]),
    "turned": lambda x: x.T if x.dim() == 2 else x[None], "none": lambda _: None, "text": lambda _: "weights",
}
HARMLESS = {"half", "double"}


@contextmanager
def written(state: Any) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.pth"
        torch.save(state, path)
        yield path


@given(st.sampled_from(KEYS), st.sampled_from(sorted(CHANGES)))
def test_a_changed_tensor_is_refused_unless_it_says_the_same(key: str, change: str) -> None:
    changed = CHANGES[change](STATE[key])
    same = isinstance(changed, Tensor) and changed.shape == STATE[key].shape and change in HARMLESS | {"turned"}
    with written(STATE | {key: changed}) as path:
        assert (outcome(lambda: describe_file(path)) is not None) == same
        loaded = outcome(lambda: load_encoder(str(path), 64))
    assert (loaded is not None) == same
    if change in HARMLESS:
        assert all(value.dtype == torch.float32 for value in loaded.encoder.network.parameters())


@given(st.one_of(st.text(max_size=30), st.integers(), st.none(), st.tuples(st.integers())), st.booleans())
def test_a_changed_key_is_refused(key: Any, instead: bool) -> None:
    state: dict[Any, Any] = dict(STATE) | {key: torch.zeros(2)}
    if instead:
        del state[KEYS[0]]
    if key in STATE:
        return
    with written(state) as path:
        assert outcome(lambda: describe_file(path)) is None


@given(st.data())
def test_changed_bytes_are_refused_or_change_numbers_alone(data: st.DataObject) -> None:
    """A file of one's own has no known hash: other numbers are another encoder, which identity and log say."""
    with written(STATE) as path:
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])
        outcome(lambda: describe_file(path))
