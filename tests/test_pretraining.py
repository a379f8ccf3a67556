"""Pretraining on generated images: the images, what is asked about them, and the run."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from desam_nnunet.augmentation.randomness import BATCHES, Randomness
from desam_nnunet.commands.__main__ import main
from desam_nnunet.encoders.registry import ENCODERS
from desam_nnunet.encoders.sam_vit import IMAGE, PIXEL_MEAN, PIXEL_STD
from desam_nnunet.encoders.weights import find_row, load_encoder
from desam_nnunet.networks.desam.network import build_desam
from desam_nnunet.networks.desam.prompters import GridPrompter
from desam_nnunet.networks.desam.section import DesamSection
from desam_nnunet.networks.frame import Outline
from desam_nnunet.pretraining import generator, records, regions, run, shapes
from desam_nnunet.pretraining.generator import generate
from desam_nnunet.pretraining.network import Pretrained
from desam_nnunet.pretraining.prompts import (
    Answers,
    Asked,
    ask_boxes,
    ask_points,
    intersection_over_union,
    judge_answers,
    mask_labels,
)
from desam_nnunet.pretraining.recipe import MAX_SEED, Recipe
from desam_nnunet.pretraining.regions import describe_regions, judge_descriptions
from desam_nnunet.sam.prompts import Prompts
from desam_nnunet.sam.tiles import TileToImage

CPU = torch.device("cpu")
TINY = ENCODERS["vit_tiny"].architecture
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


def test_images_use_the_whole_range(generated):
    assert generated.images.shape == (48, 1, 128, 128)
    assert torch.all(generated.images.amin((1, 2, 3)) == 0)
    assert torch.all(generated.images.amax((1, 2, 3)) == 255)


def test_labels_explain_the_images(generated):
    truth = describe_regions(generated.images, generated.labels)
    grey = torch.nn.functional.avg_pool2d(generated.images, 4)[:, 0] / 255
    within, total = (grey - truth[:, 7]).var((1, 2)), grey.var((1, 2))
    assert (within / total).median() < 0.5


def test_no_label_has_an_intensity_of_its_own_but_twins_look_alike():
    """Before the acquisition, which changes the levels of all labels together."""
    half = shapes.OBJECTS // 2
    labels = torch.tensor([2, shapes.GROUNDS, shapes.GROUNDS + half]).repeat_interleave(64)
    labels = labels.view(1, 1, -1).expand(200, 192, -1)  # three stripes
    picture = generator._intensities(random(), labels).view(200, 192, 3, 64).mean((1, 3))
    assert (picture[:, 1] - picture[:, 2]).abs().mean() < 0.02
    for stripe in (0, 1):  # as spread as numbers between 0 and 1
        assert picture[:, stripe].std() == pytest.approx(12**-0.5, abs=0.05)
    assert np.corrcoef(picture[:, 0], picture[:, 1])[0, 1] == pytest.approx(0, abs=0.2)


def test_every_label_is_drawn_and_twins_that_meet_are_one_object():
    """Else a border would be asked for that no image shows."""
    half = shapes.OBJECTS // 2
    labels = torch.cat([generate(128, 64, CPU, seed=5, batch=batch).labels for batch in range(4)])
    assert labels.unique().tolist() == list(range(shapes.LABELS))
    left, right = labels[:, :, :-1], labels[:, :, 1:]
    meeting = ((left - right).abs() == half) & (left.minimum(right) >= shapes.GROUNDS)
    assert meeting.sum() == 0


def test_points_lie_in_what_they_ask_for(generated):
    coarse = mask_labels(generated.labels)
    asked = ask_points(random(), coarse, 5)
    points = asked.prompts.points
    assert points.shape == (240, 1, 2)
    x, y = points[:, 0].round().long().unbind(1)
    assert torch.all(asked.masks[torch.arange(240), y // 4, x // 4])
    named = generated.labels[torch.arange(240) // 5, y, x]  # the label of the very pixel
    assert all(named[index] == coarse[index // 5][mask][0] for index, mask in enumerate(asked.masks))
    assert torch.all(asked.valid)
    for index, mask in enumerate(asked.masks):  # each a whole label of its own image
        assert len(coarse[index // 5][mask].unique()) == 1


def test_boxes_are_around_what_they_ask_for(generated):
    asked = ask_boxes(random(), mask_labels(generated.labels), 5)
    moved = []
    assert torch.all((asked.prompts.boxes >= 0) & (asked.prompts.boxes <= 128))
    for box, mask in zip(asked.prompts.boxes, asked.masks, strict=True):
        rows, columns = (torch.nonzero(mask.any(axis))[:, 0] for axis in (1, 0))
        exact = 4 * torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        lengths = (exact[2:] - exact[:2]).repeat(2)
        moved.append((box - exact).abs())
        assert torch.all(moved[-1] <= (0.1 * lengths).clamp(max=20 / 1024 * 128) + 1e-4)
    assert torch.stack(moved).mean() > 0.1


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
    focal = 2 * (20 + 20)  # weight times the entropy of a logit that is wrong by 20, in the object and in the rest
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


def test_a_run_ends_in_a_sam_file(finished):
    folder, said = finished
    weights = str(folder / records.WEIGHTS)
    sam = load_encoder(weights, 256)
    assert (find_row(weights).name, sam.trained) == ("vit_tiny", True)
    to_image = TileToImage(IMAGE, 256, "percentile")
    desam = build_desam(Outline(sam, to_image, 1, 2, True, DesamSection()), GridPrompter())
    start, trained = desam.prim.transformer.state_dict(), sam.mask_decoder.transformer.state_dict()
    assert all(torch.equal(start[key], trained[key]) for key in trained)
    assert not torch.equal(trained["norm_final_attn.weight"], torch.ones(TINY.prompt_dim))
    assert not (folder / records.STATE).exists()
    settings = json.loads((folder / records.SETTINGS).read_text())
    assert settings["recipe"]["images"] == 12
    assert 0 <= settings["unseen_iou_boxes"] <= 1
    assert settings["machine"]["torch"] == torch.__version__
    with safe_open(folder / records.WEIGHTS, "pt") as file:
        assert json.loads(file.metadata()["pretraining"])["recipe"]["seed"] == 0
    assert [row["images"] for row in _curve(folder)] == ["2", "4", "6", "8", "10", "12"]
    assert any("min left" in line for line in said)


def test_the_frozen_encoder_says_what_was_trained(finished):
    folder, _ = finished
    sam, network = load_encoder(str(folder / records.WEIGHTS), 256), Pretrained(TINY)
    with safe_open(folder / records.WEIGHTS, "pt") as file:
        network.sam.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    images = generate(1, 256, CPU, seed=4, batch=0).images
    mean, std = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    sam.encoder.dtype = torch.float32  # a CPU may have bfloat16
    frozen = sam.encoder((images - mean) / std)
    with torch.no_grad():
        for ours, theirs in zip(network.encode(images).tensors, frozen.tensors, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_run_that_was_put_down_ends_with_the_same_weights(finished, tmp_path):
    folder, _ = finished
    said = []
    torch.manual_seed(123)  # which must not matter
    assert run.pretrain(tmp_path, SHORT, CPU, said.append, minutes=0) is None
    assert "the same command goes on" in said[-1]
    assert (tmp_path / records.STATE).is_file()
    assert run.pretrain(tmp_path, SHORT, CPU, said.append, minutes=0) is None
    curve = tmp_path / records.CURVE
    lines = curve.read_text().splitlines()
    curve.write_text("\n".join([*lines, lines[-1].replace("2,4,", "3,6,", 1)]) + "\n")  # as if killed
    run.pretrain(tmp_path, SHORT, CPU, said.append)
    assert (tmp_path / records.WEIGHTS).read_bytes() == (folder / records.WEIGHTS).read_bytes()
    assert _curve(tmp_path) == _curve(folder)


@pytest.mark.slow
def test_a_row_of_the_curve_is_a_mean_over_steps_wherever_it_was_put_down(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_REPORTS", 2)
    for _ in range(5):
        assert run.pretrain(tmp_path, SHORT, CPU, lambda _: None, minutes=0) is None
    run.pretrain(tmp_path, SHORT, CPU, lambda _: None)
    fine, coarse = _curve(finished[0]), _curve(tmp_path)
    assert [row["images"] for row in coarse] == ["6", "12"]
    for index, row in enumerate(coarse):
        steps = [float(other["loss"]) for other in fine[3 * index: 3 * index + 3]]
        assert float(row["loss"]) == pytest.approx(np.mean(steps), rel=1e-5)


def _curve(folder: Path) -> list[dict[str, str]]:
    """Without what time it took."""
    with open(folder / records.CURVE, newline="") as stream:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(stream)]


def test_a_folder_holds_one_run(finished, capsys):
    folder, _ = finished
    before = (folder / records.SETTINGS).read_bytes()
    assert main(["pretrain", str(folder), "--images", "12", "--batch-size", "2", "--prompts", "1", "--lr", "0.01",
                 "-device", "cpu"]) == 1
    assert "holds a run with lr 0.001, not 0.01: give its settings, or another folder" in capsys.readouterr().err
    assert (folder / records.SETTINGS).read_bytes() == before
    assert main(["pretrain", str(folder), "--images", "12", "--batch-size", "2", "--prompts", "1",
                 "-device", "cpu"]) == 0
    assert "is there already" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [
    (["--images", "3"], "The number of images is 3, but must be at least the batch size"),
    (["--lr", "0"], "The learning rate is 0.0, but must be above 0 and at most 1"),
    (["--lr", "inf"], "The learning rate is inf, but must be above 0 and at most 1"),
    (["--regions", "inf"], "The weight of the regions is inf, but must be between 0 and 1000"),
    (["--prompts", "1000000000"], "The number of prompts is 1000000000, but must be between 1 and 256"),
    (["--batch-size", "1000000000"], "The batch size is 1000000000, but must be between 1 and 10000"),
    (["--seed", "1000"], "The seed is 1000, but must be between 0 and 999"),
    (["--encoder", "vit_x"], "The encoder is 'vit_x', but must be one of vit_b"),
    (["--minutes", "0"], "--minutes is 0.0, but must be a positive number"),
    (["--minutes", "nan"], "--minutes is nan, but must be a positive number"),
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


@pytest.mark.parametrize("content", ['{"batch_size": 2}', '{"recipe": 3}', "[]", "nothing"])
def test_other_folders_are_refused_and_left_alone(content, tmp_path):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ValueError, match="holds other things than a pretraining run: give a new folder"):
        run.pretrain(tmp_path, SHORT, CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]
    with pytest.raises(ValueError, match="settings.json is a file, but a run needs a folder: give another name"):
        run.pretrain(tmp_path / "settings.json", SHORT, CPU)
    assert (tmp_path / "settings.json").read_text() == content


def test_a_damaged_state_is_refused(tmp_path):
    assert run.pretrain(tmp_path, SHORT, CPU, lambda _: None, minutes=0) is None
    state = tmp_path / records.STATE
    state.write_bytes(state.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"state.pt can't be read \(\w+\): remove it, and the run begins anew"):
        run.pretrain(tmp_path, SHORT, CPU)


def test_a_gradient_that_is_not_finite_ends_the_run_and_spoils_nothing(tmp_path, monkeypatch):
    """The loss is finite, its gradient is not: the root's at 0."""
    assert run.pretrain(tmp_path, SHORT, CPU, lambda _: None, minutes=0) is None
    before = (tmp_path / records.STATE).read_bytes()

    def judge(*arguments):
        progress = losses(*arguments)
        return progress._replace(loss=(progress.loss - progress.loss.detach()).sqrt())

    losses = run.losses
    monkeypatch.setattr(run, "losses", judge)
    with pytest.raises(RuntimeError, match=r"not finite after 1 steps: give a new folder, and a lower --lr than 0.001"):
        run.pretrain(tmp_path, SHORT, CPU)
    assert (tmp_path / records.STATE).read_bytes() == before
    assert not (tmp_path / records.WEIGHTS).exists()


