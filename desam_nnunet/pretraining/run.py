"""A pretraining run: from random weights to a SAM file, put down and taken up again.

In the run's folder: ``settings.json`` (recipe, versions, machine, time, result), ``curve.csv``, ``weights.safetensors``
when it is done, and ``state.pt`` until then.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from desam_nnunet import __version__
from desam_nnunet.augmentation.randomness import Randomness
from desam_nnunet.encoders.precision import encoder_dtype
from desam_nnunet.pretraining import records
from desam_nnunet.pretraining.generator import VERSION, Generated, generate
from desam_nnunet.pretraining.network import Pretrained
from desam_nnunet.pretraining.prompts import ask_boxes, ask_points, judge_answers, mask_labels
from desam_nnunet.pretraining.recipe import MAX_SEED, Recipe
from desam_nnunet.pretraining.regions import describe_regions, judge_descriptions
from desam_nnunet.system.files import replace_file
from desam_nnunet.system.machine import describe_machine

_DECAY = 0.05
_CLIP = 1.0
_REPORTS = 100  # rows of the curve
_SAVE_SECONDS = 300
_FIRST_STEPS = 10  # after which the time left is told first
_PROMPTS = MAX_SEED + 1  # added to a seed: prompts are drawn from another stream than images
_UNSEEN, _UNSEEN_BATCH, _UNSEEN_PROMPTS = 128, 16, 4  # on which every recipe is judged in the end
_UNSEEN_SEED = 2 * (MAX_SEED + 1)


class Progress(NamedTuple):
    """Of one step, scalars; the loss of the regions is 0 where they are left out."""

    loss: Tensor
    regions: Tensor
    point_iou: Tensor
    box_iou: Tensor


def pretrain(
    folder: Path, recipe: Recipe, device: torch.device, say: Callable[[str], None] = print,
    minutes: float = math.inf,
) -> Path | None:
    """Runs `recipe` to its end, or goes on with it.

    Returns:
        The weights file; None where `minutes` were over before, and the run is to be taken up again.

    Raises:
        ValueError: The folder holds something else, or a run of another recipe.
        RuntimeError: The gradient is not finite.
    """
    settings = {"recipe": asdict(recipe), "generator": VERSION, "device": device.type}
    records.check_same_run(folder, settings)
    weights = folder / records.WEIGHTS
    if weights.is_file():
        say(f"{weights} is there already.")
        return weights
    folder.mkdir(parents=True, exist_ok=True)
    records.write_settings(folder, settings)
    run = _Run(folder, recipe, device)
    run.resume()
    if not run.go(say, minutes):
        say(f"Put down after {run.step * recipe.batch_size:,} images: the same command goes on.")
        return None
    points, boxes = unseen_iou(run.network, recipe.size.tables, device)
    records.write_settings(folder, settings | {
        "starts_from": "random weights", "steps": run.step, "seconds": round(run.seconds),
        "precision": "bfloat16" if _has_bfloat16(device) else "float32",
        "unseen_images": _UNSEEN, "unseen_iou_points": round(points, 4), "unseen_iou_boxes": round(boxes, 4),
        "desam_nnunet": __version__, "machine": describe_machine(device)})
    replace_file(weights, [save(run.network.weights(), {"pretraining": json.dumps(settings)})])
    (folder / records.STATE).unlink(missing_ok=True)
    say(f"IoU on unseen generated images: {points:.3f} from a point, {boxes:.3f} from a box.")
    return weights


class _Run:
    def __init__(self, folder: Path, recipe: Recipe, device: torch.device) -> None:
        self.folder = folder
        self.recipe = recipe
        self.device = device
        self.size = recipe.size.tables
        self.network = Pretrained(recipe.size, recipe.seed).to(device)
        decayed = [p for p in self.network.parameters() if p.ndim > 1]
        others = [p for p in self.network.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": _DECAY}, {"params": others, "weight_decay": 0.0}], lr=recipe.lr)
        self.step = 0
        self.seconds = 0.0
        self.sums, self.count = torch.zeros(len(Progress._fields), device=device), 0  # since the last report

    def resume(self) -> None:
        """Goes back to where the folder's state was written, if there is one."""
        state = records.read_state(self.folder)
        if state is None:
            records.write_curve(self.folder, [])
            return
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.sums, self.count = state["sums"].to(self.device), state["count"]
        rows = records.read_curve(self.folder)
        records.write_curve(self.folder, [row for row in rows if int(row["step"]) <= self.step])

    def go(self, say: Callable[[str], None], minutes: float) -> bool:
        """Trains to the end, True, or until the time is over."""
        first, before, began = self.step, self.seconds, time.monotonic()
        every, saved = max(1, self.recipe.steps // _REPORTS), began
        while self.step < self.recipe.steps:
            self.sums, self.count = self.sums + torch.stack(self._train_step()).detach(), self.count + 1
            self.step += 1
            now = time.monotonic()
            self.seconds = before + now - began
            left = (now - began) / (self.step - first) * (self.recipe.steps - self.step) / 60
            if self.step - first == _FIRST_STEPS:
                say(f"{self.recipe.images:,} images, about {left:.0f} min left")
            is_report = self.step % every == 0 or self.step == self.recipe.steps
            if is_report:
                say(f"{self._report()}, {left:.0f} min left")
            is_over = now - began >= 60 * minutes and self.step < self.recipe.steps
            if is_over or is_report or now - saved > _SAVE_SECONDS:
                self._save()
                saved = now
            if is_over:
                return False
        return True

    def _train_step(self) -> Progress:
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * rate(self.step, recipe.steps)
        generated = generate(recipe.batch_size, self.size, self.device, recipe.seed, self.step)
        random = Randomness(self.device, recipe.seed + _PROMPTS, self.step)
        with autocast(self.device):
            progress = losses(self.network, generated, random, recipe)
        self.optimizer.zero_grad()
        progress.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), _CLIP)
        if not torch.isfinite(norm):  # nor is it where the loss is not
            raise RuntimeError(f"The gradient is not finite after {self.step} steps: give a new folder, and a lower "
                               f"--lr than {recipe.lr}.")
        self.optimizer.step()
        return progress

    def _report(self) -> str:
        means = dict(zip(Progress._fields, (self.sums / self.count).tolist(), strict=True))
        self.sums, self.count = self.sums * 0, 0
        images = self.step * self.recipe.batch_size
        row = {"step": self.step, "images": images, "seconds": round(self.seconds, 1),
               "lr": self.optimizer.param_groups[0]["lr"]} | means
        records.write_curve(self.folder, [*records.read_curve(self.folder), row])
        return (f"{images:,} images, loss {means['loss']:.3f}, regions {means['regions']:.3f}, "
                f"IoU {means['point_iou']:.3f} from a point, {means['box_iou']:.3f} from a box; "
                f"{images / self.seconds:.1f} images/s")

    def _save(self) -> None:
        records.write_state(self.folder, {
            "network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
            "seconds": self.seconds, "sums": self.sums, "count": self.count})


