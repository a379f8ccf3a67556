"""What the encoder's precision costs, and the type in which the cache stores: in features and in final masks.

As part of the benchmarks, with random weights for every size of SAM's. By itself, on a trained model:

    python benchmarks/precision.py MODEL_FOLDER IMAGES_FOLDER LABELS_FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from desam_nnunet.cache.store import pack, unpack
from desam_nnunet.encoders.base import Encoder, Features
from desam_nnunet.encoders.registry import ENCODERS
from desam_nnunet.encoders.sam_vit import SamViT
from desam_nnunet.settings.sections import DTYPES as STORED
from measure import Report
from reference import build, stock_features

DTYPES = (torch.bfloat16, torch.float16)
LARGEST = 512  # pixels: products of half precision are emulated on a CPU without them


def run(device: torch.device, repeats: int) -> Report:
    """`repeats` changes nothing: these are no times."""
    report = Report("precision", "What half precision and the cache's types cost", (
        "RANDOM weights and a random whole-box decoder in float32. Relative error |x - y| / |y| against float32 of "
        "the three intermediate outputs and of the neck, and the same of stock segment_anything under the same "
        "autocast; share of the tile's pixels whose class changes. Stored: what the cache makes of float32."), device)
    with torch.inference_mode():
        for name, row in ENCODERS.items():
            if row.is_random or not isinstance(row.architecture, SamViT):
                continue  # as large as another, since all weights here are random, or not segment_anything's
            size = min(row.image_size, LARGEST)
            stock, network, tile = build(name, size, device, grid=None)
            encoder, images = network.encoder, network.to_image(tile)[:, 0]
            encoder.dtype = torch.float32
            exact, classes = encoder(images), network(tile).argmax(1)
            for dtype in DTYPES:
                encoder.dtype = dtype
                mine, changed = _errors(encoder(images), exact), network(tile).argmax(1) != classes
                with torch.autocast(device.type, dtype=dtype):
                    theirs = _errors(stock_features(stock, images), exact)
                report.fact(f"{name}, {size}, {str(dtype)[6:]}", (
                    f"levels and neck {_row(mine)} (stock {_row(theirs)}), "
                    f"{float(changed.float().mean()):.2%} of the pixels change"))
            encoder.dtype = torch.float32
            for kind in STORED:
                with stored(encoder, kind):
                    mine, changed = _errors(encoder(images), exact), network(tile).argmax(1) != classes
                report.fact(f"{name}, {size}, stored as {kind}", (
                    f"levels and neck {_row(mine)}, {float(changed.float().mean()):.2%} of the pixels change"))
    return report


@contextmanager
def stored(encoder: Encoder, dtype: str) -> Iterator[None]:
    """The encoder's output as it comes back from the cache."""
    def store(_module: object, _inputs: object, features: Features) -> Features:
        return features.map(lambda x: torch.stack([unpack("x", pack("x", one, dtype)).float() for one in x]))

    hook = encoder.register_forward_hook(store)
    try:
        yield
    finally:
        hook.remove()


def _errors(features: Features, exact: Features) -> list[float]:
    pairs = zip(features.tensors, exact.tensors, strict=True)
    return [float((x.float() - y).norm() / y.norm()) for x, y in pairs]


def _row(errors: list[float]) -> str:
    return ", ".join(f"{error:.1e}" for error in errors)


def of_model(model: Path, images: Path, labels: Path) -> None:
    """Dice of foreground against the truth and against float32, per precision, mean over the cases."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predictor = nnUNetPredictor(device=device, allow_tqdm=False, use_mirroring=False,
                                perform_everything_on_device=device.type == "cuda")
    predictor.initialize_from_trained_model_folder(str(model), use_folds=None)
    cases = sorted(path.name.removesuffix("_0000.nii.gz") for path in images.glob("*_0000.nii.gz"))
    truth = {case: sitk.GetArrayFromImage(sitk.ReadImage(labels / f"{case}.nii.gz")) > 0 for case in cases}
    exact: dict[str, np.ndarray] = {}
    reader = predictor.plans_manager.image_reader_writer_class()
    encoder = predictor.network.encoder
    for what in (torch.float32, *DTYPES, *STORED):
        encoder.dtype = what if isinstance(what, torch.dtype) else torch.float32
        against_truth, against_exact = [], []
        for case in cases:
            files = sorted(str(path) for path in images.glob(f"{case}_*.nii.gz"))
            with stored(encoder, what) if isinstance(what, str) else nullcontext():
                mask = predictor.predict_single_npy_array(*reader.read_images(files)) > 0
            exact.setdefault(case, mask)
            against_truth.append(dice(mask, truth[case]))
            against_exact.append(dice(mask, exact[case]))
        name = f"stored as {what}" if isinstance(what, str) else str(what)[6:]
        print(f"{name}: Dice {np.mean(against_truth):.4f}, against float32 mean {np.mean(against_exact):.4f}, "
              f"least {np.min(against_exact):.4f}, {len(cases)} cases", flush=True)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    total = int(a.sum() + b.sum())
    return 2 * int((a & b).sum()) / total if total else 1.0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "images", "labels"):
        parser.add_argument(name, type=Path)
    of_model(**vars(parser.parse_args()))
