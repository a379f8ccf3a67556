"""The plans' sections ``sam`` and ``desam``: parsed, checked and resolved once, before anything else happens.

Everything that we choose and that changes a result stands in these sections of the 2D configuration, and so
in the ``plans.json`` of the model folder.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, TypeVar, get_type_hints

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from desam_nnunet.cache.store import DTYPES
from desam_nnunet.sam.tiles import INTENSITY_RULES, intensity_rule
from desam_nnunet.sam.variants import PATCH, VARIANTS
from desam_nnunet.sam.weights import check_identity, identify

FEATURES = ("online", "cached")
MAX_BATCH_SIZE = 8  # the published batch size; stock plans may ask for many more
DEFAULT_ENCODER = "vit_b"


@dataclass(frozen=True)
class SamSection:
    """What all trainers of this package share.

    Attributes:
        encoder: ``vit_b``, ``vit_l``, ``vit_h``, ``vit_tiny`` (random weights), or the path of a weights file.
        identity: Names the encoder's weights: ``md5:`` and the file's hash, or generator and seed. Resuming and
            predicting with other weights is refused.
        image_size: Side of SAM's input in pixels, a multiple of 16, at least 64. A tile's longer side is scaled to it.
        intensity: How a tile becomes 0 to 255: ``percentile``, ``window`` or ``unit``.
        regions: Whether the data set trains regions, which have no background output.
        features: ``cached``: every tile is encoded once, before training, and read from disk; ``online``: augmented
            tiles are encoded as they come.
        views: Versions of each cached tile, the first as it is, the others augmented once as nnU-Net augments.
        cache_dtype: ``float16`` or ``int8``, of the cache on disk.
        epochs: Of training; the learning rate decays to zero over them.
        iterations_per_epoch: Training steps of an epoch.
        val_iterations_per_epoch: Validation steps of an epoch.
    """

    encoder: str = field(metadata={"default": f"`{DEFAULT_ENCODER}`"})
    identity: str = field(metadata={"default": "filled in"})
    image_size: int = field(metadata={"default": "the variant's own: 1024, of `vit_tiny` 256"})
    intensity: str = field(metadata={"default": "from nnU-Net's normalisation"})
    regions: bool = field(metadata={"default": "filled in"})
    features: str = "cached"
    views: int = 1
    cache_dtype: str = "float16"
    epochs: int = 50
    iterations_per_epoch: int = 250
    val_iterations_per_epoch: int = 50

    def __post_init__(self) -> None:
        _require(self.image_size >= 4 * PATCH and self.image_size % PATCH == 0,
                 "sam.image_size", self.image_size, f"a multiple of {PATCH}, at least {4 * PATCH}")
        _require(self.intensity in INTENSITY_RULES, "sam.intensity", self.intensity, " or ".join(INTENSITY_RULES))
        _require(self.features in FEATURES, "sam.features", self.features, " or ".join(FEATURES))
        _require(self.cache_dtype in DTYPES, "sam.cache_dtype", self.cache_dtype, " or ".join(DTYPES))
        for name in ("views", "epochs", "iterations_per_epoch", "val_iterations_per_epoch"):
            _require(getattr(self, name) > 0, f"sam.{name}", getattr(self, name), "a positive number")


@dataclass(frozen=True)
class DesamSection:
    """DeSAM's own settings.

    Attributes:
        grid: Points per side of the prompt grid at prediction, 1 to 64.
        iou_threshold: A class whose best score is not above it is absent from the tile; 0 to 1.
        lr: Adam's initial learning rate, decayed polynomially (0.9).
    """

    grid: int = 9
    iou_threshold: float = 0.5
    lr: float = 1e-4

    def __post_init__(self) -> None:
        _require(1 <= self.grid <= 64, "desam.grid", self.grid, "between 1 and 64")
        _require(0 <= self.iou_threshold <= 1, "desam.iou_threshold", self.iou_threshold, "between 0 and 1")
        _require(self.lr > 0, "desam.lr", self.lr, "a positive number")


Section = TypeVar("Section", SamSection, DesamSection)


SECTIONS: dict[str, type] = {"sam": SamSection, "desam": DesamSection}


def check_keys(name: str, kind: type, given: dict[str, Any]) -> None:
    """Checks the names and types of the keys that are given.

    Raises:
        ValueError: An unknown or ill-typed key; the message lists the valid ones.
    """
    hints = get_type_hints(kind)
    valid = ", ".join(f"{key} ({hints[key].__name__})" for key in hints)
    for key, value in given.items():
        if key not in hints:
            raise ValueError(f"The plans' section '{name}' has an unknown key '{key}'. Valid keys: {valid}.")
        if not _has_type(value, hints[key]):
            raise ValueError(
                f"The plans' key {name}.{key} is {value!r}, but must be of type {hints[key].__name__}. "
                f"Valid keys: {valid}."
            )


def parse_section(name: str, kind: type[Section], given: dict[str, Any]) -> Section:
    """Checks every key and type of a fully resolved section.

    Raises:
        ValueError: An unknown, missing or ill-typed key; the message lists the valid ones.
    """
    check_keys(name, kind, given)
    missing = [row.name for row in fields(kind) if row.default is MISSING and row.name not in given]
    if missing:
        raise ValueError(
            f"The plans' section '{name}' lacks {', '.join(missing)}: these plans were not resolved by training "
            "with this package."
        )
    return kind(**given)


def read_sections(configuration: dict[str, Any]) -> tuple[SamSection, DesamSection]:
    """The resolved sections of a model's configuration."""
    return (
        parse_section("sam", SamSection, _section(configuration, "sam")),
        parse_section("desam", DesamSection, _section(configuration, "desam")),
    )


