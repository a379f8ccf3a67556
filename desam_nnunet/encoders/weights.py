"""Finds, verifies and loads the weights of SAM.

Where a named variant is looked for, in this order (``vit_tiny`` in the package before all):

1. the folder in the environment variable ``DESAM_WEIGHTS``,
2. ``$XDG_CACHE_HOME/desam_nnunet`` (``~/.cache/desam_nnunet``), where ``desam weights get`` writes,
3. torch.hub's ``checkpoints`` folder, where other SAM software leaves its downloads.

An encoder given as a path is taken from there; where that path does not exist (a model that moved to
another machine), a file of the same name is looked for in the same folders.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from segment_anything.modeling import MaskDecoder, PromptEncoder
from torch import Tensor
from torch.nn import functional as F

from desam_nnunet.encoders.attention import use_exact_attention
from desam_nnunet.encoders.base import FrozenEncoder
from desam_nnunet.encoders.random_weights import RANDOM_IDENTITY, random_state
from desam_nnunet.encoders.registry import PATCH, VARIANTS, Variant, build_sam
from desam_nnunet.system.files import damage_told

State = dict[str, Tensor]
_PACKAGE = Path(__file__).parent
_WIDTH_KEY = "image_encoder.patch_embed.proj.weight"


class LoadedSam(NamedTuple):
    """SAM with its weights, for one input size.

    Attributes:
        prompt_encoder: Frozen.
        mask_decoder: SAM's decoder, a start for ours.
        random: Whether these are no pretrained weights.
    """

    variant: Variant
    encoder: FrozenEncoder
    prompt_encoder: PromptEncoder
    mask_decoder: MaskDecoder
    random: bool


def download_folder() -> Path:
    """Where ``desam weights get`` writes: ``DESAM_WEIGHTS``, else the user's cache folder."""
    if folder := os.environ.get("DESAM_WEIGHTS"):
        return Path(folder).expanduser()
    return _user_cache()


def search_folders() -> list[Path]:
    """The folders in which weights are looked for, in order, whether they exist or not."""
    folders = [download_folder(), _user_cache(), Path(torch.hub.get_dir()) / "checkpoints"]
    return list(dict.fromkeys(folders))


def find_weights(encoder: str, identity: str | None = None) -> Path | None:
    """The weights file of `encoder`, a variant's name or a path; None for random weights.

    Args:
        identity: Of several files the one with this identity is taken, if there is one; else the first.

    Raises:
        FileNotFoundError: It is nowhere; the message says where it was looked for and what to do.
        ValueError: `encoder` is neither a known variant nor looks like a path.
    """
    variant = VARIANTS.get(encoder)
    if variant is not None and (not variant.file or (variant.packaged and identity == RANDOM_IDENTITY)):
        return None  # before vit_tiny had weights it meant random ones, and models of that time go on
    path = Path(variant.file if variant else encoder).expanduser()
    if variant is None and path.suffix == "" and path.parent == Path() and not path.is_file():
        raise ValueError(
            f"Unknown encoder '{encoder}': give one of {', '.join(VARIANTS)} or the path of a weights file."
        )
    places = [folder / path.name for folder in search_folders()]
    if variant is None:
        places.insert(0, path)
    elif variant.packaged:
        places.insert(0, _PACKAGE / path.name)
    found = [place for place in places if place.is_file()]
    if not found:
        remedy = variant.remedy if variant else "put the file into one of these folders"
        looked = ", ".join(str(place.parent) for place in places)
        raise FileNotFoundError(f"No weights file {path.name} in {looked}: {remedy}.")
    if not identity:
        return found[0]
    return next((place for place in found if identity == f"md5:{file_md5(place)}"), found[0])


def identify(encoder: str, wanted: str | None = None) -> str:
    """Names the weights of `encoder` beyond doubt: ``md5:<hash of the file>`` or the random generator and seed.

    Args:
        wanted: Of several files the one with this identity is looked at, if there is one.

    Raises:
        FileNotFoundError, ValueError: As :func:`find_weights`; or a published file's hash is not the known one.
    """
    path = find_weights(encoder, wanted)
    if path is None:
        return RANDOM_IDENTITY
    md5 = file_md5(path)
    variant = VARIANTS.get(encoder)
    if variant is not None and md5 != variant.md5 and f"md5:{md5}" != wanted:
        raise ValueError(
            f"{path} is not the published {encoder} file: its MD5 is {md5}, expected {variant.md5}. It is "
            f"truncated or another file: remove it and {variant.remedy}, or give its path as the encoder if it "
            "holds your own weights."
        )
    return f"md5:{md5}"


