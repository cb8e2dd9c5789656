"""A recipe is checked once, where it is read: what is wrong is said in one line, with the nearest valid value."""

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from deme_diffusion.config import DecoupleSettings, PretrainSettings, Recipe, SamplerSettings
from deme_diffusion.errors import UserError, nearest
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.recipes import changed, load, packaged, to_yaml
from deme_diffusion.recipes.checks import keys_of, parse

TWO = [{"name": "DDIMScheduler"}, {"name": "DDPMScheduler"}]
OFF = {
    "decouple.num_ranges": 1,
    "decouple.global_prob": 0,
    "decouple.consistency_weight": 0,
    "decouple.projection": "none",
    "merge.method": "none",
    "merge.search": "none",
}


def written(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def refusal(values: dict[str, object]) -> str:
    with pytest.raises(UserError) as caught:
        parse(values, where="mine.yaml")
    line = str(caught.value)
    assert "\n" not in line and line.startswith("mine.yaml: ")
    return line.removeprefix("mine.yaml: ")


def load_refusal(reference: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(reference, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# packaged recipes, YAML


@pytest.mark.parametrize("name", packaged())
def test_packaged_recipe_loads_is_described_and_survives_its_own_yaml(name: str, tmp_path: Path) -> None:
    recipe = load(name).recipe
    assert recipe.name == name and len(packaged()[name]) > 20
    assert load(written(tmp_path, to_yaml(recipe))).recipe == recipe
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    reopened = load(str(tmp_path))
    assert reopened.recipe == recipe and reopened.folder == tmp_path


def test_changed_settings_survive_yaml(tmp_path: Path) -> None:
    overrides = [
        "decouple.num_ranges=4",
        "seeds=[3,1]",
        "decouple.range_steps=[1,2,3,4]",
        "merge.sampler.eta=0.5",
        "data.augment.flip=0.5",
    ]
    recipe = load("digits", overrides).recipe
    assert recipe.decouple.range_steps == (1, 2, 3, 4) and recipe.seeds == (3, 1)
    assert load(written(tmp_path, to_yaml(recipe))).recipe == recipe


def test_a_recipe_is_named_after_its_file_unless_it_says_otherwise(tmp_path: Path) -> None:
    assert load(written(tmp_path, "demonstration: true")).recipe.name == "mine"
    assert load(written(tmp_path, "name: other")).recipe.name == "other"
    for name in ("a/b", "../x", "", ".hidden"):
        assert refusal({"name": name}).startswith("name: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "a recipe is a mapping of sections, this is a list"),
        ("", "a recipe is a mapping of sections, this is a NoneType"),
        ("just text", "a recipe is a mapping of sections, this is a str"),
        ("a: [1,\nb: 2", "not YAML: "),
        ("description: 2001-99-99", "not YAML: "),
        ("decouple: !!python/object/apply:os.mkdir [made]", "not YAML: could not determine a constructor"),
        ("decouple: !!python/name:os.system", "not YAML: could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_recipe_is_named_and_nothing_in_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, text)
    assert load_refusal(path).startswith(f"{path}: {said}")
    assert [found.name for found in tmp_path.iterdir()] == ["mine.yaml"]


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00\x81")
    assert "mine.yaml: not YAML: " in load_refusal(str(tmp_path / "mine.yaml"))


def test_what_is_no_recipe_gets_the_nearest_name(tmp_path: Path) -> None:
    assert "; did you mean 'digits'?; see: deme recipes" in load_refusal("digts")
    assert load_refusal(str(tmp_path)) == f"{tmp_path}: no recipe.yaml in it, so it is no run folder"


def test_a_run_folder_is_not_taken_for_the_recipe_beside_it(tmp_path: Path) -> None:
    written(tmp_path, "name: beside")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.yaml").write_text("name: within")
    assert load(str(tmp_path / "mine")).recipe.name == "within"


# extends


def test_extends_lays_a_file_over_another_section_by_section(tmp_path: Path) -> None:
    written(tmp_path, "{extends: digits, decouple: {num_ranges: 2}}", "middle.yaml")
    recipe = load(written(tmp_path, "{extends: middle.yaml, decouple: {global_prob: 0}}")).recipe
    digits = load("digits").recipe
    assert (recipe.name, recipe.decouple.num_ranges, recipe.decouple.global_prob) == ("mine", 2, 0)
    assert recipe.decouple.learning_rate == digits.decouple.learning_rate != DecoupleSettings().learning_rate
    assert recipe.evaluate == digits.evaluate


@pytest.mark.parametrize(
    ("one", "two"), [("two.yaml", "one.yaml"), ("one.yaml", "one.yaml"), ("./two.yaml", "one.yaml")]
)
def test_extends_in_a_circle_is_refused(tmp_path: Path, one: str, two: str) -> None:
    written(tmp_path, f"extends: {two}", "two.yaml")
    line = load_refusal(written(tmp_path, f"extends: {one}", "one.yaml"))
    assert "extends itself through " in line and str(tmp_path) in line


def test_extends_nothing_that_is_there(tmp_path: Path) -> None:
    assert "did you mean 'digits'?" in load_refusal(written(tmp_path, "extends: digitz"))


# keys and values


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"decuple": {}}, "decuple: unknown key; did you mean 'decouple'?"),
        ({"decouple": {"num_rangs": 2}}, "decouple.num_rangs: unknown key; did you mean 'num_ranges'?"),
        ({"data": {"augment": {"shfit": 1}}}, "data.augment.shfit: unknown key; did you mean 'shift'?"),
        ({"pretrain": {"unet": {"droput": 0}}}, "pretrain.unet.droput: unknown key; did you mean 'dropout'?"),
        ({"merge": {"sampler": {"nmae": "x"}}}, "merge.sampler.nmae: unknown key; did you mean 'name'?"),
        ({"evaluate": {"samplers": [*TWO, {"etta": 1}]}}, "evaluate.samplers.2.etta: unknown key; did you mean 'eta'?"),
        ({"zzz": 1}, "zzz: unknown key"),
    ],
)  # fmt: skip
def test_unknown_key_at_each_level_gets_the_nearest_name(values: dict[str, object], line: str) -> None:
    assert refusal(values) == line


def test_unquoted_no_of_yaml_is_the_word_no() -> None:
    assert load("digits", ["decouple.mixed_precision=no"]).recipe.decouple.mixed_precision == "no"


def test_an_unknown_key_is_told_before_what_else_is_wrong() -> None:
    line = refusal({"decouple": {"global_prob": 7, "num_rangs": 2}})
    assert line == "decouple.num_rangs: unknown key; did you mean 'num_ranges'? (and 1 more)"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"merge": {"search": "least_square"}},
            "merge.search: 'least_square' is not one of none, least_squares, grid, gradient, cma_es, tpe; did you mean "
            "'least_squares'?",
        ),
        (
            {"model": {"family": "ddmp"}},
            "model.family: 'ddmp' is not one of ddpm, dit, stable_diffusion, stable_diffusion_xl, stable_diffusion_3, "
            "flux, wan; did you mean 'ddpm'?",
        ),
        ({"decouple": {"projection": "up"}}, "decouple.projection: 'up' is not one of none, residual, block"),
        ({"decouple": {"mixed_precision": True}}, "decouple.mixed_precision: True is not one of no, fp16, bf16"),
    ],
)
def test_wrong_choice_lists_the_choices_and_the_nearest(values: dict[str, object], line: str) -> None:
    assert refusal(values) == line


