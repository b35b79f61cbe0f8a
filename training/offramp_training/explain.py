"""What is wrong with values that pydantic refused: the key, the value, and all that is allowed.

pydantic says which bound was crossed; whoever has to mend a recipe wants both bounds and every
alternative, so those are read from the model's JSON schema. Knows nothing about recipes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

NAMES = {"number": "a number", "integer": "a whole number", "string": "text",
         "boolean": "true or false", "object": "a table"}  # fmt: skip


def explain(
    error: ValidationError, model: type[BaseModel], values: dict[str, Any], prefix: str = ""
) -> str:
    """The findings on `values`, one per key: `section.key = value; allowed: ...`.

    With a `prefix`, `values` are those of that section alone.
    """
    lines: dict[str, str] = {}
    for problem in error.errors():
        place = [str(part) for part in problem["loc"]]
        if problem["type"] != "extra_forbidden":  # that one's key may be anything
            # The alternatives of a union follow the key: pydantic's business, not the user's.
            place = [part for part in place if part.isidentifier()]
        place = place[:1] if prefix else place[:2]
        key = prefix + ".".join(place)
        lines.setdefault(key, _finding(key, place, problem, model, values))
    return "; ".join(lines.values())


def _finding(
    key: str, place: list[str], problem: Any, model: type[BaseModel], values: dict[str, Any]
) -> str:
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    for name in place[:-1]:
        model = type(model.model_fields[name].get_default(call_default_factory=True))
        values = values[name]
    keys = model.model_json_schema()["properties"]
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; allowed: {', '.join(keys)}"
    words = allowed(keys[place[-1]])
    if problem["type"] == "finite_number":  # of which the schema says nothing
        words = words.replace("a number", "a finite number")
    return f"{key} = {values[place[-1]]!r}; allowed: {words}"


def allowed(schema: dict[str, Any]) -> str:
    """What a JSON schema lets through, in words."""
    one_of = [one for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]
    return ", or ".join(_one(one) for one in one_of)


def _one(schema: dict[str, Any]) -> str:
    choices = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if choices:
        *first, last = map(repr, choices)
        return f"{', '.join(first)} or {last}" if first else last
    if schema.get("type") == "array":
        items = [allowed(one) for one in schema.get("prefixItems", [schema.get("items", {})])]
        count = "one or more" if schema.get("minItems") else ""
        of = f" of {len(items) if 'prefixItems' in schema else count}".removesuffix(" of ")
        return f"a list{of}, each {' or '.join(dict.fromkeys(items))}"
    name = NAMES.get(schema.get("type", "object"), "a table")
    return " ".join([name, " and ".join(_bounds(schema))]).rstrip()


def _bounds(schema: dict[str, Any]) -> Iterator[str]:
    if "minimum" in schema and "maximum" in schema:
        yield f"from {schema['minimum']} to {schema['maximum']}"
        return
    for key, words in (
        ("minimum", "from {} on"),
        ("exclusiveMinimum", "above {}"),
        ("maximum", "up to {}"),
        ("exclusiveMaximum", "below {}"),
    ):
        if key in schema:
            yield words.format(schema[key])
