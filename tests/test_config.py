"""The plans' sections: defaults, and what is said of mistakes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from desam_nnunet.encoders.base import FeatureSpec, ImageSpec, Level
from desam_nnunet.encoders.registry import ENCODERS, EncoderRow
from desam_nnunet.encoders.sam_vit import SamViT
from desam_nnunet.networks.dbsam.section import DBSAM
from desam_nnunet.networks.desam.section import DESAM, DesamSection
from desam_nnunet.networks.samed.section import SAMED
from desam_nnunet.settings.resolve import parse_section, read_own, read_sam, resolve_plans
from desam_nnunet.settings.sections import AS_BEFORE, Method, SamSection
from desam_nnunet.settings.sections import SECTIONS as OUR_SECTIONS
from desam_nnunet.training.checks import check_same_settings, settings_of
from desam_nnunet.training.registry import TRAINERS

DATASET = {"labels": {"background": 0, "organ": 1}, "channel_names": {"0": "MR"}, "file_ending": ".nii.gz"}
REGIONS = DATASET | {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}


def make_plans(scheme: str = "ZScoreNormalization", **sections: Any) -> dict[str, Any]:
    base = {"patch_size": [96, 96], "batch_size": 49, "architecture": {}, "normalization_schemes": [scheme]}
    return {
        "label_manager": "LabelManager",
        "configurations": {
            "2d": base | sections,
            "2d_child": {"inherits_from": "2d"},
            "2d_slab": {"inherits_from": "2d", "patch_size": [5, 96, 96], "spacing": [1.0, 1.0]},
            "3d_fullres": base | {"patch_size": [16, 96, 96]},
        },
    }


def resolved(
    plans: dict[str, Any], name: str = "2d", dataset: dict[str, Any] = DATASET, method: Method = DESAM,
    trained: dict[str, Any] | None = None,
) -> dict[str, Any]:
    resolve_plans(plans, name, dataset, method, trained=trained)
    return plans["configurations"][name]


def test_defaults() -> None:
    configuration = resolved(make_plans(sam={"encoder": "vit_tiny"}))
    assert configuration["sam"] == {
        "encoder": "vit_tiny", "identity": f"md5:{ENCODERS['vit_tiny'].md5}", "image_size": 256,
        "intensity": "percentile", "regions": False, "features": "cached", "views": 1, "augmentation": "nnunet",
        "view_geometry": "tile", "cache_dtype": "float16",
        "epochs": 50, "iterations_per_epoch": 250, "val_iterations_per_epoch": 50,
    }
    assert configuration["desam"] == {"grid": 9, "iou_threshold": 0.5, "lr": 1e-4, "mask_stride": 4,
                                      "grid_offset": 0.0, "through_input": False}
    assert configuration["batch_size"] == 49


def test_resolving_twice_changes_nothing() -> None:
    plans = make_plans(sam={"encoder": "vit_tiny"})
    once = dict(resolved(plans))
    assert resolved(plans) == once
    assert read_sam(once).encoder == "vit_tiny"


def test_stock_plans_get_the_published_batch_size(weights_of_vit_b: None) -> None:
    configuration = resolved(make_plans())
    assert configuration["batch_size"] == 8
    assert configuration["sam"]["encoder"] == "vit_b"
    assert configuration["sam"]["image_size"] == 1024


@pytest.fixture
def weights_of_vit_b(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the published file were here: nothing of it is read in these tests."""
    monkeypatch.setattr("desam_nnunet.settings.resolve.identify", lambda encoder, wanted: f"md5 of {encoder}")


def test_each_method_resolves_its_own_section_and_no_other() -> None:
    plans = make_plans(sam={"encoder": "vit_tiny"}, desam={"grid": 0}, samed={"rank": 8})
    configuration = resolved(plans, method=SAMED)
    assert configuration["samed"] == {"warmup": 250, "rank": 8, "targets": "qv", "lr": 0.005, "checkpointing": False,
                                      "lr_after_step": True}
    assert configuration["desam"] == {"grid": 0}
    assert "dbsam" not in configuration


