"""What FastAPI cannot see of routes that read and write their own bodies: their JSON schemas."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

MEANINGS = {
    "400": "Malformed or empty",
    "401": "No valid API key, where the server asks for one",
    "404": "Unknown model",
    "413": "Body too large or too many texts",
    "422": "A value or a length is not allowed",
    "429": "Queue full; see Retry-After",
    "500": "The model failed",
    "503": "Starting or shutting down; see Retry-After",
    "504": "No answer in time",
}


def of_question(
    request: type, failure: type, *answers: Any, also: dict[str, str] | None = None
) -> dict[str, Any]:
    """A route that answers a body, in one of several forms; `also` are status codes beside the
    usual ones."""
    asked, failed, *answered = _schemas(request, failure, *answers)
    # Unknown fields are ignored, not refused (see `Reader`).
    body = _open(asked)
    return {
        "requestBody": {"required": True, "content": _json(body)},
        "responses": {
            "200": {
                "description": "Answers in the order of the texts",
                "content": _json(answered[0] if len(answered) == 1 else {"anyOf": answered}),
            },
            **_failures(MEANINGS | (also or {}), failed),
        },
    }


def of_telling(answer: type, request: type | None = None) -> dict[str, Any]:
    """A route that tells, or changes what it tells; errors are worded as on `/classify`."""
    told, *asked = _schemas(answer, *([request] if request is not None else []))
    body = {"requestBody": {"required": True, "content": _json(asked[0])}} if asked else {}
    codes = ("400", "401", "404", "413", "422") if asked else ("401",)
    return {
        **body,
        "responses": {
            "200": {"description": "As it is now", "content": _json(told)},
            **{code: {"description": MEANINGS[code]} for code in codes},
        },
    }


def path_parameters(path: str, served: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """What stands in a path: names, and the values of each that are served here."""
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "enum": values}}
        for name, values in served.items()
        if f"{{{name}}}" in path
    ]


def _failures(meanings: dict[str, str], failed: Any) -> dict[str, Any]:
    return {
        code: {"description": text, "content": _json(failed)} for code, text in meanings.items()
    }


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _open(schema: Any) -> Any:
    """Objects with named fields may have others."""
    if isinstance(schema, dict):
        opened = {key: _open(value) for key, value in schema.items()}
        return opened | {"additionalProperties": True} if "properties" in opened else opened
    return [_open(one) for one in schema] if isinstance(schema, list) else schema


def _schemas(*kinds: Any) -> list[Any]:
    """Schemas with references resolved in place: FastAPI has no room for foreign components."""
    schemas, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )

    def inline(value: Any) -> Any:
        if isinstance(value, list):
            return [inline(one) for one in value]
        if not isinstance(value, dict):
            return value
        reference = value.get("$ref")
        if isinstance(reference, str):
            return inline(components[reference.rpartition("/")[2]])
        return {key: inline(one) for key, one in value.items()}

    return [inline(one) for one in schemas]