def test_the_help_names_the_recipes_own_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for field in fields(Recipe):
        flag = "--" + field.name.replace("_", "-")
        (default,) = re.findall(rf"{flag} {field.name.upper()} [^()]*\(default: (\S+)\)", said)
        assert type(field.default)(default) == field.default


def test_the_unseen_images_are_seen_by_no_seed():
    seeds = {seed + stream for seed in range(MAX_SEED + 1) for stream in (0, run._PROMPTS)}
    assert seeds.isdisjoint({run._UNSEEN_SEED, run._UNSEEN_SEED + 1})
    assert (run._UNSEEN_SEED + 2) * BATCHES <= 2**32


@pytest.mark.slow
def test_something_is_learnt(tmp_path):
    """A few hundred steps from random weights, a hundredth of a run: regions are described much better than at first,
    and masks are neither empty nor the whole image."""
    run.pretrain(tmp_path, Recipe(images=2400, batch_size=8, prompts=2), CPU, lambda _: None)
    rows = _curve(tmp_path)
    assert float(rows[-1]["regions"]) < float(rows[0]["regions"]) / 2
    settings = json.loads((tmp_path / records.SETTINGS).read_text())
    whole = []
    for batch in range(8):
        asked = ask_boxes(random(batch), mask_labels(generate(16, 256, CPU, run._UNSEEN_SEED, batch).labels), 4)
        whole.append(intersection_over_union(torch.ones_like(asked.masks), asked.masks).mean())
    assert settings["unseen_iou_boxes"] > torch.stack(whole).mean() + 0.03


@pytest.mark.gpu
def test_a_run_on_a_gpu_is_put_down_and_taken_up(tmp_path):
    device = torch.device("cuda")
    assert run.pretrain(tmp_path, SHORT, device, lambda _: None, minutes=0) is None
    path = run.pretrain(tmp_path, SHORT, device, lambda _: None)
    assert find_row(str(path)).name == "vit_tiny"
    load_encoder(str(path), 256)


def test_a_damaged_file_is_refused(finished, tmp_path):
    path = Path(tmp_path / "cut.safetensors")
    path.write_bytes((finished[0] / records.WEIGHTS).read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"cut.safetensors can't be read as weights .*truncated"):
        load_encoder(str(path), 256)
