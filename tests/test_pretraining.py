"""Pretraining on generated images: the images, what is asked about them, and the run."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from desam_nnunet.cli import main
from desam_nnunet.pretraining import regions, run, shapes
from desam_nnunet.pretraining.generator import generate
from desam_nnunet.pretraining.network import Answers, Pretrained
from desam_nnunet.pretraining.objective import judge_answers, judge_descriptions
from desam_nnunet.pretraining.prompts import Asked, ask_boxes, ask_points, mask_labels
from desam_nnunet.pretraining.randomness import Randomness
from desam_nnunet.pretraining.recipe import Recipe
from desam_nnunet.pretraining.regions import describe_regions
from desam_nnunet.sam.prompts import Prompts
from desam_nnunet.sam.variants import PIXEL_MEAN, PIXEL_STD, VARIANTS
from desam_nnunet.sam.weights import load_sam

CPU = torch.device("cpu")
TINY = VARIANTS["vit_tiny"]
SHORT = Recipe(images=12, batch_size=2, prompts=1)  # six steps


@pytest.fixture(scope="module")
def generated():
    return generate(48, 128, CPU, seed=3, batch=0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from start to end without a stop, and what it said."""
    folder, said = tmp_path_factory.mktemp("finished"), []
    run.pretrain(folder, SHORT, CPU, said.append)
    return folder, said


def random(batch=0):
    return Randomness(CPU, seed=1, batch=batch)


def test_the_same_arguments_draw_the_same_images_and_others_do_not():
    first, again, other = (generate(2, 64, CPU, seed=3, batch=batch) for batch in (5, 5, 6))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.labels, other.labels)


def test_images_use_the_whole_range_and_every_kind_of_label(generated):
    assert generated.images.shape == (48, 1, 128, 128)
    assert torch.all(generated.images.amin((1, 2, 3)) == 0)
    assert torch.all(generated.images.amax((1, 2, 3)) == 255)
    assert set(generated.labels.unique().tolist()) == set(range(shapes.LABELS))


def test_labels_explain_the_images_but_no_label_has_an_intensity_of_its_own(generated):
    """Regions are what the images are made of; across images a label's grey values are as spread as any."""
    truth = describe_regions(generated.images, generated.labels)
    grey = torch.nn.functional.avg_pool2d(generated.images, 4)[:, 0] / 255
    within, total = (grey - truth[:, 7]).var((1, 2)), grey.var((1, 2))
    assert (within / total).median() < 0.5
    tissue = [grey[i][mask_labels(generated.labels)[i] == 2].mean() for i in range(48)]
    levels = torch.stack([level for level in tissue if not level.isnan()])
    assert levels.std() > 0.15