@pytest.mark.parametrize(
    ("values", "start", "given"),
    [
        ({"decouple": {"global_prob": 1.5}}, "decouple.global_prob: Input should be less than or equal to 1", "1.5"),
        ({"decouple": {"global_prob": -0.1}}, "decouple.global_prob: Input should be greater", "-0.1"),
        ({"decouple": {"num_ranges": 0}}, "decouple.num_ranges: Input should be greater than or equal to 1", "0"),
        ({"decouple": {"num_ranges": "four"}}, "decouple.num_ranges: Input should be a valid integer", "'four'"),
        ({"decouple": {"learning_rate": float("nan")}}, "decouple.learning_rate: Input should be a finite", "nan"),
        ({"decouple": None}, "decouple: Input should be a valid dictionary", "None"),
        ({"seeds": []}, "seeds: Tuple should have at least 1 item", "[]"),
        ({"seeds": [0, -1]}, "seeds.1: Input should be greater than or equal to 0", "-1"),
    ],
)  # fmt: skip
def test_value_out_of_bounds_is_told_with_what_was_given(values: dict[str, object], start: str, given: str) -> None:
    line = refusal(values)
    assert line.startswith(start)
    assert line.endswith(f"(given: {given})")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"decouple": {"range_steps": [1, 2]}}, "decouple: range_steps has 2 values for num_ranges=4"),
        (
            {"decouple": {"num_ranges": 2, "range_learning_rates": [1e-4]}},
            "decouple: range_learning_rates has 1 values for num_ranges=2",
        ),
        ({"decouple": {"total_steps": 3}}, "decouple: total_steps=3 leaves no step for each of 4 experts"),
        (
            {"merge": {"weights": [0.1] * 4}},
            "merge: weights are given, so search must be none, not least_squares",
        ),
        (
            {"merge": {"weights": [0.1] * 3, "search": "none"}},
            "merge.weights has 3 values for decouple.num_ranges=4",
        ),
        (
            {"evaluate": {"samplers": TWO[:1]}},
            "evaluate: samplers: at least two different ones, since a gain under one alone is no gain",
        ),
        (
            {"evaluate": {"samplers": [TWO[0], TWO[0]]}},
            "evaluate: samplers: at least two different ones, since a gain under one alone is no gain",
        ),
        ({"seeds": [0, 1, 0]}, "seeds: [0, 1, 0] holds one seed twice"),
        (
            {"data": {"search_fraction": 0.5, "report_fraction": 0.5}},
            "data: search_fraction + report_fraction must stay below 1: nothing is left to train on",
        ),
        (
            {"evaluate": {"controls": ["all-timesteps-searched"]}},
            "evaluate.controls: all-timesteps-searched needs all-timesteps beside it",
        ),
    ],
)
def test_settings_that_contradict_each_other(values: dict[str, object], line: str) -> None:
    assert refusal(values) == line


