"""What a network is built from, and what training says of the weights that a model's plans name."""

from __future__ import annotations

import pytest
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from desam_nnunet.encoders.random_weights import RANDOM_IDENTITY
from desam_nnunet.encoders.registry import ENCODERS
from desam_nnunet.networks.desam.section import DESAM, DesamSection
from desam_nnunet.sam.tiles import TileToImage
from desam_nnunet.settings.resolve import read_sam
from desam_nnunet.settings.sections import SamSection
from desam_nnunet.training.base import outline_from_plans
from desam_nnunet.training.samed import SAMedTrainer

PACKAGED = f"md5:{ENCODERS['vit_tiny'].md5}"


@pytest.mark.parametrize(("encoder", "identity", "words"), [
    ("vit_tiny", PACKAGED, "Encoder vit_tiny: pretrained on generated images, not SAM's own weights.\n"),
    ("vit_tiny", RANDOM_IDENTITY, "Encoder vit_tiny: RANDOM weights"),
    ("vit_tiny_random", RANDOM_IDENTITY, "Encoder vit_tiny_random: RANDOM weights"),
])
def test_weights_that_are_not_sams_are_called_what_they_are(
    encoder: str, identity: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    section = {"encoder": encoder, "identity": identity, "image_size": 128, "intensity": "unit", "regions": False}
    configuration = ConfigurationManager({"architecture": {}, "patch_size": [96, 96], "sam": section})
    assert read_sam(configuration.configuration) == SamSection(**section)
    outline = outline_from_plans(PlansManager({}), configuration, 1, 3, DESAM, SAMedTrainer.image_of)
    assert outline.loaded.encoder.identity == identity
    image = SAMedTrainer.image_of(outline.loaded.encoder.spec.image)
    assert outline.to_image.settings == TileToImage(image, 128, "unit").settings
    assert (outline.num_channels, outline.num_outputs, outline.background, outline.num_classes) == (1, 3, True, 2)
    assert outline.section == DesamSection(grid_offset=-0.5)  # plans of a model from before the key existed
    assert capsys.readouterr().out.startswith(words)