def test_what_changes_the_encoders_features_stores_none() -> None:
    given = {"encoder": "vit_tiny", "features": "cached", "views": 4}
    for method in (SAMED, DBSAM):
        sam = resolved(make_plans(sam=given), method=method)["sam"]
        assert (sam["features"], sam["views"]) == ("online", 1)
    assert resolved(make_plans(sam=given))["sam"]["features"] == "cached"


def test_samed_reads_images_of_half_the_size_and_warms_up_for_a_tenth_of_a_short_training(weights_of_vit_b: None
                                                                                          ) -> None:
    configuration = resolved(make_plans(sam={"epochs": 4, "iterations_per_epoch": 50}), method=SAMED)
    assert configuration["sam"]["image_size"] == 512
    assert read_own(configuration, SAMED).warmup == 20
    assert resolved(make_plans(), method=DBSAM)["sam"]["image_size"] == 1024
    assert resolved(make_plans(sam={"image_size": 1024}), method=SAMED)["sam"]["image_size"] == 1024


def test_sections_are_inherited() -> None:
    configuration = resolved(make_plans(sam={"encoder": "vit_tiny", "image_size": 320}), "2d_child")
    assert configuration["sam"]["image_size"] == 320


def test_intensity_follows_the_normalisation() -> None:
    assert resolved(make_plans("CTNormalization", sam={"encoder": "vit_tiny"}))["sam"]["intensity"] == "window"


def test_regions_follow_the_data_set() -> None:
    assert resolved(make_plans(sam={"encoder": "vit_tiny"}), dataset=REGIONS)["sam"]["regions"] is True


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"sam": {"imagesize": 512}}, r"section 'sam' has an unknown key 'imagesize'. Valid keys: encoder \(str\)"),
        ({"sam": {"image_size": "512"}}, r"sam.image_size is '512', but must be of type int. Valid keys: .*epochs"),
        ({"sam": {"epochs": True}}, "sam.epochs is True, but must be of type int"),
        ({"sam": {"image_size": 500}}, "sam.image_size is 500, but must be a multiple of 16"),
        ({"sam": {"intensity": "zscore"}}, "'zscore', but must be percentile or window or unit"),
        ({"sam": {"intensity": "window"}}, "needs CTNormalization in every channel"),
        ({"sam": {"features": "disk"}}, "sam.features is 'disk', but must be online or cached"),
        ({"sam": {"regions": True}}, "the data set's labels say False"),
        ({"sam": {"encoder": "vit_x"}},
         "Unknown encoder 'vit_x': give one of vit_b, vit_l, vit_h, mobile_sam, lite_medsam, vit_tiny"),
        ({"sam": {"identity": "md5:0"}}, "found here is md5:.* were trained or made with md5:0"),
        ({"sam": 7}, "section 'sam' is 7, but must be an object"),
        ({"desam": {"grid": 0}}, "desam.grid is 0, but must be between 1 and 64"),
        ({"desam": {"lr": "fast"}}, r"desam.lr is 'fast', but must be of type float. Valid keys: grid \(int\)"),
        ({"desam": {"threshold": 1}}, "unknown key 'threshold'. Valid keys: grid"),
    ],
)
def test_mistakes_are_named(sections: dict[str, Any], message: str) -> None:
    given = {"sam": {"encoder": "vit_tiny"}} | sections
    if isinstance(given["sam"], dict):
        given["sam"] = {"encoder": "vit_tiny"} | given["sam"]
    with pytest.raises(ValueError, match=message):
        resolved(make_plans(**given))


