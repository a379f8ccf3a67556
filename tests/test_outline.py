"""What training says of the weights that a model's plans name."""

from __future__ import annotations

import pytest
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from desam_nnunet.encoders.random_weights import RANDOM_IDENTITY
from desam_nnunet.encoders.registry import VARIANTS
from desam_nnunet.settings.sections import SamSection
from desam_nnunet.training.loading import sam_from_plans

PACKAGED = f"md5:{VARIANTS['vit_tiny'].md5}"


@pytest.mark.parametrize(("encoder", "identity", "words"), [
    ("vit_tiny", PACKAGED, "Encoder vit_tiny: pretrained on generated images, not SAM's own weights.\n"),
    ("vit_tiny", RANDOM_IDENTITY, "Encoder vit_tiny: RANDOM weights"),
    ("vit_tiny_random", RANDOM_IDENTITY, "Encoder vit_tiny_random: RANDOM weights"),
])
def test_weights_that_are_not_sams_are_called_what_they_are(
    encoder: str, identity: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    section = {"encoder": encoder, "identity": identity, "image_size": 128, "intensity": "unit", "regions": False}
    configuration = ConfigurationManager({"architecture": {}, "sam": section})
    planned = sam_from_plans(PlansManager({}), configuration, 1)
    assert planned.section == SamSection(**section)
    assert planned.sam.encoder.identity == identity
    assert capsys.readouterr().out.startswith(words)
