"""SAM's frozen encoder: ours against the stock forward."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from desam_nnunet.encoders.base import Features
from desam_nnunet.encoders.precision import dtype_name, encoder_dtype
from desam_nnunet.encoders.tiny_vit import TinyViT, TinyViTEncoder
from desam_nnunet.encoders.tiny_vit_frozen import frozen_form
from measure import Report, compare, matmul_rate, seconds
from peak import measured_peak
from reference import Subject, build, stock_features

TOLERANCE = 1e-4  # of the largest value, float32


def run(device: torch.device, repeats: int) -> Report:
    report = Report("encoder", "The frozen encoder against stock segment_anything", (
        "RANDOM weights, no gradients. Reference: segment_anything's forward in float32 (on CUDA in float16), with "
        "the three intermediate outputs. In float32 every output is equal within 1e-4 of its largest value, checked "
        "before timing."), device)
    with torch.inference_mode():
        _pairs(report, device, repeats)
        _tiny_vit(report, device, repeats)
        for variant in ("vit_b", "vit_h") if device.type == "cuda" else ("vit_b",):
            _share_of_the_machine(report, variant, device)
        for who in ("reference", "ours"):
            report.fact(f"peak memory of one ViT-B image at 1024 above the network's own, {who}",
                        f"{measured_peak('encoder', who, device) / 1e6:.0f} MB")
    return report


def _pairs(report: Report, device: torch.device, repeats: int) -> None:
    dtype = encoder_dtype(device)
    if device.type == "cuda":
        for variant, required in (("vit_b", None), ("vit_h", 2.0)):
            subject = build(variant, 1024, device)
            check(subject, torch.randn(1, 3, 1024, 1024, device=device))
            subject.stock.half()
            for batch in (1, 8):
                images = torch.randn(batch, 3, 1024, 1024, device=device)
                _time(report, f"{variant}, 1024, batch {batch}, {dtype_name(dtype)} (stock float16)", subject,
                      images.half(), images, repeats, required if batch == 8 else None, dtype)
        return
    for size, batch, required in ((256, 1, None), (512, 1, None), (512, 4, None), (1024, 1, 1.6)):
        subject = build("vit_b", size, device)
        images = torch.randn(batch, 3, size, size)
        error = check(subject, images)
        _time(report, f"vit_b, {size}, batch {batch}, float32", subject, images, images, repeats, required,
              torch.float32, {"largest error / largest value": f"{error:.1e}"})
        if dtype == torch.bfloat16:
            _time(report, f"vit_b, {size}, batch {batch}, bfloat16", subject, images, images, repeats,
                  4.0 if size == 1024 else None, dtype)


def _tiny_vit(report: Report, device: torch.device, repeats: int) -> None:
    """LiteMedSAM's encoder as timm's modules compute it, as upstream does, and as it runs here."""
    dtype = encoder_dtype(device)
    architecture = TinyViT(1)
    network, spec = architecture.build(256).image_encoder.to(device).eval(), architecture.spec(256)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):  # as trained ones: not all alike, and no branch is closed
            for values in (layer.weight, layer.running_var):
                values.uniform_(0.5, 1.5)
            for values in (layer.bias, layer.running_mean):
                values.uniform_(-0.2, 0.2)
    stock, ours = TinyViTEncoder(deepcopy(network), spec, ""), TinyViTEncoder(frozen_form(network), spec, "")
    for batch in (1, 4):
        images = torch.rand(batch, 3, 256, 256, device=device)
        stock.dtype = ours.dtype = torch.float32
        error = compared(ours(images), stock(images))
        if device.type == "cpu":
            report.add("Time", compare(
                f"lite_medsam, 256, batch {batch}, float32", lambda images=images: stock(images),
                lambda images=images: ours(images), device=device, repeats=repeats,
                notes={"largest error / largest value": f"{error:.1e}"}))
        if dtype != torch.float32:
            stock.dtype = torch.float32 if device.type == "cpu" else torch.float16
            ours.dtype = dtype
            ours(images)
            report.add("Time", compare(
                f"lite_medsam, 256, batch {batch}, {dtype_name(dtype)} (timm {dtype_name(stock.dtype)})",
                lambda images=images: stock(images), lambda images=images: ours(images), device=device,
                repeats=repeats))


def check(subject: Subject, images: Tensor) -> float:
    """Largest error of our float32 outputs, as a share of each output's largest value."""
    encoder = subject.network.encoder
    encoder.dtype = torch.float32
    return compared(encoder(images), stock_features(subject.stock, images))


def compared(ours: Features, theirs: Features) -> float:
    """Largest error, as a share of each output's largest value."""
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours.tensors, theirs.tensors, strict=True)]
    assert max(errors) < TOLERANCE, f"outputs differ by {max(errors):.1e} of their largest value"
    return max(errors)


def _time(report: Report, what: str, subject: Subject, stock_images: Tensor, images: Tensor, repeats: int,
          required: float | None, dtype: torch.dtype, notes: dict[str, str] | None = None) -> None:
    encoder = subject.network.encoder
    encoder.dtype = dtype

    def reference() -> Features:
        return stock_features(subject.stock, stock_images)

    reference()
    encoder(images)
    report.add("Time", compare(what, reference, lambda: encoder(images), device=images.device, repeats=repeats,
                               required=required, notes=notes))


def _share_of_the_machine(report: Report, variant: str, device: torch.device) -> None:
    """Operations are counted on the stock forward: what ours computes beyond them is not counted as achieved."""
    batch = 8 if device.type == "cuda" else 1
    subject = build(variant, 1024, device)
    images = torch.randn(batch, 3, 1024, 1024, device=device)
    with FlopCounterMode(display=False) as counter:
        subject.stock(images)
    dtype = encoder_dtype(device)
    encoder = subject.network.encoder
    encoder.dtype = dtype
    encoder(images)
    fastest = min(seconds(lambda: encoder(images), device) for _ in range(3))
    achieved, possible = counter.get_total_flops() / fastest, matmul_rate(device, dtype)
    report.fact(f"{variant}, 1024, batch {batch}, {dtype_name(dtype)}", (
        f"{counter.get_total_flops() / batch / 1e12:.2f} TFLOP an image, {achieved / 1e12:.3g} TFLOP/s achieved, "
        f"{achieved / possible:.0%} of the {possible / 1e12:.3g} TFLOP/s of a large matrix product in the same run"))