WRONG_TYPES: dict[type, list[Any]] = {
    str: [7, None, ["vit_b"]], int: ["8", 8.5, True, None], float: ["0.5", False, None], bool: [1, "yes"],
}
WRONG_VALUES: dict[str, list[Any]] = {
    "sam.encoder": ["", "vit_x", "absent.pth"], "sam.identity": ["md5:0"], "sam.regions": [True],
    "sam.image_size": [0, 48, 500, -64, 4112, 2**31], "sam.intensity": ["", "zscore"], "sam.features": ["", "disk"],
    "sam.cache_dtype": ["float32", ""], "sam.views": [0, -1, 101, 2**63], "sam.augmentation": ["", "mild"],
    "sam.view_geometry": ["", "slice"], "sam.epochs": [0, -1, 10**9], "sam.iterations_per_epoch": [0, -1, 10**9],
    "sam.val_iterations_per_epoch": [0, -1, 2**63], "desam.grid": [0, 65, -1],
    "desam.iou_threshold": [-0.1, 1.1, float("nan")], "desam.lr": [0, -1e-4, 2.0, float("nan"), float("inf")],
    "desam.mask_stride": [0, 3, 8], "desam.grid_offset": [-8.1, 9, float("nan")], "desam.through_input": [],
    "pdmm.width": [15, 1025], "pdmm.lr": [0, -1.0, 2.0, float("nan"), float("inf")], "pdmm.mask_stride": [0, 3, 8],
    "samed.warmup": [-1, 10**9], "samed.rank": [0, 65], "samed.targets": ["", "x", "qq", "qkvo"],
    "samed.lr": [0, -1.0, 2.0, float("inf")], "samed.checkpointing": [], "samed.lr_after_step": [],
    "dbsam.lr": [0, -1.0, 2.0, float("inf")], "dbsam.checkpointing": [], "dbsam.mask_tokens": [0, 2, 5],
}
METHODS = {trainer.method.name: trainer.method for trainer in TRAINERS.values()}
SECTIONS: dict[str, type] = {"sam": SamSection} | {name: method.section for name, method in METHODS.items()}
KEYS = [(section, key, kind) for section, fields in SECTIONS.items() for key, kind in get_type_hints(fields).items()]


def test_no_key_is_left_out_below() -> None:
    assert sorted(WRONG_VALUES) == sorted(f"{section}.{key}" for section, key, _ in KEYS)


@pytest.mark.parametrize(("section", "key", "kind"), KEYS)
def test_a_wrong_type_is_named_with_what_is_allowed(section: str, key: str, kind: type) -> None:
    for value in WRONG_TYPES[kind]:
        given = {"sam": {"encoder": "vit_tiny"}}
        given.setdefault(section, {})[key] = value
        method = METHODS.get(section, DESAM)
        with pytest.raises(ValueError, match=rf"key {section}\.{key} is {re.escape(repr(value))}, but must be of "
                                             rf"type {kind.__name__}\. Valid keys: .*{key} \({kind.__name__}\)"):
            resolved(make_plans(**given), method=method)


@pytest.mark.parametrize(("section", "key", "value"),
                         [(*name.split("."), value) for name, values in WRONG_VALUES.items() for value in values])
def test_a_wrong_value_is_named_with_what_is_allowed(section: str, key: str, value: Any) -> None:
    given = {"sam": {"encoder": "vit_tiny"}}
    given.setdefault(section, {})[key] = value
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        resolved(make_plans(**given), method=METHODS.get(section, DESAM))
    assert str(value) in str(raised.value)
    assert re.search("must be|say False: leave it out|give one of|put the file into|found here is", str(raised.value))


def test_3d_names_the_2d_configurations() -> None:
    with pytest.raises(ValueError, match="'3d_fullres' is 3D, but SAM works on slices: use 2d or 2d_child"):
        resolved(make_plans(), "3d_fullres")


def test_unresolved_plans_are_not_read() -> None:
    with pytest.raises(ValueError, match="'sam' lacks encoder, identity, .*not resolved by training"):
        read_sam(make_plans()["configurations"]["2d"])


def test_a_whole_number_is_a_float() -> None:
    assert parse_section("desam", DesamSection, {"lr": 1}).lr == 1


# Keys that are younger than models are: the method, the key, its default today, and what its absence in a model means.
YOUNGER = [
    (DESAM, "mask_stride", 4, 4), (DESAM, "grid_offset", 0.0, -0.5), (DESAM, "through_input", False, False),
    (SAMED, "lr_after_step", True, False), (DBSAM, "mask_tokens", 4, 1),
]


def test_no_younger_key_is_left_out_above() -> None:
    marked = [(method, row.name) for method in METHODS.values() for row in fields(method.section)
              if AS_BEFORE in row.metadata]
    assert marked == [(method, key) for method, key, *_ in YOUNGER]