def resolve_plans(
    plans: dict[str, Any],
    configuration_name: str,
    dataset_json: dict[str, Any],
    default_encoder: str = DEFAULT_ENCODER,
) -> None:
    """Fills our sections of one configuration with everything that is not given, and writes them into `plans`.

    On stock plans (no section ``sam``) the batch size is lowered to at most 8 as well.

    Args:
        plans: nnU-Net's plans, changed in place.
        default_encoder: For plans that name none.

    Raises:
        ValueError: A 3D configuration, or a section that is not valid.
        FileNotFoundError: The encoder's weights are not on this machine.
    """
    manager = PlansManager(plans)
    configuration = manager.get_configuration(configuration_name).configuration
    _refuse_3d(manager, configuration_name)
    own = plans["configurations"][configuration_name]
    if "sam" not in configuration:
        own["batch_size"] = min(configuration["batch_size"], MAX_BATCH_SIZE)
    regions = manager.get_label_manager(dataset_json).has_regions
    schemes = configuration["normalization_schemes"]
    given = {"encoder": default_encoder} | _section(configuration, "sam")
    sam = _resolve_sam(given, schemes, regions)
    own["sam"] = asdict(sam)
    own["desam"] = asdict(parse_section("desam", DesamSection, _section(configuration, "desam")))


def _resolve_sam(given: dict[str, Any], normalization_schemes: list[str], regions: bool) -> SamSection:
    known = VARIANTS.get(given["encoder"]) if isinstance(given["encoder"], str) else None
    defaults = {
        "identity": "",
        "image_size": known.image_size if known else VARIANTS[DEFAULT_ENCODER].image_size,
        "intensity": intensity_rule(normalization_schemes),
        "regions": regions,
    }
    section = parse_section("sam", SamSection, defaults | given)
    if section.intensity == "window" and intensity_rule(normalization_schemes) != "window":
        raise ValueError(
            f"sam.intensity is 'window', which needs CTNormalization in every channel, but the plans have "
            f"{', '.join(normalization_schemes)}: use 'percentile'."
        )
    if section.regions != regions:
        raise ValueError(f"sam.regions is {section.regions}, but the data set's labels say {regions}: leave it out.")
    identity = identify(section.encoder, section.identity)
    if section.identity:
        check_identity(section.encoder, identity, section.identity)
    return parse_section("sam", SamSection, asdict(section) | {"identity": identity})


def _refuse_3d(manager: PlansManager, name: str) -> None:
    if len(manager.get_configuration(name).patch_size) == 2:
        return
    flat = [other for other in manager.available_configurations
            if len(manager.get_configuration(other).patch_size) == 2]
    raise ValueError(
        f"The configuration '{name}' is 3D, but SAM works on slices: use "
        f"{' or '.join(flat) or 'a 2D configuration (the plans have none)'}."
    )


def _section(configuration: dict[str, Any], name: str) -> dict[str, Any]:
    section = configuration.get(name, {})
    if not isinstance(section, dict):
        raise ValueError(f"The plans' section '{name}' is {section!r}, but must be an object with keys.")
    return section


def _has_type(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _require(holds: bool, key: str, value: Any, expected: str) -> None:
    if not holds:
        raise ValueError(f"The plans' key {key} is {value!r}, but must be {expected}.")
