"""What PRIM thinks of every point of the grid: where DeSAM finds the organ, and where it says that there is none.

Source: Gao et al., DeSAM, MICCAI 2024, section 2.2: the score of a prompt decides which mask is taken.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from desam_nnunet.cache.tiles import crop, tiles_of
from desam_nnunet.evaluation.pictures import outline, save
from desam_nnunet.networks.desam.network import DeSAM
from desam_nnunet.networks.desam.prompters import PointPrompter
from desam_nnunet.nnunet.labels import Classes
from desam_nnunet.nnunet.names import CHECKPOINT
from desam_nnunet.nnunet.sites import Case


class ScoreMap(NamedTuple):
    """PRIM's scores of the points that were asked in one tile, and what the prompter makes of them."""

    image: np.ndarray  # H W, preprocessed
    labels: np.ndarray  # H W, of the reference
    points: np.ndarray  # N 2, x and y in pixels of the tile
    scores: np.ndarray  # N K
    present: np.ndarray  # K, whether a class is found in the tile
    best: np.ndarray  # K, the point that decides
    slice: int  # of the volume before preprocessing, along the axis that nnU-Net cuts it along


@matplotlib.rc_context({"text.parse_math": False})
def draw_scores(model: Path, fold: str, case: Case, classes: Classes, path: Path) -> None:
    """Writes the maps of one case: a slice through the organ and, where there is one, a slice without it; nothing where
    the model's prompter does not choose among points.

    On the CPU, so that nothing is left on a GPU that the next job needs.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # the predictor talks
        predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), (fold,), CHECKPOINT)
    network = predictor.network.eval()
    if not (isinstance(network, DeSAM) and isinstance(network.prompter, PointPrompter)):
        return
    organs = [value for values in classes.values() for value in values]
    maps = score_maps(network, predictor, [str(image) for image in case.images], str(case.label), organs)
    figure = Figure(figsize=(3.6 * len(classes), 3.3 * len(maps)), layout="constrained")
    axes = figure.subplots(len(maps), len(classes), squeeze=False)
    for row, shown in zip(axes, maps, strict=True):
        for index, (axis, (name, values)) in enumerate(zip(row, classes.items(), strict=True)):
            outline(axis, np.isin(shown.labels, values), index)
            _draw(axis, shown, index, f"{case.name}, slice {shown.slice}, {name}")
    figure.colorbar(axes[0, 0].collections[-1], ax=axes, label="PRIM's score of the point", shrink=0.8)
    save(figure, path)


@torch.inference_mode()
def score_maps(
    network: DeSAM, predictor: nnUNetPredictor, images: list[str], label: str, organs: list[int]
) -> list[ScoreMap]:
    """The tile with most of the organs, by their label values, and the same place on a slice without them."""
    configuration: Any = predictor.configuration_manager
    preprocessor = configuration.preprocessor_class(verbose=False)
    data, seg, properties = preprocessor.run_case(
        images, label, predictor.plans_manager, configuration, predictor.dataset_json)
    patch_size = configuration.patch_size
    first = int(properties["bbox_used_for_cropping"][0][0])  # 2D configurations do not resample across slices
    area = np.isin(seg[0], organs).sum((1, 2))
    organ = int(area.argmax())
    tiles = [tile for tile in tiles_of(data.shape[1:], patch_size) if tile.slice == organ]
    tile = max(tiles, key=lambda tile: int(np.isin(crop(seg, tile, patch_size, -1), organs).sum()))
    free = np.flatnonzero(area == 0)
    maps = []
    for z in [organ, *free[len(free) // 2:][:1].tolist()]:  # and the middle one of those without, if there are any
        here = tile._replace(slice=z)
        image = torch.from_numpy(crop(data, here, patch_size, 0))[None].float()
        maps.append(_score_map(network, image, crop(seg, here, patch_size, -1)[0], z + first))
    return maps


def _score_map(network: DeSAM, image: torch.Tensor, labels: np.ndarray, number: int) -> ScoreMap:
    """Of an image (1, C, H, W), from the slice of this number before preprocessing."""
    geometry = network.geometry(image)
    scores = network.scores(network.with_neck(network.encode(image)), geometry)
    assert isinstance(network.prompter, PointPrompter)
    present, best = network.prompter.choose(scores)
    points = network.prompter.points(geometry, image.device)
    height, width = geometry.scaled
    scale = torch.tensor([geometry.tile[1] / width, geometry.tile[0] / height])
    places = (points[:, 0] + 0.5) * scale - 0.5
    return ScoreMap(image[0, 0].numpy(), labels, places.numpy(), scores.float().numpy(), present.numpy(), best.numpy(),
                    number)


def _draw(axis: Axes, shown: ScoreMap, index: int, title: str) -> None:
    scores, best = shown.scores[:, index], shown.best[index]
    x, y = shown.points.T
    axis.imshow(shown.image, cmap="gray")
    axis.scatter(x[best], y[best], s=90, facecolors="none", edgecolors="red", linewidths=1.5)
    axis.scatter(x, y, c=scores, cmap="viridis", vmin=0, vmax=1, s=16)
    verdict = "present" if shown.present[index] else "absent"
    axis.set_title(f"{title}\nbest score {scores.max():.2f}: {verdict}", fontsize=8)
    axis.set(xticks=[], yticks=[])
