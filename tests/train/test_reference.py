"""docs/recipe.md says what the schema says."""

from pathlib import Path

from sideroad.train.recipe import Recipe
from sideroad.train.reference import recipe_reference

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"


def test_page_is_up_to_date():
    fix = "run: python -m sideroad.train.reference > docs/recipe.md"
    assert PAGE.read_text(encoding="utf-8") == recipe_reference(), fix


def test_every_key_has_a_row_and_a_description():
    text = recipe_reference()
    for section, field in Recipe.model_fields.items():
        keys = getattr(field.annotation, "model_fields", {})
        for key in keys:
            if key == "method":
                continue
            row = next(line for line in text.splitlines() if line.startswith(f"| `{section}.{key}` |"))
            assert not row.endswith("|  |"), f"{section}.{key} has no description"
