"""The plans' sections parsed, checked and resolved once, before anything else happens.

Everything that we choose and that changes a result stands in these sections of the 2D configuration, and so
in the ``plans.json`` of the model folder.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields, replace
from typing import Any, TypeVar, get_type_hints

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from desam_nnunet.encoders.base import MIN_IMAGE_SIZE, Architecture
from desam_nnunet.encoders.registry import ENCODERS, row_by_name
from desam_nnunet.encoders.sam_vit import SamViT
from desam_nnunet.encoders.weights import check_identity, find_row, identify
from desam_nnunet.nnunet.description import check_labels
from desam_nnunet.sam.slabs import depth_of
from desam_nnunet.sam.tiles import intensity_rule
from desam_nnunet.settings.sections import AS_BEFORE, AUGMENTATIONS, DEFAULT_ENCODER, Method, SamSection
from desam_nnunet.settings.stock import check_lines, check_stock_keys, check_stock_plans
from desam_nnunet.settings.unread import refuse_unread_sections
from desam_nnunet.system.files import told

SAM = Method("sam", SamSection, "")
_TYPES = (int, float, str, bool)
Section = TypeVar("Section")


def check_keys(name: str, kind: type, given: dict[str, Any]) -> None:
    """Checks the names and types of the keys that are given.

    Raises:
        ValueError: An unknown or ill-typed key, with the valid ones; a field that no plans can give.
    """
    types = _key_types(name, kind)
    valid = ", ".join(f"{key} ({hint.__name__})" for key, hint in types.items())
    for key, value in given.items():
        if key not in types:
            raise ValueError(f"The plans' section '{name}' has an unknown key {key!r}. Valid keys: {valid}.")
        if not _has_type(value, types[key]):
            raise ValueError(f"The plans' key {name}.{key} is {value!r}, but must be of type {types[key].__name__}. "
                             f"Valid keys: {valid}.")


def _key_types(name: str, kind: type) -> dict[str, type]:
    hints = get_type_hints(kind)
    for row in fields(kind):
        has_factory = row.default_factory is not MISSING
        if hints[row.name] not in _TYPES or has_factory:
            made = " with a default_factory" if has_factory else ""
            raise ValueError(f"The section '{name}' ({kind.__name__}) has a field '{row.name}' of type {row.type}"
                             f"{made}, but plans hold int, float, str and bool alone, and a default must be a value.")
    return {row.name: hints[row.name] for row in fields(kind)}


def parse_section(name: str, kind: type[Section], given: dict[str, Any]) -> Section:
    """Checks every key and type of a section that is complete but for defaults.

    Raises:
        ValueError: As :func:`check_keys`, or a key is missing.
    """
    check_keys(name, kind, given)
    missing = [row.name for row in fields(kind)  # type: ignore[arg-type]
               if row.default is MISSING and row.name not in given]
    if missing:
        raise ValueError(f"The plans' section '{name}' lacks {', '.join(missing)}: these plans were not resolved by "
                         "training with this package.")
    return kind(**given)


def read_sam(configuration: dict[str, Any]) -> SamSection:
    """The shared section of a model's configuration."""
    return read_own(configuration, SAM)


def read_own(configuration: dict[str, Any], method: Method) -> Any:
    """The method's section of a model's configuration, of the method's own type."""
    return parse_section(method.name, method.section, as_trained(configuration, method))


def as_trained(configuration: dict[str, Any], method: Method) -> dict[str, Any]:
    """A section of a trained model: keys that did not exist yet mean what happened before they did."""
    return _before(method) | given_section(configuration, method.name)


def _before(method: Method) -> dict[str, Any]:
    return {row.name: row.metadata[AS_BEFORE] for row in fields(method.section) if AS_BEFORE in row.metadata}


def resolve_plans(
    plans: dict[str, Any], configuration_name: str, dataset_json: dict[str, Any], method: Method,
    default_encoder: str = DEFAULT_ENCODER, trained: dict[str, Any] | None = None,
) -> None:
    """Fills the sections ``sam`` and the method's of one configuration with everything that is not given.

    On stock plans (no section ``sam``) the batch size is lowered as well, to the method's.

    Args:
        plans: nnU-Net's plans, changed in place.
        default_encoder: For plans that name none.
        trained: The plans of a model that these go on with: what they leave open of the keys that are younger than that
            model is as in the model.

    Raises:
        ValueError: A 3D configuration, a section that is not valid or that nothing would read, or an encoder that the
            method can't work on.
        FileNotFoundError: The encoder's weights are not on this machine.
    """
    check_stock_plans(plans, configuration_name)
    manager = PlansManager(plans)
    configuration = manager.get_configuration(configuration_name).configuration
    refuse_unread_sections(plans, configuration, configuration_name, method)
    check_lines(plans["configurations"], plans["configurations"])
    check_stock_keys(configuration, configuration_name)
    check_labels(dataset_json)
    _refuse_3d(manager, configuration_name, method)
    own = plans["configurations"][configuration_name]
    if "sam" not in configuration:
        own["batch_size"] = min(configuration["batch_size"], method.batch_size)
    regions = manager.get_label_manager(dataset_json).has_regions
    schemes = configuration["normalization_schemes"]
    model = trained["configurations"][configuration_name] if trained else None
    given = {"encoder": default_encoder} | _given_or_trained(configuration, model, SAM)
    sam = _resolve_sam(given, schemes, regions, method)
    if depth_of(configuration["patch_size"]) > 1 and (sam.features, sam.view_geometry) == ("cached", "tile") and (
            sam.views > 1):
        raise ValueError("sam.view_geometry is 'tile', so that neighbouring slices of a view don't fit together: set "
                         "it to 'case' to train on slabs.")
    own["sam"] = asdict(sam)
    given = method.defaults(sam) | _given_or_trained(configuration, model, method)
    own[method.name] = asdict(parse_section(method.name, method.section, given))