def model_of(method: Method, **own: Any) -> dict[str, Any]:
    """The plans of a model from before the younger keys."""
    plans = make_plans(sam={"encoder": "vit_tiny"}, **{method.name: own})
    configuration = resolved(plans, method=method)
    for other, key, *_ in YOUNGER:
        if other is method:
            del configuration[method.name][key]
    return plans


@pytest.mark.parametrize(("method", "key", "now", "before"), YOUNGER)
def test_a_younger_key_that_is_missing_means_todays_default_in_new_plans(
    method: Method, key: str, now: Any, before: Any
) -> None:
    assert resolved(make_plans(sam={"encoder": "vit_tiny"}), method=method)[method.name][key] == now


@pytest.mark.parametrize(("method", "key", "now", "before"), YOUNGER)
def test_a_younger_key_that_a_model_lacks_means_what_happened_before(
    method: Method, key: str, now: Any, before: Any
) -> None:
    model = model_of(method)
    assert getattr(read_own(model["configurations"]["2d"], method), key) == before
    again = resolved(make_plans(sam={"encoder": "vit_tiny"}), method=method, trained=model)
    assert again[method.name][key] == before


@pytest.mark.parametrize(("method", "key", "now", "before"), YOUNGER)
def test_plans_that_go_on_with_a_model_take_its_younger_keys_alone(
    method: Method, key: str, now: Any, before: Any
) -> None:
    model = model_of(method, lr=0.5)
    model["configurations"]["2d"][method.name][key] = now
    again = resolved(make_plans(sam={"encoder": "vit_tiny"}), method=method, trained=model)
    assert again[method.name][key] == now
    assert again[method.name]["lr"] == method.section.lr
    given = make_plans(sam={"encoder": "vit_tiny"}, **{method.name: {key: before}})
    assert resolved(given, method=method, trained=model)[method.name][key] == before


@pytest.mark.parametrize(("method", "key", "now", "before"), YOUNGER)
def test_settings_count_a_missing_younger_key_as_what_happened_before(
    method: Method, key: str, now: Any, before: Any
) -> None:
    then = settings_of(model_of(method), "2d", DATASET, method)
    assert then[f"{method.name}.{key}"] == before
    same, other = (settings_of(resolved_with(method, key, value), "2d", DATASET, method) for value in (before, now))
    check_same_settings(same | {name: then[name] for name in then if name != f"{method.name}.{key}"}, then, "it")
    if now != before:
        with pytest.raises(ValueError, match=rf"{method.name}\.{key} was {before} and is {now} now"):
            check_same_settings(other, then, "it")


def resolved_with(method: Method, key: str, value: Any) -> dict[str, Any]:
    plans = make_plans(sam={"encoder": "vit_tiny"}, **{method.name: {key: value}})
    resolved(plans, method=method)
    return plans


@dataclass(frozen=True)
class SlowSection(SamSection):
    """The shared section with a key that is younger than models are."""

    pace: int = field(default=1, metadata={AS_BEFORE: 9})


def test_a_younger_key_of_the_shared_section_means_what_happened_before_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_plans(sam={"encoder": "vit_tiny"})
    resolved(model)
    shared = Method("sam", SlowSection, "")
    for place in ("settings.resolve", "training.checks", "planning.plan"):
        monkeypatch.setattr(f"desam_nnunet.{place}.SAM", shared)
    assert read_sam(model["configurations"]["2d"]).pace == 9
    assert settings_of(model, "2d", DATASET, DESAM)["sam.pace"] == 9
    assert resolved(make_plans(sam={"encoder": "vit_tiny"}))["sam"]["pace"] == 1
    assert resolved(make_plans(sam={"encoder": "vit_tiny"}), trained=model)["sam"]["pace"] == 9
    assert resolved(make_plans(sam={"encoder": "vit_tiny", "pace": 3}), trained=model)["sam"]["pace"] == 3


@dataclass(frozen=True)
class Listed:
    lr: float = 1e-4
    sizes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Optional:
    limit: int | None = None
    lr: float = 1e-4


