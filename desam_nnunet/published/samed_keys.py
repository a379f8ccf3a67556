"""Published SAMed checkpoints: their key names, to ours and back.

Source: the published code of Zhang and Liu, SAMed, 2023. A file holds the low-rank matrices in the order of the blocks,
q before v (``w_a_000``, ``w_b_000``, ...), the prompt encoder and the mask decoder; SAMed_s has low-rank matrices of
the decoder's attentions instead of its transformer.
"""

from __future__ import annotations

import re

from desam_nnunet.encoders.weights import State

_PAIR = "qv"
_SEQUENCES = {"w": "updates", "sa": "decoder_updates.self", "cti": "decoder_updates.token_to_image",
              "cit": "decoder_updates.image_to_token"}
_MATRICES = {"a": "down", "b": "up"}
_MODULES = {
    "mask_decoder.mask_tokens.": "decoder.seg_layers.mask_tokens.",
    "mask_decoder.output_hypernetworks_mlps.": "decoder.seg_layers.hypernetworks.",
    "mask_decoder.iou_prediction_head.": "decoder.seg_layers.iou_head.",
    "mask_decoder.": "decoder.",
}
_NUMBERED = re.compile(rf"({'|'.join(_SEQUENCES)})_([ab])_(\d{{3}})")
_FINAL = re.compile(r"fati_([qv])([ab])")
_OURS = re.compile(rf"({'|'.join(map(re.escape, _SEQUENCES.values()))})\.(\d+)\.([qkv])\.(down|up)\.weight")
_OUR_FINAL = re.compile(r"decoder_updates\.final\.0\.([qv])\.(down|up)\.weight")


def is_official_samed(state: State) -> bool:
    return "w_a_000" in state


def adapts_decoder(state: State) -> bool:
    """Whether a published checkpoint is of SAMed_s."""
    return any(key.startswith("sa_") for key in state)


def rename_official_samed(state: State) -> State:
    """A published checkpoint by our key names."""
    return {_ours(key): value for key, value in state.items()}


def official_samed_names(state: State) -> State:
    """The state of one of our networks by the published names.

    Raises:
        ValueError: Low-rank updates of other projections than q and v, or a neck of our own, have no published name.
    """
    letters = {match[3] for match in map(_OURS.fullmatch, state) if match}
    if foreign := [key for key in state if key.startswith("neck.")]:
        raise ValueError(f"SAMed's format has no place for {foreign[0]}: it is for encoders that come with SAM.")
    if letters != set(_PAIR):
        raise ValueError(f"SAMed's format has updates of q and v, but these are of {', '.join(sorted(letters))}.")
    return {_published(key): value for key, value in state.items()}


def _ours(key: str) -> str:
    if match := _NUMBERED.fullmatch(key):
        sequence, matrix, number = match.groups()
        place, letter = divmod(int(number), len(_PAIR))
        return f"{_SEQUENCES[sequence]}.{place}.{_PAIR[letter]}.{_MATRICES[matrix]}.weight"
    if match := _FINAL.fullmatch(key):
        return f"decoder_updates.final.0.{match[1]}.{_MATRICES[match[2]]}.weight"
    for theirs, ours in _MODULES.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def _published(key: str) -> str:
    if match := _OURS.fullmatch(key):
        sequence, place, letter, matrix = match.groups()
        number = len(_PAIR) * int(place) + _PAIR.index(letter)
        return f"{_key_of(_SEQUENCES, sequence)}_{_key_of(_MATRICES, matrix)}_{number:03d}"
    if match := _OUR_FINAL.fullmatch(key):
        return f"fati_{match[1]}{_key_of(_MATRICES, match[2])}"
    for theirs, ours in _MODULES.items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return key


def _key_of(names: dict[str, str], value: str) -> str:
    return next(key for key, other in names.items() if other == value)
