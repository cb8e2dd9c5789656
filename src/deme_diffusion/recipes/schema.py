"""The JSON Schema of recipes, made from the settings themselves: what editors check and complete. No torch."""

from __future__ import annotations

from typing import Any

from deme_diffusion.config import Recipe

SCHEMA = "deme.schema.json"
DESCRIPTION = (
    "A recipe of deme-diffusion: a whole run. To have an editor check and complete one: save this schema beside it, "
    f"deme recipes --schema > {SCHEMA}, and begin it with the line `# yaml-language-server: $schema={SCHEMA}` (VS Code "
    "with the YAML extension, Neovim, Helix, Emacs), or map the file in the editor's settings (VS Code: yaml.schemas; "
    "JetBrains: JSON Schema Mappings)."
)
EXTENDS = {
    "type": "string",
    "description": "a packaged recipe, or a YAML file (a path from this one's folder), whose settings these change",
}


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe's YAML, with defaults, limits and descriptions."""
    made = Recipe.model_json_schema()
    made["properties"] = {"extends": EXTENDS, **made["properties"]}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "deme recipe"}
    return {**head, "description": DESCRIPTION, **{k: v for k, v in made.items() if k not in ("title", "description")}}
