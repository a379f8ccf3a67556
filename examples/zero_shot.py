"""What a SAM segments without any training, for reading a comparison of trained models.

    python examples/zero_shot.py DATA OUT --encoder lite_medsam

DATA holds one folder per site, as ``desam cross-site`` reads them. Each slice is segmented twice by SAM's own mask
decoder: asked with the box around the reference, which **sees the answer**, also in which slices the organ is; and with
the whole slice as the box, which knows nothing. Volumes are scaled as MedSAM's are, between their percentiles 0.5 and
99.5. OUT gets the segmentations and ``zero_shot.md``; what is there already is not done again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compare_models import TOLERANCE, cells, of_cases, table
from desam_nnunet.encoders.registry import row_by_name
from desam_nnunet.encoders.weights import load_encoder
from desam_nnunet.evaluation.scores import score_cases
from desam_nnunet.nnunet.sites import Case, Sites, check_sites, ending_of, read_sites
from desam_nnunet.sam.prompts import Prompts, dense_positions, extent, prompt_tokens, whole_box
from desam_nnunet.sam.tiles import Geometry, TileToImage, cut_padding
from desam_nnunet.system.files import replace_file
from desam_nnunet.system.progress import progress

PROMPTS = ("box of the reference", "whole slice")
_PERCENTILES = (0.5, 99.5)


class ZeroShot(nn.Module):
    """A whole SAM, untrained here: image encoder, prompt encoder and mask decoder."""

    def __init__(self, encoder: str, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.loaded = load_encoder(encoder, image_size)
        if not self.loaded.trained:
            raise ValueError(f"--encoder {encoder} comes without a trained mask decoder: give a SAM.")
        self.encoder = self.loaded.encoder.eval()
        self.to_image = TileToImage(self.encoder.spec.image, image_size, "unit")

    def segment(self, image: Tensor, reference: Tensor) -> list[Tensor]:
        """Masks (H, W) of an image (H, W), 0 to 1, one for each of :data:`PROMPTS`; the reference is (H, W), bool."""
        height, width = image.shape
        geometry = Geometry((height, width), self.image_size)
        neck = self.encoder(self.to_image(image[None, None])[:, 0]).neck.float()
        whole = self._mask(neck, whole_box(geometry, 1, image.device), geometry)
        if not reference.any():
            return [torch.zeros_like(reference), whole]
        (left, right), (top, bottom) = (extent(reference.any(axis)[None])[0] for axis in (0, 1))
        down, across = (scaled / side for scaled, side in zip(geometry.scaled, (height, width), strict=True))
        box = torch.stack([left * across, top * down, right * across, bottom * down])[None]
        return [self._mask(neck, Prompts(boxes=box), geometry), whole]

    def _mask(self, neck: Tensor, prompts: Prompts, geometry: Geometry) -> Tensor:
        sparse, dense = prompt_tokens(self.loaded.prompt_encoder, prompts)
        masks, _ = self.loaded.mask_decoder(
            image_embeddings=neck, image_pe=dense_positions(self.loaded.prompt_encoder),
            sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=False)
        whole = F.interpolate(masks, (self.image_size, self.image_size), mode="bilinear", align_corners=False)
        inside = cut_padding(whole, Geometry(geometry.tile, self.image_size, mask_stride=1))
        return F.interpolate(inside, geometry.tile, mode="bilinear", align_corners=False)[0, 0] > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with a folder per site")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for segmentations and the table")
    parser.add_argument("--encoder", default="lite_medsam", help="a SAM (default: lite_medsam)")
    parser.add_argument("--label", default="prostate", help="of value 1 (default: prostate)")
    options = parser.parse_args()
    try:
        sites = read_sites(options.data)
        check_sites(sites)
        row = row_by_name(options.encoder)
        if row is None:
            raise ValueError(f"--encoder {options.encoder}: give a name that desam weights list shows.")
        network = ZeroShot(options.encoder, row.image_size)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    every = [(site, case) for site, cases in sites.items() for case in cases]
    for site, case in progress(every, "Zero-shot", "cases"):
        files = [file_of(options.out, prompt, site, case) for prompt in PROMPTS]
        if not all(file.is_file() for file in files):
            write_masks(network, case, files)
    text = report(options.out, sites, options.label, f"{options.encoder} (trained on: {row.trained_on})")
    replace_file(options.out / "zero_shot.md", [text.encode()])
    print(text)


def file_of(out: Path, prompt: str, site: str, case: Case) -> Path:
    return out / prompt.replace(" ", "_") / site / f"{case.name}{ending_of(case.label)}"


@torch.inference_mode()
def write_masks(network: ZeroShot, case: Case, files: list[Path]) -> None:
    """One volume, slice by slice."""
    volume = sitk.GetArrayFromImage(sitk.ReadImage(case.images[0])).astype(np.float32)
    image = sitk.ReadImage(case.label)
    reference = torch.from_numpy(sitk.GetArrayFromImage(image) == 1)
    low, high = np.percentile(volume, _PERCENTILES)
    scaled = torch.from_numpy((volume - low) / max(high - low, 1e-6)).clamp(0, 1)
    planes = [network.segment(*plane) for plane in zip(scaled, reference, strict=True)]
    for file, masks in zip(files, zip(*planes, strict=True), strict=True):
        segmentation = sitk.GetImageFromArray(torch.stack(masks).numpy().astype(np.uint8))
        segmentation.CopyInformation(image)
        file.parent.mkdir(parents=True, exist_ok=True)
        begun = file.with_name(f".begun_{file.name}")
        sitk.WriteImage(segmentation, begun)
        begun.replace(file)


def report(out: Path, sites: Sites, label: str, encoder: str) -> str:
    """Markdown: a row for each prompt and site."""
    rows: list[list[object]] = []
    for prompt in PROMPTS:
        for site, cases in sites.items():
            predictions = {case.name: file_of(out, prompt, site, case) for case in cases}
            references = {case.name: case.label for case in cases}
            scores = pd.DataFrame(score_cases(predictions, references, {label: (1,)}, None, TOLERANCE))
            rows.append([prompt, site, len(cases), *cells(of_cases(scores[scores.protocol == "volume"]))])
    lines = [f"{encoder}, without training here. Whole volumes, means over cases: Dice with its 95 % bootstrap "
             "interval, surface Dice at 2 mm, HD95 in mm. A box of the reference sees the answer.", "",
             *table(["prompt", "site", "cases", "Dice", "surface Dice", "HD95"], rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
