"""Whether drawing images keeps up with training on them."""

from __future__ import annotations

from itertools import count

import torch

from desam_nnunet.augmentation.randomness import Randomness
from desam_nnunet.pretraining.generator import Generated, generate
from desam_nnunet.pretraining.network import Pretrained
from desam_nnunet.pretraining.recipe import Recipe
from desam_nnunet.pretraining.run import autocast, losses
from measure import Report, compare

BATCHES = 4  # images differ in what they cost


def run(device: torch.device, repeats: int) -> Report:
    size = Recipe().size
    report = Report("pretraining", "Drawing images for pretraining", (
        f"vit_tiny at {size.tables}, {BATCHES} batches of new images. Reference: forward and backward of their "
        "losses, prompts' included, on images that are there. Ours: drawing the images. A training step does one after "
        "the other."), device)
    network = Pretrained(size).to(device)
    number = count()
    for recipe in (Recipe(batch_size=8, prompts=2), Recipe()):
        def draw(recipe: Recipe = recipe) -> None:
            for _ in range(BATCHES):
                generate(recipe.batch_size, size.tables, device, recipe.seed, next(number))

        images = [generate(recipe.batch_size, size.tables, device, recipe.seed, next(number))
                  for _ in range(BATCHES)]

        def train(recipe: Recipe = recipe, images: list[Generated] = images) -> None:
            for generated in images:
                network.zero_grad()
                with autocast(device):
                    progress = losses(network, generated, Randomness(device, recipe.seed, next(number)), recipe)
                progress.loss.backward()

        draw()
        train()
        row = compare(f"batch {recipe.batch_size}, {recipe.prompts} points and boxes an image", train, draw,
                      device=device, repeats=repeats, required=1.0)
        row.notes = {"images/s, drawn": f"{BATCHES * recipe.batch_size / row.ours:.0f}",
                     "drawn and trained on": f"{BATCHES * recipe.batch_size / (row.reference + row.ours):.1f}"}
        report.add("Training on images against drawing them", row)
    return report
