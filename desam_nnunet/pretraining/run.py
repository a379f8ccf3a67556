"""A pretraining run: from random weights to a SAM file, resumable to the bit.

In the run's folder: ``settings.json`` (recipe, versions, machine, time, result), ``curve.csv``, ``weights.safetensors``
when it is done, and ``state.pt`` until then.
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from desam_nnunet import __version__
from desam_nnunet.files import replace_file
from desam_nnunet.machine import describe_machine
from desam_nnunet.pretraining.generator import Generated, generate
from desam_nnunet.pretraining.network import Pretrained
from desam_nnunet.pretraining.objective import judge_answers, judge_descriptions
from desam_nnunet.pretraining.prompts import ask_boxes, ask_points, mask_labels
from desam_nnunet.pretraining.randomness import Randomness
from desam_nnunet.pretraining.recipe import MAX_SEED, Recipe
from desam_nnunet.pretraining.regions import describe_regions
from desam_nnunet.sam.variants import VARIANTS

WEIGHTS, SETTINGS, CURVE, STATE = "weights.safetensors", "settings.json", "curve.csv", "state.pt"
_DECAY = 0.05
_CLIP = 1.0
_REPORTS = 100  # rows of the curve
_UNSEEN = 128  # images on which it is judged in the end
_PROMPTS_SEED = 500_009  # so that prompts and images are drawn from different streams


class Losses(NamedTuple):
    """Of one step; those of the regions 0 where they are left out."""

    loss: Tensor
    regions: Tensor
    point_iou: Tensor
    box_iou: Tensor


def pretrain(
    folder: Path, recipe: Recipe, device: torch.device, say: Callable[[str], None] = print,
    minutes: float = math.inf,
) -> Path | None:
    """Runs `recipe` to its end, or goes on with it.

    Args:
        minutes: After so many the run is put down, to be taken up again.

    Returns:
        The weights file; None where the time was over before.

    Raises:
        ValueError: The folder holds a run of another recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_same(folder, recipe)
    if (folder / WEIGHTS).is_file():
        say(f"{folder / WEIGHTS} is there already.")
        return folder / WEIGHTS
    run = _Run(folder, recipe, device)
    run.resume()
    _write_settings(folder, recipe, {})
    if not run.go(say, minutes):
        say(f"Put down after {run.step * recipe.batch_size:,} images: the same command goes on.")
        return None
    found = unseen_iou(run.network, recipe, device)
    _write_settings(folder, recipe, {
        "desam_nnunet": __version__, "machine": describe_machine(device), "seconds": round(run.seconds),
        "steps": run.step, "unseen_images": _UNSEEN, "unseen_iou_points": round(found[0], 4),
        "unseen_iou_boxes": round(found[1], 4), "starts_from": "random weights"})
    replace_file(folder / WEIGHTS, [save(run.network.weights(), {"recipe": json.dumps(asdict(recipe))})])
    (folder / STATE).unlink(missing_ok=True)
    say(f"IoU on unseen generated images: {found[0]:.3f} from a point, {found[1]:.3f} from a box.")
    return folder / WEIGHTS


