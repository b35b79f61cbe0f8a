"""Writes the pages under `docs/reference/` from the code: flags, routes, recipes.

    python scripts/reference.py           # write
    python scripts/reference.py --check   # complain about pages that are not what the code says

Only what the code already says is here: pages that explain are written by hand, beside them.
"""

import argparse
import importlib.util
import inspect
import json
import sys
import tempfile
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from offramp_service.app import create_app
from offramp_service.settings import Settings
from offramp_training.config import Recipe
from offramp_training.objectives import OBJECTIVES

ROOT = Path(__file__).parent.parent
SUPPORT = ROOT / "tests" / "unit" / "service" / "support.py"
PAGES = ROOT / "docs" / "reference"
NOTE = "<!-- Written by `make reference` from the code; do not edit. -->\n\n"


def flags() -> str:
    """`offramp-serve`: every flag, its environment variable, its default, what it does."""
    lines = [
        "# Flags of `offramp-serve`\n",
        "A flag wins over the environment variable of the same name, that over the line of a YAML "
        "file given as `--config`\n(`max_batch_tokens: 4096`), that over the default.\n",
        "| flag | environment | default | what |",
        "|---|---|---|---|",
    ]
    for name, field in Settings.model_fields.items():
        flag = f"`--{name.replace('_', '-')}`"
        given = field.description or ""
        what = "; ".join(part for part in (given, _allowed(field)) if part)
        lines.append(f"| {flag} | `{name.upper()}` | {_default(field.default)} | {_cell(what)} |")
    return "\n".join(lines) + "\n"


def routes() -> str:
    """The HTTP routes, from the OpenAPI document of a server."""
    document = _openapi()
    lines = [
        "# Routes\n",
        "The same, with every schema, is at `/openapi.json` and `/docs` of a running server. "
        "Controls and the shapes of the\nthree doors are explained in [doors.md](../doors.md).\n",
        "| route | what | body | answers |",
        "|---|---|---|---|",
    ]
    for path, methods in document["paths"].items():
        for method, one in methods.items():
            body = one.get("requestBody", {}).get("content", {}).get("application/json", {})
            named = body.get("schema", {}).get("$ref", "").rpartition("/")[2]
            answers = ", ".join(sorted(one.get("responses", {})))
            lines.append(
                f"| `{method.upper()} {path}` | {_cell(one.get('summary', ''))} | "
                f"{f'[{named}](#{named.lower()})' if named else ''} | {answers} |"
            )
    for name, schema in sorted(document.get("components", {}).get("schemas", {}).items()):
        lines += ["", f"## {name}\n", *_schema(schema)]
    return "\n".join(lines) + "\n"


def recipes() -> str:
    """Every key of a recipe."""
    lines = [
        "# Recipes of `offramp-train`\n",
        "A TOML file with these tables. `--set section.key=value` changes a key on the command "
        "line; an unknown key is refused,\nand so is a value that is not allowed.\n",
    ]
    for name, field in Recipe.model_fields.items():
        if name == "objective":
            continue
        lines += [f"## `[{name}]`\n", *_keys(_model(field.annotation))]
    lines += [
        "## `[objective]`\n",
        "`name` says which; the other keys are its own. What each buys is in "
        "[objectives.md](../objectives.md).\n",
    ]
    for name, kind in OBJECTIVES.items():
        lines += [f'### `name = "{name}"`\n', *_keys(kind)]
    return "\n".join(lines).rstrip() + "\n"


PAGE_MAKERS = {"flags.md": flags, "routes.md": routes, "recipes.md": recipes}


def _keys(kind: Any) -> list[str]:
    doc = inspect.getdoc(kind) or ""
    comments = _comments(kind)
    fields = getattr(kind, "model_fields", {})
    rows = []
    for name, field in fields.items():
        if name != "name":
            default = _default(field.get_default(call_default_factory=True))
            row = (f"`{field.alias or name}`", _cell(_type(field.annotation)), default)
            rows.append(f"| {' | '.join(row)} | {_cell(comments.get(name, ''))} |")
    head = ["| key | type | default | what |", "|---|---|---|---|"]
    return [
        doc.split("\n\n")[0].replace("\n", " ") + "\n",
        *(head + rows if rows else ["No keys."]),
        "",
    ]