def test_more_ranges_than_the_model_has_timesteps() -> None:
    few = {"model": {"pretrained": None}, "pretrain": {"scheduler": {"num_train_timesteps": 100}}}
    fits = parse({**few, "decouple": {"num_ranges": 100}, "merge": {"search": "none"}}, where="x")
    assert len(Graph(fits).experts[0]) == 100
    with pytest.raises(UserError, match="num_ranges: 101 ranges do not fit into 100 timesteps; the most is 100"):
        Graph(parse({**few, "decouple": {"num_ranges": 101}}, where="x"))


# overrides


def test_overrides_reach_set_unset_and_nested_settings(tmp_path: Path) -> None:
    path = written(tmp_path, "decouple: {num_ranges: 2}")
    loaded = load(path, ["decouple.num_ranges=3", "data.augment.shift=2", "model.pretrained=null", "seeds=[1, 2]"])
    assert (loaded.recipe.decouple.num_ranges, loaded.recipe.data.augment.shift) == (3, 2.0)
    assert loaded.recipe.model.pretrained is None and loaded.recipe.seeds == (1, 2)
    assert loaded.overrides == {
        "decouple.num_ranges": 3, "data.augment.shift": 2, "model.pretrained": None, "seeds": [1, 2]
    }  # fmt: skip
    assert load(path, ["decouple.num_ranges=3", "decouple.num_ranges=5"]).recipe.decouple.num_ranges == 5


