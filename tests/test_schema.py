"""The JSON Schema that editors use: up to date, true to the packaged recipes, and strict about unknown keys."""

import json
from typing import Any

import jsonschema
import pytest
import yaml

from deme_diffusion.recipes import PACKAGED, load, packaged
from deme_diffusion.recipes.schema import SCHEMA, schema


@pytest.fixture(scope="module")
def validator() -> jsonschema.protocols.Validator:
    shipped = json.loads((PACKAGED / SCHEMA).read_text())
    jsonschema.Draft202012Validator.check_schema(shipped)
    return jsonschema.Draft202012Validator(shipped)


def problems(validator: jsonschema.protocols.Validator, values: Any) -> list[str]:
    return [error.message for error in validator.iter_errors(values)]


def test_shipped_schema_is_what_the_settings_say() -> None:
    """When this fails: deme recipes --schema > src/deme_diffusion/recipes/deme.schema.json"""
    assert json.loads((PACKAGED / SCHEMA).read_text()) == schema()


@pytest.mark.parametrize("name", list(packaged()))
def test_packaged_recipes_name_the_schema_and_hold_to_it(validator: jsonschema.protocols.Validator, name: str) -> None:
    text = (PACKAGED / f"{name}.yaml").read_text()
    assert text.startswith(f"# yaml-language-server: $schema={SCHEMA}\n")
    assert problems(validator, yaml.safe_load(text)) == []


@pytest.mark.parametrize("name", list(packaged()))
def test_resolved_recipes_hold_to_it_as_well(validator: jsonschema.protocols.Validator, name: str) -> None:
    assert problems(validator, load(name).recipe.model_dump(mode="json")) == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"decople": {}}, "'decople' was unexpected"),
        ({"decouple": {"num_rangs": 2}}, "'num_rangs' was unexpected"),
        ({"evaluate": {"samplers": [{"nme": "DDIMScheduler"}]}}, "'nme' was unexpected"),
        ({"decouple": {"global_prob": 1.5}}, "1.5 is greater than the maximum of 1.0"),
        ({"decouple": {"projection": "residul"}}, "'residul' is not one of"),
        ({"extends": 3}, "3 is not of type 'string'"),
        ({"name": "a b"}, "'a b' does not match"),
    ],
)
def test_what_a_recipe_may_not_hold(validator: jsonschema.protocols.Validator, values: Any, said: str) -> None:
    assert any(said in problem for problem in problems(validator, values))


def test_every_setting_of_every_section_has_a_type_and_sections_say_what_they_are() -> None:
    made = schema()
    assert "yaml-language-server" in made["description"]
    for name, section in made["$defs"].items():
        assert section.get("description"), name
        assert section["additionalProperties"] is False, name