def load_sam(encoder: str, image_size: int, expected_identity: str | None = None) -> LoadedSam:
    """Loads SAM for one input size.

    Args:
        encoder: A variant's name or the path of a file with a SAM state dict of one of the variants' shapes.
        image_size: Input side in pixels, a multiple of 16. Position tables of another size are interpolated.
        expected_identity: What the model was trained with; another identity is refused.

    Raises:
        FileNotFoundError: No weights found.
        ValueError: Not a SAM file, wrong keys or shapes, a known file with another hash, or another identity.
    """
    identity = identify(encoder, expected_identity)
    if expected_identity is not None:
        check_identity(encoder, identity, expected_identity)
    path = find_weights(encoder, identity)
    if path is None:
        variant = VARIANTS[encoder]
        state = random_state(variant)
    else:
        state = {key: value.float() for key, value in read_sam_file(path).items()}  # also half precision's
        variant = variant_of(state, path)
        if encoder in VARIANTS and variant.name != encoder:
            raise ValueError(f"{path} holds {variant.name} weights, but the encoder is '{encoder}'.")
    return _assemble(variant, resize_positions(state, variant, image_size), image_size, identity, path is None)


def check_identity(encoder: str, found: str, expected: str) -> None:
    """Raises: ValueError: The weights found are not the expected ones."""
    if found != expected:
        remedy = f"put that weights file into {download_folder()}"
        if not expected.startswith("md5:"):
            remedy = "these random weights are not made by this version of desam_nnunet; train again"
        raise ValueError(
            f"The encoder '{encoder}' found here is {found}, but the plans were trained or made with {expected}: "
            f"{remedy}."
        )


def read_sam_file(path: Path) -> State:
    """A SAM state dict read from `path`, PyTorch's format or ``.safetensors``, without unpickling code.

    Raises:
        ValueError: The file can't be read as a dict of tensors.
    """
    with damage_told(f"{path} can't be read as weights", ": it is truncated or not a weights file. Fetch it again"):
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(
            path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} does not hold a state dict (names to tensors) as SAM's files do.")
    return state


def variant_of(state: State, path: Path | str) -> Variant:
    """The variant whose keys and shapes `state` has, all of them.

    Raises:
        ValueError: No variant fits; the message names what differs from the nearest one.
    """
    width = state[_WIDTH_KEY].shape[0] if _WIDTH_KEY in state else None
    variant = next((row for row in VARIANTS.values() if row.embed_dim == width), None)
    if variant is None:
        raise ValueError(
            f"{path} is not a SAM file: it has no image encoder of a known size ({', '.join(VARIANTS)})."
        )
    check_state(state, expected_shapes(variant), f"{path} as {variant.name}")
    return variant


def check_state(state: State, expected: dict[str, torch.Size], what: str) -> None:
    """Compares every key and shape.

    Raises:
        ValueError: Naming up to three missing, unknown or misshapen keys.
    """
    problems = [f"{key} is missing" for key in expected if key not in state]
    problems += [f"{key} is unknown" for key in state if key not in expected]
    problems += [
        f"{key} is {tuple(state[key].shape)}, not {tuple(shape)}"
        for key, shape in expected.items()
        if key in state and state[key].shape != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{what}: {'; '.join(problems[:3])}{more}.")


@lru_cache(maxsize=8)
def expected_shapes(variant: Variant) -> dict[str, torch.Size]:
    """Every key of a SAM file of `variant`, with its shape at the variant's own input size."""
    with torch.device("meta"):
        return {key: value.shape for key, value in build_sam(variant).state_dict().items()}


def resize_positions(state: State, variant: Variant, image_size: int) -> State:
    """Interpolates the position tables of the image encoder for another input size.

    The absolute table bilinearly, the relative tables of the global blocks linearly as SAM's
    ``get_rel_pos`` does at run time; windows keep their tables.
    """
    if image_size == variant.image_size:
        return state
    grid = image_size // PATCH
    resized = dict(state)
    absolute = state["image_encoder.pos_embed"].permute(0, 3, 1, 2)  # 1 H W D -> 1 D H W
    absolute = F.interpolate(absolute, size=(grid, grid), mode="bilinear", align_corners=False)
    resized["image_encoder.pos_embed"] = absolute.permute(0, 2, 3, 1)
    for block in variant.global_blocks:
        for axis in "hw":
            key = f"image_encoder.blocks.{block}.attn.rel_pos_{axis}"
            table = state[key].T[None]  # L C -> 1 C L
            resized[key] = F.interpolate(table, size=2 * grid - 1, mode="linear")[0].T.contiguous()
    return resized


def file_md5(path: Path) -> str:
    """MD5 of a file, the hash under which SAM's files are published; remembered while the file is unchanged."""
    stat = path.stat()
    return _hash_file(str(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=32)
def _hash_file(path: str, size: int, modified: int) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _assemble(variant: Variant, state: State, image_size: int, identity: str, random: bool) -> LoadedSam:
    with torch.device("meta"):  # the real values come with the state: nothing is initialised twice
        sam = build_sam(variant, image_size)
    sam.load_state_dict(state, assign=True)
    encoder = FrozenEncoder(use_exact_attention(sam.image_encoder), variant.global_blocks[:-1], identity)
    prompt_encoder = sam.prompt_encoder.requires_grad_(False).eval()
    return LoadedSam(variant, encoder, prompt_encoder, sam.mask_decoder, random)


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "desam_nnunet"