def test_overrides_step_into_lists_by_index(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("merge: {sampler: &s {eta: 0.5}}\nevaluate: {samplers: [*s, {num_inference_steps: 7}]}\n")
    recipe = load(str(file), ["evaluate.samplers.0.eta=0.25", "seeds.0=3"]).recipe
    assert [one.eta for one in recipe.evaluate.samplers] == [0.25, 0.0] and recipe.seeds == (3,)
    assert recipe.merge.sampler.eta == 0.5, "of an alias only the one that is named"
    file.write_text("{}\n")
    default, given = (load(str(file), more).recipe.evaluate.samplers for more in ([], ["evaluate.samplers.1.eta=0"]))
    assert default == given
    told = changed(recipe, {"evaluate.samplers.1.num_inference_steps": 9}).evaluate.samplers
    assert [one.num_inference_steps for one in told] == [50, 9]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("num_ranges", "num_ranges: an override is KEY=VALUE, as in decouple.num_ranges=2"),
        ("=2", "=2: an override is KEY=VALUE, as in decouple.num_ranges=2"),
        ("decouple.num_ranges=[1", "decouple.num_ranges=[1: the value is not YAML"),
        ("name=2001-99-99", "name=2001-99-99: the value is not YAML"),
        ("decouple.num_rangs=2", "decouple.num_rangs: unknown key; did you mean 'num_ranges'?"),
        ("decuple.num_ranges=2", "decuple.num_ranges: unknown key; did you mean 'decouple'?"),
        ("data.agument.flip=1", "data.agument.flip: unknown key; did you mean 'augment'?"),
        ("decouple.num_ranges.more=2", "decouple.num_ranges.more: unknown key"),
        ("decouple.=2", "decouple.: unknown key"),
        ("evaluate.samplers.2.eta=1", "evaluate.samplers.2.eta: evaluate.samplers has no 2; it has 0 to 1"),
        (
            "evaluate.samplers.eta=1",
            "evaluate.samplers.eta: evaluate.samplers is a list; say which of it, as in evaluate.samplers.0.eta",
        ),
        ("evaluate.samplers.0.etta=1", "evaluate.samplers.0.etta: unknown key; did you mean 'eta'?"),
        ("seeds.1=4", "seeds.1: seeds has no 1; it has 0 to 0"),
        ("seeds.0.more=4", "seeds.0.more: unknown key"),
        ("name=!!python/name:os.system", "name=!!python/name:os.system: the value is not YAML"),
    ],
)
def test_override_that_cannot_be_taken(override: str, line: str) -> None:
    assert load_refusal("digits", override) == line


# defaults, off values, budget


def trainings(values: dict[str, Any], **decouple: Any) -> list[str]:
    """Digests of what a recipe trains."""
    graph = Graph(parse({**values, "decouple": {**values["decouple"], **decouple}}, where="x"))
    return [node.digest for node in graph.of_stage("decouple")]


@pytest.mark.parametrize(
    ("idle", "beside", "plays"),
    [
        ({"p2_gamma": 0.5, "p2_k": 2.0}, {"loss_weighting": "min_snr"}, {"loss_weighting": "p2"}),
        ({"init_random_share": 0.2}, {"init": "random"}, {"init": "partly_random"}),
        ({"multi_task_clusters": 3, "multi_task_division": "log_snr"}, {}, {"multi_task": "uncertainty"}),
        ({"multi_task_update_steps": 5}, {"multi_task": "uncertainty"}, {"multi_task": "nash"}),
        ({"teacher_update_steps": 5}, {}, {"teacher": "ema"}),
        ({"teacher": "ema", "teacher_update_steps": 5}, {"consistency_weight": 0.0}, {}),
        ({"teacher_dtype": "bfloat16"}, {"consistency_weight": 0.0}, {}),
        ({"timestep_sampling": "per_batch"}, {"global_prob": 0.0}, {"global_prob": 0.3}),
        ({"timestep_sampling": "per_batch"}, {"global_prob": 1.0}, {}),
        ({"ema_power": 0.6, "ema_max_decay": 0.99}, {"use_ema": False}, {}),
    ],
)
def test_what_plays_no_part_trains_nothing_anew(
    idle: dict[str, Any], beside: dict[str, Any], plays: dict[str, Any], pico_values: dict[str, Any]
) -> None:
    values = copy.deepcopy(pico_values)
    values["decouple"] |= {"num_ranges": 1}
    assert trainings(values, **beside, **idle) == trainings(values, **beside)
    assert set(trainings(values, **plays, **idle)).isdisjoint(trainings(values, **plays))


