"""The reference page of recipes, made from the sentences at their keys.

python -m compressor.recipe_reference > docs/recipe.md
"""

from __future__ import annotations

from typing import Any

from pydantic.fields import FieldInfo

from compressor.recipe import BUDGETS, FORMER_NAMES, Budget, Recipe, Section


def reference() -> str:
    """`docs/recipe.md`: every key with its default and its sentence, section by section."""
    lines = [
        "# Every key of a recipe",
        "",
        "A recipe is a YAML file: `compressor compress --recipe mine.yaml --output RUN`. Options of the command line",
        "win over it. Every run keeps its recipe, with all defaults filled in, in `RUN/recipe.yaml`. This page is made",
        "from the code (`python -m compressor.recipe_reference`).",
        "",
        *table(Recipe),
    ]
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            lines += ["", f"## {name}", "", str(field.annotation.__doc__), "", *table(field.annotation)]
    lines += ["", "## Budgets", "", "What `effort` sets, where a key is not set by itself:", ""]
    lines += [f"| | {' | '.join(BUDGETS)} |", f"|---|{'---|' * len(BUDGETS)}"]
    for key, field in Budget.model_fields.items():
        values = [getattr(budget, key) for budget in BUDGETS.values()]
        cells = ["all" if value is None else f"{value:,}" for value in values]
        lines.append(f"| {_sentence(field)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def table(model: type[Section]) -> list[str]:
    """The keys of one section as a Markdown table."""
    rows = ["| key | default | |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            continue
        former = f" (Once called `{FORMER_NAMES[name]}`.)" if name in FORMER_NAMES else ""
        rows.append(f"| `{name}` | {_default(field)} | {_sentence(field)}{former} |")
    return rows


def _sentence(field: FieldInfo) -> str:
    if not field.description:
        raise ValueError(f"{field!r} has no sentence")
    return " ".join(field.description.split())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value: Any = field.get_default(call_default_factory=True)
    if value is None or value == []:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, dict):
        return f"`{{{', '.join(f'{key}: {number}' for key, number in value.items())}}}`"
    return f"`{value}`"


if __name__ == "__main__":
    print(reference(), end="")