@dataclass(frozen=True)
class Made:
    name: str = field(default_factory=str)
    lr: float = 1e-4


@pytest.mark.parametrize(("section", "named"), [
    (Listed, r"'sizes' of type list\[int\] with a default_factory"), (Optional, r"'limit' of type int \| None"),
    (Made, "'name' of type str with a default_factory"),
])
def test_a_field_that_plans_can_not_give_is_named(section: type, named: str) -> None:
    with pytest.raises(ValueError, match=rf"The section 'mine' \({section.__name__}\) has a field {named}, but plans "
                                         "hold int, float, str and bool alone"):
        resolved(make_plans(sam={"encoder": "vit_tiny"}), method=Method("mine", section, "MinePlans"))


class FineViT(SamViT):
    """A plain ViT whose maps are as fine as an eighth of the input."""

    def spec(self, image_size: int) -> FeatureSpec:
        return FeatureSpec((Level(32, 8),) * 3, Level(32, 8), ImageSpec(8))


PLAIN = "vit_b, vit_l, vit_h, vit_tiny, vit_tiny_random"
PROJECTIONS = "vit_b, vit_l, vit_h, mobile_sam, lite_medsam, vit_tiny, vit_tiny_random"


@pytest.mark.parametrize(("method", "encoder", "needed", "able"), [
    (DBSAM, "lite_medsam", "plain ViT", PLAIN), (DBSAM, "timm_random/convnext_tiny", "plain ViT", PLAIN),
    (DBSAM, "timm_random/vit_tiny_patch16_224", "plain ViT", PLAIN),
    (SAMED, "timm_random/convnext_tiny", "projections", PROJECTIONS),
])
def test_an_encoder_that_a_method_can_not_work_on_is_refused_and_others_are_named(
    method: Method, encoder: str, needed: str, able: str
) -> None:
    with pytest.raises(ValueError, match=f"The method {method.name} works inside the encoder and needs {needed} of it, "
                                         f"which '{encoder}' does not have: set sam.encoder to one of {able}\\.$"):
        resolved(make_plans(sam={"encoder": encoder}), method=method)


def test_a_plain_vit_of_another_stride_is_refused_where_the_method_takes_one_alone(monkeypatch: pytest.MonkeyPatch
                                                                                    ) -> None:
    monkeypatch.setitem(ENCODERS, "fine", EncoderRow("fine", FineViT(32, 4, 2, (0, 1, 2, 3)), 64))
    with pytest.raises(ValueError, match="dbsam works inside the encoder and needs maps at a stride of 16 pixels of "
                                         f"it, which 'fine' does not have: set sam.encoder to one of {PLAIN}\\.$"):
        resolved(make_plans(sam={"encoder": "fine"}), method=DBSAM)
    assert resolved(make_plans(sam={"encoder": "fine"}))["sam"]["image_size"] == 64


def test_methods_on_features_alone_take_every_encoder() -> None:
    for encoder in ("lite_medsam", "timm_random/convnext_tiny"):
        assert resolved(make_plans(sam={"encoder": encoder}))["sam"]["encoder"] == encoder


@pytest.mark.parametrize(("encoder", "size"), [("timm_random/convnext_tiny", 224), ("lite_medsam", 256)])
def test_the_input_size_is_the_encoders_own(encoder: str, size: int) -> None:
    assert resolved(make_plans(sam={"encoder": encoder}))["sam"]["image_size"] == size


def test_the_input_size_is_a_multiple_of_the_encoders_largest_stride() -> None:
    with pytest.raises(ValueError, match="sam.image_size is 240, but must be a multiple of 32, between 64 and"):
        resolved(make_plans(sam={"encoder": "timm_random/convnext_tiny", "image_size": 240}))


def test_a_methods_own_bound_is_kept_in_steps_that_the_encoder_takes() -> None:
    method = replace(DESAM, image_size=200)
    assert resolved(make_plans(sam={"encoder": "timm_random/convnext_tiny"}), method=method)["sam"]["image_size"] == 192