def _given_or_trained(configuration: dict[str, Any], model: dict[str, Any] | None, method: Method) -> dict[str, Any]:
    """What plans give of a section, and what a trained model has for the keys that it may be older than."""
    younger = {key: as_trained(model, method)[key] for key in _before(method)} if model else {}
    return younger | given_section(configuration, method.name)


def _resolve_sam(given: dict[str, Any], normalization_schemes: list[str], regions: bool, method: Method) -> SamSection:
    check_keys(SAM.name, SAM.section, given)
    defaults = {
        "identity": "",
        "image_size": _image_size(given["encoder"], method.image_size),
        "intensity": intensity_rule(normalization_schemes),
        "regions": regions,
    }
    section: SamSection = parse_section(SAM.name, SAM.section, defaults | given)
    if section.intensity == "window" and intensity_rule(normalization_schemes) != "window":
        raise ValueError(f"sam.intensity is 'window', which needs CTNormalization in every channel, but the plans have "
                         f"{', '.join(normalization_schemes)}: use 'percentile'.")
    if section.regions != regions:
        raise ValueError(f"sam.regions is {section.regions}, but the data set's labels say {regions}: leave it out.")
    identity = identify(section.encoder, section.identity)
    if section.identity:
        check_identity(section.encoder, identity, section.identity)
    architecture = find_row(section.encoder).architecture
    architecture.check_image_size(section.image_size)
    check_offers(section.encoder, architecture, method)
    if not method.frozen_features:
        section = replace(section, features="online", views=1)
    if section.augmentation != AUGMENTATIONS[0] and (section.features, section.views) == ("cached", 1):
        raise ValueError(f"sam.augmentation is '{section.augmentation}', but each tile is cached as it is, in one view:"
                         " set sam.views to 2 or more, or sam.features to 'online'.")
    return replace(section, identity=identity)


def _image_size(encoder: str, largest: int | None) -> int:
    """The input side that an encoder was trained with, or as much of `largest` as it takes.

    A file like SAM's was trained with SAM's, as it always was.
    """
    own = ENCODERS[DEFAULT_ENCODER].image_size
    try:
        row = find_row(encoder)
    except (ValueError, OSError):  # said again, and with what to do, once the section has been checked
        return own
    if row_by_name(encoder) is not None or not isinstance(row.architecture, SamViT):
        own = row.image_size
    if not largest or largest >= own:
        return own
    return largest - largest % row.architecture.multiple


def check_offers(encoder: str, architecture: Architecture, method: Method) -> None:
    """Refuses an encoder that has not what the method asks of it.

    Raises:
        ValueError: Naming what it lacks, and the encoders that have it.
    """
    if lacking := _lacking(architecture, method):
        able = ", ".join(row.name for row in ENCODERS.values() if not _lacking(row.architecture, method))
        raise ValueError(f"The method {method.name} works inside the encoder and needs {lacking} of it, which "
                         f"'{encoder}' does not have: set sam.encoder to one of {able}.")


def offers(encoder: str, method: Method) -> bool:
    """Whether an encoder with a row has what the method asks of it."""
    return not _lacking(ENCODERS[encoder].architecture, method)


def _lacking(architecture: Architecture, method: Method) -> str:
    if method.needs not in ("", *architecture.offers):
        return method.needs
    if method.stride and {level.stride for level in architecture.spec(MIN_IMAGE_SIZE).maps} != {method.stride}:
        return f"maps at a stride of {method.stride} pixels"
    return ""


def _refuse_3d(manager: PlansManager, name: str, method: Method) -> None:
    """Refuses what is resampled between slices; slabs too, where the method sees one slice at a time."""
    known = {told(other): manager.get_configuration(other).configuration for other in manager.available_configurations}
    axes = {other: [_length(row.get(key)) for key in ("patch_size", "spacing")] for other, row in known.items()}
    flat = [other for other, (patch, _) in axes.items() if patch == 2]
    slabs = [other for other, lengths in axes.items() if lengths == [3, 2]]
    usable = flat + slabs if method.slabs else flat
    use = f"use {' or '.join(usable) or 'a 2D configuration (the plans have none)'}"
    if name not in flat + slabs:
        raise ValueError(f"The configuration '{name}' is 3D, but SAM works on slices: {use}.")
    if name not in usable:
        raise ValueError(f"The configuration '{name}' shows slabs of neighbouring slices, but the method {method.name} "
                         f"sees one slice at a time: {use}.")


def _length(value: Any) -> int:
    """Of a list; 0 of anything else."""
    return len(value) if isinstance(value, list | tuple) else 0


def given_section(configuration: dict[str, Any], name: str) -> dict[str, Any]:
    """What the plans give of a section, as it stands there."""
    section = configuration.get(name, {})
    if not isinstance(section, dict):
        raise ValueError(f"The plans' section '{name}' is {section!r}, but must be an object with keys.")
    return section


def _has_type(value: Any, kind: type) -> bool:
    """A whole number is a float too; a bool is a bool alone."""
    return isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