def rate(step: int, steps: int) -> float:
    """Share of the highest learning rate in a step, counted from 0."""
    warmup = max(1, steps // 100)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def unseen_iou(network: Pretrained, size: int, device: torch.device) -> tuple[float, float]:
    """Mean IoU of masks from a point and from a box, on generated images that no run is trained on."""
    ious = []
    for batch in range(_UNSEEN // _UNSEEN_BATCH):
        generated = generate(_UNSEEN_BATCH, size, device, _UNSEEN_SEED, batch)
        with autocast(device):
            neck = network.encode(generated.images).neck
            random = Randomness(device, _UNSEEN_SEED + 1, batch)
            judged = _judge_prompts(network, neck, generated.labels, random, _UNSEEN_PROMPTS)
        ious.append(torch.stack([judged.point_iou, judged.box_iou]))
    point, box = torch.stack(ious).mean(0).tolist()
    return point, box


def losses(network: Pretrained, generated: Generated, random: Randomness, recipe: Recipe) -> Progress:
    """Of one batch; `random` draws its prompts."""
    features = network.encode(generated.images)
    judged = _judge_prompts(network, features.neck, generated.labels, random, recipe.prompts)
    if recipe.regions == 0:
        return judged
    ref = describe_regions(generated.images, generated.labels)
    regions = judge_descriptions(network.describe(features), ref)
    return judged._replace(loss=judged.loss + recipe.regions * regions, regions=regions)


def _judge_prompts(network: Pretrained, neck: Tensor, labels: Tensor, random: Randomness, number: int) -> Progress:
    coarse = mask_labels(labels)
    points, boxes = (judge_answers(network.answer(neck, asked.prompts), asked)
                     for asked in (ask_points(random, coarse, number), ask_boxes(random, coarse, number)))
    loss = (points.loss + boxes.loss) / 2
    return Progress(loss, loss.new_zeros(()), points.iou, boxes.iou)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the device has it natively; else float32, for float16 would need its losses scaled."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=_has_bfloat16(device))


def _has_bfloat16(device: torch.device) -> bool:
    return encoder_dtype(device) == torch.bfloat16