def test_an_augmentation_that_no_view_would_get_is_refused() -> None:
    with pytest.raises(ValueError, match="in one view: set sam.views to 2 or more, or sam.features to 'online'"):
        resolved(make_plans(sam={"encoder": "vit_tiny", "augmentation": "strong"}))
    for more in ({"views": 2}, {"features": "online"}):
        given = {"encoder": "vit_tiny", "augmentation": "strong"} | more
        assert resolved(make_plans(sam=given))["sam"]["augmentation"] == "strong"


def test_the_names_of_our_sections_are_those_of_our_methods() -> None:
    assert set(OUR_SECTIONS) == set(SECTIONS)


@pytest.mark.parametrize("wrong", ["dsam", "Sam", "SAM", "sma", "sam ", "desma", "Desam", "DeSAM", "pdm", "smaed",
                                   "sam.epochs", "sam-settings", "samSettings", "DeSAMSection", "desam settings"])
def test_a_misspelt_section_is_refused_with_the_name_that_is_meant(wrong: str) -> None:
    with pytest.raises(ValueError, match=rf"has a key '{re.escape(wrong)}', which nothing reads\. If '\w+' is meant"):
        resolved(make_plans(**{"sam": {"encoder": "vit_tiny"}, wrong: {"lr": 1.0}}))


@pytest.mark.parametrize("name", ["sam", "desam", "Sam", "samed"])
def test_a_section_at_the_wrong_level_is_refused_with_its_place(name: str) -> None:
    plans = make_plans(sam={"encoder": "vit_tiny"})
    with pytest.raises(ValueError, match=rf"'{name}' stands at the top level, .* configurations → 2d → {name.lower()}"):
        resolved(plans | {name: {"epochs": 3}})
    plans["configurations"][name] = {"epochs": 3}
    with pytest.raises(ValueError, match=f"'{name}' stands among the configurations"):
        resolved(plans)


@pytest.mark.parametrize("architecture", [{"sam": {"epochs": 3}}, {"arch_kwargs": {"sam": {"epochs": 3}}}])
def test_a_section_inside_one_of_nnunets_keys_is_refused(architecture: dict[str, Any]) -> None:
    plans = make_plans(sam={"encoder": "vit_tiny"})
    plans["configurations"]["2d"]["architecture"] = architecture
    with pytest.raises(ValueError, match="key 'sam' stands in 'architecture' of the configuration '2d', where nothing"):
        resolved(plans)


@pytest.mark.parametrize(("key", "section"), [("epochs", "sam"), ("encoder", "sam"), ("views", "sam"), ("lr", "desam"),
                                              ("grid", "desam")])
def test_a_sections_key_in_the_configuration_itself_is_refused(key: str, section: str) -> None:
    with pytest.raises(ValueError, match=f"'{key}' stands in the configuration '2d', .* belongs in its section "
                                         f"'{section}'"):
        resolved(make_plans(**{"sam": {"encoder": "vit_tiny"}, key: 3}))


@pytest.mark.parametrize("labels", [
    None, {}, 3, {"organ": 1}, {"background": 1}, {"background": 0}, {"background": 0, "organ": None},
    {"background": 0, "organ": [1, 2]}, {"background": 0, "organ": 1, "ignore": 1}, {"background": 0, "x": "\x1b"},
    {"background": 0, "organ": float("inf")}])
def test_labels_of_which_nnunet_makes_no_classes_are_refused(labels: Any) -> None:
    with pytest.raises(ValueError, match=r"labels .*dataset\.json") as refused:
        resolved(make_plans(sam={"encoder": "vit_tiny"}), dataset=DATASET | {"labels": labels})
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("name", ["2d_256_desam", "sam_2d_bs8", "2d_tiny_sam", "2d_samed"])
def test_a_configuration_may_be_called_after_us(name: str) -> None:
    plans = make_plans(sam={"encoder": "vit_tiny"})
    plans["configurations"][name] = {"inherits_from": "2d", "batch_size": 3}
    assert resolved(plans, name)["sam"]["encoder"] == "vit_tiny"


@pytest.mark.parametrize("other", [
    {"architecture": {}}, {"architecture": {}, "patch_size": 3}, {"inherits_from": "2d", "spacing": 4}])