def test_points_lie_in_what_they_ask_for(generated):
    coarse = mask_labels(generated.labels)
    asked = ask_points(random(), coarse, 5)
    points, (side,) = asked.prompts.points, {coarse.shape[-1]}
    assert points.shape == (240, 1, 2)
    x, y = ((points[:, 0] + 0.5) / 4).floor().long().clamp(0, side - 1).unbind(1)
    assert torch.all(asked.masks[torch.arange(240), y, x])
    assert torch.all(asked.valid)
    for index, mask in enumerate(asked.masks):  # each a whole label of its own image
        assert len(coarse[index // 5][mask].unique()) == 1


def test_boxes_are_around_what_they_ask_for(generated):
    asked = ask_boxes(random(), mask_labels(generated.labels), 5)
    for box, mask in zip(asked.prompts.boxes, asked.masks, strict=True):
        rows, columns = (torch.nonzero(mask.any(axis))[:, 0] for axis in (1, 0))
        exact = 4 * torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        lengths = (exact[2:] - exact[:2]).repeat(2)
        assert torch.all((box - exact).abs() <= (0.1 * lengths).clamp(max=20 / 1024 * 128) + 1e-4)


def test_nothing_is_asked_of_an_image_of_air():
    coarse = torch.zeros(2, 32, 32, dtype=torch.long)
    coarse[1, 4:12, 4:12] = 7
    assert ask_points(random(), coarse, 2).valid.tolist() == [False, False, True, True]
    assert ask_boxes(random(), coarse, 2).valid.tolist() == [False, False, True, True]


def test_regions_are_described_as_computed_by_hand():
    labels = torch.full((1, 64, 64), 3)
    labels[:, 16:32, 0:32] = 9  # 4 by 8 of 16 by 16 mask pixels
    images = torch.where(labels == 9, 204.0, 51.0)[:, None]
    told = describe_regions(images, labels)[0, :, 5, 2]  # the pixel in row 5 (y = -0.3125), column 2 (x = -0.6875)
    centre_y, centre_x = -0.25, -0.5
    extents = [np.sqrt((side**2 - 1) / 12) / 8 for side in (4, 8)]
    expected = [0, centre_y + 0.3125, centre_x + 0.6875, np.sqrt(32 / 256), *extents, 0, 0.8, 0.001]
    np.testing.assert_allclose(told, expected, atol=1e-3)
    border = describe_regions(images, labels)[0, 0]
    assert border.sum() == 18 + 20  # the rim of 4 by 8 but for the left end, which is the image's; and around it
    assert set(border.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("kind", ["points", "boxes"])
def test_prompts_are_answered_as_by_sams_own_decoder(kind):
    network = Pretrained(TINY).eval()
    neck = torch.randn(2, TINY.prompt_dim, 16, 16)
    given = torch.tensor([[[30.0, 40.0]], [[200.0, 9.0]], [[0.0, 99.0]], [[128.0, 128.0]]])
    boxes = torch.cat([given[:, 0], given[:, 0] + 50], dim=1)
    prompts = Prompts(points=given) if kind == "points" else Prompts(boxes=boxes)
    sam = network.sam
    with torch.no_grad():
        answers = network.answer(neck, prompts)
        for image in (0, 1):
            own = slice(2 * image, 2 * image + 2)
            points = (given[own], torch.ones(2, 1)) if kind == "points" else None
            sparse, dense = sam.prompt_encoder(points=points, masks=None,
                                               boxes=boxes[own] if kind == "boxes" else None)
            masks, iou = sam.mask_decoder(
                image_embeddings=neck[image: image + 1], image_pe=sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=False)
            torch.testing.assert_close(answers.masks[own], masks[:, 0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(answers.iou[own], iou[:, 0], atol=1e-4, rtol=1e-4)


def test_the_objective_rewards_the_truth_and_counts_only_what_was_asked():
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[:, 4:8, 4:8] = True
    logits = torch.where(masks, 20.0, -20.0)
    logits[1] = -logits[1]  # wrong everywhere, but nothing was asked
    asked = Asked(Prompts(), masks, torch.tensor([True, False]))
    judged = judge_answers(Answers(logits, torch.tensor([1.0, 5.0])), asked)
    assert judged.loss < 1e-6
    assert judged.iou == 1
    asked = Asked(Prompts(), masks, torch.tensor([False, True]))
    judged = judge_answers(Answers(logits, torch.tensor([1.0, 0.5])), asked)
    focal = 20 * (0.25 * 16 + 0.75 * 240) / 256 * 20  # weight · balance · entropy of a logit that is wrong by 20
    assert judged.loss == pytest.approx(focal + 1 - 1 / 257 + 0.25, rel=1e-4)
    assert judged.iou == 0


def test_descriptions_are_judged_by_each_output():
    truth = torch.zeros(1, regions.CHANNELS, 4, 4)
    right = truth.clone()
    right[:, 0] = -30
    wrong = right.clone()
    wrong[:, 1] = 1.05  # in one of eight quantities
    assert judge_descriptions([right, right], truth) < 1e-6
    assert judge_descriptions([right, wrong], truth) == pytest.approx((1.05 - 0.05) / 2, rel=1e-4)


def test_a_run_ends_in_a_file_that_every_trainer_can_use(finished):
    folder, said = finished
    sam = load_sam(str(folder / run.WEIGHTS), 256)
    assert (sam.variant.name, sam.random) == ("vit_tiny", False)
    assert not (folder / run.STATE).exists()
    settings = json.loads((folder / run.SETTINGS).read_text())
    assert settings["recipe"]["images"] == 12
    assert 0 <= settings["unseen_iou_boxes"] <= 1
    assert settings["machine"]["torch"] == torch.__version__
    with safe_open(folder / run.WEIGHTS, "pt") as file:
        assert json.loads(file.metadata()["recipe"])["seed"] == 0
    with open(folder / run.CURVE, newline="") as stream:
        assert [int(row["images"]) for row in csv.DictReader(stream)] == [2, 4, 6, 8, 10, 12]
    assert any("min left" in line for line in said)


def test_the_frozen_encoder_says_what_was_trained(finished):
    folder, _ = finished
    sam, network = load_sam(str(folder / run.WEIGHTS), 256), Pretrained(TINY)
    with safe_open(folder / run.WEIGHTS, "pt") as file:
        network.sam.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    images = generate(1, 256, CPU, seed=4, batch=0).images
    mean, std = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    frozen = sam.encoder((images - mean) / std)
    with torch.no_grad():
        for ours, theirs in zip(network.encode(images).tensors, frozen.tensors, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_run_that_was_put_down_ends_with_the_same_weights(finished, tmp_path):
    folder, _ = finished
    said = []
    assert run.pretrain(tmp_path, SHORT, CPU, said.append, minutes=0) is None
    assert "the same command goes on" in said[-1]
    assert (tmp_path / run.STATE).is_file()
    run.pretrain(tmp_path, SHORT, CPU, said.append)
    assert (tmp_path / run.WEIGHTS).read_bytes() == (folder / run.WEIGHTS).read_bytes()
    assert len((tmp_path / run.CURVE).read_text().splitlines()) == 1 + 6


def test_a_folder_holds_one_run(finished, capsys):
    folder, _ = finished
    before = (folder / run.SETTINGS).read_bytes()
    assert main(["pretrain", str(folder), "--images", "12", "--batch-size", "2", "--prompts", "1", "--lr", "0.01",
                 "-device", "cpu"]) == 1
    assert "holds a run with lr 0.001, not 0.01: give its settings, or another folder" in capsys.readouterr().err
    assert (folder / run.SETTINGS).read_bytes() == before
    assert main(["pretrain", str(folder), "--images", "12", "--batch-size", "2", "--prompts", "1",
                 "-device", "cpu"]) == 0
    assert "is there already" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [
    (["--images", "3"], "The number of images is 3, but must be at least the batch size"),
    (["--lr", "0"], "The learning rate is 0.0, but must be a positive number"),
    (["--seed", "-1"], "The seed is -1, but must be between 0 and 999999"),
    (["--encoder", "vit_x"], "The encoder is 'vit_x', but must be one of vit_b"),
])
def test_a_wrong_recipe_is_refused_before_anything_is_written(words, message, tmp_path, capsys):
    assert main(["pretrain", str(tmp_path / "run"), *words, "-device", "cpu"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_rate_rises_and_falls():
    rates = [run.rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1
    assert rates[-1] < 1e-4
    assert np.all(np.diff(rates[10:]) < 0)


@pytest.mark.slow
def test_masks_are_learnt(tmp_path):
    """A few hundred steps from random weights: boxes say more than chance of what is in them."""
    run.pretrain(tmp_path, Recipe(images=1600, batch_size=8, prompts=2), CPU, lambda _: None)
    settings = json.loads((tmp_path / run.SETTINGS).read_text())
    assert settings["unseen_iou_boxes"] > 0.4


def test_a_damaged_file_is_refused(finished, tmp_path):
    path = Path(tmp_path / "cut.safetensors")
    path.write_bytes((finished[0] / run.WEIGHTS).read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"cut.safetensors can't be read as weights .*truncated"):
        load_sam(str(path), 256)