def _comments(kind: Any) -> dict[str, str]:
    """What stands beside the fields in the source, and above them."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(kind).splitlines():
        code, _, comment = line.partition("  # ") if "  # " in line else (line, "", "")
        stripped = line.strip()
        if stripped.startswith("# "):
            above.append(stripped[2:])
            continue
        name, colon, _ = code.strip().partition(":")
        if colon and name.isidentifier():
            found[name] = " ".join([*above, comment.strip()]).strip()
        above = []
    return found


def _schema(schema: dict[str, Any]) -> Iterator[str]:
    if text := schema.get("description"):
        yield text.split("\n\n")[0].replace("\n", " ") + "\n"
    yield "| field | type | default | what |"
    yield "|---|---|---|---|"
    required = schema.get("required", ())
    for name, one in schema.get("properties", {}).items():
        default = "required" if name in required else f"`{json.dumps(one.get('default'))}`"
        what = _cell(one.get("description", ""))
        yield f"| `{name}` | {_cell(_json_type(one))} | {default} | {what} |"


def _json_type(one: dict[str, Any]) -> str:
    if "$ref" in one:
        return str(one["$ref"]).rpartition("/")[2]
    if "enum" in one:
        return " or ".join(json.dumps(value) for value in one["enum"])
    for several in ("anyOf", "oneOf"):
        if several in one:
            return " or ".join(dict.fromkeys(_json_type(part) for part in one[several]))
    if one.get("type") == "array":
        return f"list of {_json_type(one.get('items', {}))}"
    kind = one.get("type", "anything")
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _openapi() -> dict[str, Any]:
    """Of a server of a tiny model whose name is `model`."""
    spec = importlib.util.spec_from_file_location("support", SUPPORT)
    assert spec is not None
    assert spec.loader is not None
    support = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(support)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = support.write_tiny_checkpoint(Path(directory) / "tiny")
        app = create_app(Settings(model_id=checkpoint, served_model_name="model", threads=1))
        return app.openapi()


def _model(annotation: Any) -> type[BaseModel]:
    assert isinstance(annotation, type), annotation
    assert issubclass(annotation, BaseModel), annotation
    return annotation


def _allowed(field: Any) -> str:
    """The values that a flag takes, where they can be listed, and its bounds."""
    annotation = field.annotation
    options = [one for part in _parts(annotation) for one in _literals(part)]
    said = [" or ".join(f"`{one}`" for one in options)] if options else []
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        f"{sign} {getattr(one, key):g}"
        for one in field.metadata
        for key, sign in signs.items()
        if getattr(one, key, None) is not None
    ]
    return ", ".join(said + bounds)


def _parts(annotation: Any) -> tuple[Any, ...]:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return typing.get_args(annotation)
    return (annotation,)


def _literals(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()


def _type(annotation: Any) -> str:
    """As a person would write it."""
    parts = []
    for part in _parts(annotation):
        if typing.get_origin(part) is typing.Annotated:
            part = typing.get_args(part)[0]
        if literals := _literals(part):
            parts += [json.dumps(one) for one in literals]
        elif typing.get_origin(part) is tuple:
            inner = [_type(one) for one in typing.get_args(part) if one is not Ellipsis]
            parts.append(f"list of {inner[0]}")
        elif typing.get_origin(part) is dict:
            parts.append("table")
        elif part is not type(None):
            parts.append(getattr(part, "__name__", str(part)))
    return " or ".join(dict.fromkeys(parts))


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if value is None or value == ():
        return ""
    if isinstance(value, BaseModel):
        return ""
    return f"`{json.dumps(value)}`" if isinstance(value, (bool, list, tuple)) else f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is old")
    arguments = parser.parse_args()
    old = []
    for name, make in PAGE_MAKERS.items():
        page, text = PAGES / name, NOTE + make()
        if arguments.check:
            if not page.exists() or page.read_text() != text:
                old.append(name)
        else:
            PAGES.mkdir(parents=True, exist_ok=True)
            page.write_text(text)
    if old:
        print(f"{', '.join(old)}: not what the code says; `make reference` writes them anew")
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