def test_what_other_configurations_hold_stops_nobody(other: dict[str, Any]) -> None:
    plans = make_plans(sam={"encoder": "vit_tiny"})
    plans["configurations"]["3d_fullres"] = other
    assert resolved(plans)["sam"]["encoder"] == "vit_tiny"


@pytest.mark.parametrize("row", [None, 3, []])
def test_a_configuration_that_is_none_is_named(row: Any) -> None:
    plans = make_plans(sam={"encoder": "vit_tiny"})
    plans["configurations"]["zz"] = row
    with pytest.raises(ValueError, match=f"configuration 'zz' is {re.escape(repr(row))}, but must be an object"):
        resolved(plans)


@pytest.mark.parametrize("change", [
    {"configurations": None}, {"configurations": []}, {"configurations": {}},
    {"label_manager": None}, {"label_manager": 3}, {"label_manager": "Nobody"},
])
def test_plans_of_another_structure_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"The plans' key {next(iter(change))} is .*, but must be"):
        resolved(make_plans(sam={"encoder": "vit_tiny"}) | change)


@pytest.mark.parametrize("name", ["2d", "3d_fullres"])
@pytest.mark.parametrize("row", [{"patch_size": [96, 96]}, {"architecture": 3}, {"inherits_from": 3}])
def test_a_configuration_that_nnunet_makes_nothing_of_is_refused(name: str, row: dict[str, Any]) -> None:
    plans = make_plans(sam={"encoder": "vit_tiny"})
    plans["configurations"][name] = row
    with pytest.raises(ValueError, match=f"The plans' configuration '{name}' is .*, but must be an object with an"):
        resolved(plans)


@pytest.mark.parametrize(("child", "parent"), [("2d", "2d_slab"), ("2d", "nothing"), ("2d", "\x1b"), ("2d", "2d")])
def test_configurations_that_inherit_from_nothing_are_refused(child: str, parent: str) -> None:
    plans = make_plans(sam={"encoder": "vit_tiny"})
    plans["configurations"][child]["inherits_from"] = parent
    with pytest.raises(ValueError, match="has inherits_from .*, but must name another one") as refused:
        resolved(plans)
    assert str(refused.value).isprintable()


def test_nnunets_own_keys_and_other_methods_sections_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A section that looks misspelt is another method's, where a trainer in the folders of others mentions it."""
    own = resolved(make_plans(sam={"encoder": "vit_tiny"}, samed={"rank": 8}, dbsam={"lr": 1.0}))
    assert own["samed"] == {"rank": 8}
    plans = make_plans(sam={"encoder": "vit_tiny"}, desam2={"lr": 1.0})
    with pytest.raises(ValueError, match="desam2"):
        resolved(plans)
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    others = tmp_path / "others.py"
    others.write_text('"""desam2"""\nprint("desam2")\nif not METHODS:\n    raise KeyError("desam2")\n')
    with pytest.raises(ValueError, match="desam2"):  # said, but not used
        resolved(plans)
    others.write_text('METHOD = Method("desam2", Section, "Desam2Plans")\n')
    assert resolved(plans)["desam2"] == {"lr": 1.0}


@pytest.mark.parametrize(("key", "values"), [
    ("batch_size", [None, 0, -1, "8", 2.5, True, 10**12]),
    ("patch_size", [None, [], [96], [0, 96], [96.0, 96], "96", [96, 10**12]]),
    ("normalization_schemes", [None, [], "ZScoreNormalization", [1]]),
])
def test_what_nnunets_planner_never_writes_is_refused(key: str, values: list[Any]) -> None:
    for value in values:
        plans = make_plans(sam={"encoder": "vit_tiny"})
        plans["configurations"]["2d"][key] = value
        with pytest.raises(ValueError, match=rf"key {key} of the configuration '2d' is {re.escape(repr(value))}, but"):
            resolved(plans)
    plans = make_plans(sam={"encoder": "vit_tiny"})
    del plans["configurations"]["2d"][key]
    with pytest.raises(ValueError, match=f"key {key} of the configuration '2d' is None"):
        resolved(plans)