def test_start_that_is_wholly_or_not_at_all_random_is_that_one(pico_values: dict[str, Any]) -> None:
    for share, init in ((0.0, "pretrained"), (1.0, "random")):
        partly = trainings(pico_values, init="partly_random", init_random_share=share)
        assert partly == trainings(pico_values, init=init)


def test_both_names_of_a_weighting_keep_their_digests() -> None:
    assert DecoupleSettings(snr_gamma=5.0).effective() == {"snr_gamma": 5.0}
    assert DecoupleSettings(loss_weighting="min_snr").effective() == {"loss_weighting": "min_snr"}
    assert PretrainSettings(p2_k=3.0, validation_steps=7).effective() == {"validation_steps": 7}


def test_changed_holds_only_what_differs_from_the_defaults() -> None:
    assert Recipe().changed() == {}
    decouple = parse({"decouple": {"num_ranges": 4, "global_prob": 0.5, "learning_rate": 3e-4}}, where="x").decouple
    assert decouple.changed() == {"global_prob": 0.5, "learning_rate": 3e-4}  # 4 is the default
    nested = parse({"data": {"augment": {"flip": 0.5}}}, where="x").data
    assert nested.changed() == {"augment": {"flip": 0.5}}
    assert parse({"seeds": [0], "data": {"augment": {}}}, where="x").changed() == {}


@pytest.mark.parametrize("key", OFF)
def test_every_technique_has_an_off_value(key: str) -> None:
    recipe = load("digits", [f"{key}={OFF[key]}"]).recipe
    section, name = key.split(".")
    assert getattr(getattr(recipe, section), name) == OFF[key]
    stages = [node.stage for node in Graph(recipe).nodes]
    assert ("merge" not in stages) == (key == "merge.method")
    assert ("search" not in stages) == (key in ("merge.method", "merge.search"))


def test_all_techniques_off_at_once_is_plain_finetuning() -> None:
    graph = Graph(load("digits", [f"{key}={value}" for key, value in OFF.items()]).recipe)
    (expert,) = graph.experts[0]
    assert expert.arguments["subset"] == [[0, 1000]]
    # The one expert on everything is the all-timesteps control itself, so it is trained once.
    assert [node.digest for node in graph.nodes if node.stage == "decouple"] == [expert.digest]


@given(st.integers(1, 64), st.integers(0, 500))
def test_even_split_spends_the_budget_exactly(num_ranges: int, more: int) -> None:
    settings = DecoupleSettings(num_ranges=num_ranges, total_steps=num_ranges + more)
    steps = [settings.steps_of(i) for i in range(num_ranges)]
    assert sum(steps) == settings.total_steps == settings.budget
    assert max(steps) - min(steps) <= 1 and min(steps) >= 1


def test_steps_of_each_range_replace_the_even_split() -> None:
    settings = DecoupleSettings(num_ranges=3, range_steps=(5, 1, 2), total_steps=999)
    assert [settings.steps_of(i) for i in range(3)] == [5, 1, 2]
    assert settings.budget == 8


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().decouple.num_ranges = 3  # type: ignore[misc]


def test_keys_of_reaches_every_section() -> None:
    def check(section: type[BaseModel], path: list[str]) -> int:
        assert keys_of(path) == list(section.model_fields)
        inner = {name: field.annotation for name, field in section.model_fields.items()}
        inner = {name: kind for name, kind in inner.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}
        return 1 + sum(check(kind, [*path, name]) for name, kind in inner.items())

    assert check(Recipe, []) >= 12
    assert keys_of(["evaluate", "samplers", 1]) == list(SamplerSettings.model_fields)


def test_sampler_label_names_what_sets_it_apart() -> None:
    assert SamplerSettings().label == "DDIM-50"
    options = {"name": "DDPMScheduler", "num_inference_steps": 9, "eta": 0.5, "timestep_spacing": "trailing"}
    assert SamplerSettings.model_validate(options).label == "DDPM-9-eta0.5-trailing"


def test_nearest_name() -> None:
    assert nearest("learing_rate", ["learning_rate", "seed"]) == "; did you mean 'learning_rate'?"
    assert nearest("zzz", iter(["learning_rate", "seed"])) == ""