class _Run:
    def __init__(self, folder: Path, recipe: Recipe, device: torch.device) -> None:
        self.folder = folder
        self.recipe = recipe
        self.device = device
        self.size = VARIANTS[recipe.encoder].image_size
        self.network = Pretrained(VARIANTS[recipe.encoder]).to(device)
        decayed = [p for p in self.network.parameters() if p.ndim > 1]
        others = [p for p in self.network.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": _DECAY}, {"params": others, "weight_decay": 0.0}], lr=recipe.lr)
        self.step = 0
        self.seconds = 0.0

    def resume(self) -> None:
        """Goes back to where the folder's state was written, if there is one."""
        path = self.folder / STATE
        if not path.is_file():
            (self.folder / CURVE).unlink(missing_ok=True)
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        rows = _read_curve(self.folder / CURVE)
        _write_curve(self.folder / CURVE, [row for row in rows if int(row["step"]) <= self.step])

    def go(self, say: Callable[[str], None], minutes: float) -> bool:
        """Trains to the end, True, or until the time is over."""
        began, before = time.monotonic(), self.seconds
        every = max(1, self.recipe.steps // _REPORTS)
        sums, count = torch.zeros(4, device=self.device), 0
        while self.step < self.recipe.steps:
            losses = self._train_step()
            sums, count = sums + torch.stack(losses).detach(), count + 1
            self.step += 1
            self.seconds = before + time.monotonic() - began
            if self.step % every == 0 or self.step == self.recipe.steps:
                self._report(say, (sums / count).tolist())
                sums, count = sums * 0, 0
                self._save()
                if self.seconds - before > 60 * minutes and self.step < self.recipe.steps:
                    return False
        return True

    def _train_step(self) -> Losses:
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * rate(self.step, recipe.steps)
        generated = generate(recipe.batch_size, self.size, self.device, recipe.seed, self.step)
        random = Randomness(self.device, recipe.seed + _PROMPTS_SEED, self.step)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            losses = _losses(self.network, generated, random, recipe)
        if not torch.isfinite(losses.loss):
            raise RuntimeError(f"The loss is not finite after {self.step} steps: lower the learning rate, {recipe.lr}.")
        self.optimizer.zero_grad()
        losses.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), _CLIP)
        self.optimizer.step()
        return losses

    def _report(self, say: Callable[[str], None], means: list[float]) -> None:
        loss, regions, points, boxes = means
        row = {"step": self.step, "images": self.step * self.recipe.batch_size, "seconds": round(self.seconds, 1),
               "lr": self.optimizer.param_groups[0]["lr"], "loss": loss, "regions": regions, "point_iou": points,
               "box_iou": boxes}
        _write_curve(self.folder / CURVE, [*_read_curve(self.folder / CURVE), row])
        left = self.seconds / self.step * (self.recipe.steps - self.step) / 60
        say(f"{row['images']:,} images, loss {loss:.3f}, regions {regions:.3f}, IoU {points:.3f} from a point, "
            f"{boxes:.3f} from a box; {row['images'] / self.seconds:.1f} images/s, {left:.0f} min left")

    def _save(self) -> None:
        buffer = io.BytesIO()
        torch.save({"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
                    "step": self.step, "seconds": self.seconds}, buffer)
        replace_file(self.folder / STATE, [buffer.getvalue()])


def rate(step: int, steps: int) -> float:
    """Share of the highest learning rate in a step, counted from 0."""
    warmup = max(1, steps // 100)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def unseen_iou(network: Pretrained, recipe: Recipe, device: torch.device) -> tuple[float, float]:
    """Mean IoU of masks from a point and from a box, on generated images that no run is trained on."""
    size, batches = VARIANTS[recipe.encoder].image_size, -(-_UNSEEN // recipe.batch_size)
    found = []
    for batch in range(batches):
        generated = generate(recipe.batch_size, size, device, MAX_SEED + 1, batch)
        losses = _losses(network, generated, Randomness(device, MAX_SEED + 2, batch), recipe)
        found.append(torch.stack([losses.point_iou, losses.box_iou]))
    point, box = torch.stack(found).mean(0).tolist()
    return point, box


def _losses(network: Pretrained, generated: Generated, random: Randomness, recipe: Recipe) -> Losses:
    features = network.encode(generated.images)
    coarse = mask_labels(generated.labels)
    judged = []
    for asked in (ask_points(random, coarse, recipe.prompts), ask_boxes(random, coarse, recipe.prompts)):
        judged.append(judge_answers(network.answer(features.neck, asked.prompts), asked))
    loss = (judged[0].loss + judged[1].loss) / 2
    regions = loss.new_zeros(())
    if recipe.regions > 0:
        truth = describe_regions(generated.images, generated.labels)
        regions = judge_descriptions(network.describe(features), truth)
        loss = loss + recipe.regions * regions
    return Losses(loss, regions, judged[0].iou, judged[1].iou)


def _check_same(folder: Path, recipe: Recipe) -> None:
    path = folder / SETTINGS
    if not path.is_file():
        return
    there = json.loads(path.read_text())["recipe"]
    differs = [f"{key} {there.get(key)!r}, not {value!r}" for key, value in asdict(recipe).items()
               if there.get(key) != value]
    if differs:
        raise ValueError(f"{folder} holds a run with {', '.join(differs)}: give its settings, or another folder.")


def _write_settings(folder: Path, recipe: Recipe, result: dict[str, Any]) -> None:
    text = json.dumps({"recipe": asdict(recipe)} | result, indent=2) + "\n"
    replace_file(folder / SETTINGS, [text.encode()])


def _read_curve(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def _write_curve(path: Path, rows: list[dict[str, Any]]) -> None:
    if not rows:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, [text.getvalue().encode()])
