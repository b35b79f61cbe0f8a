"""The Helm chart's own workshop: what of it is made from other files, and what is made from it.

    chart.py sync            write the made parts of the chart (`make chart`)
    chart.py manifests       write deploy/kubernetes from the chart (`make manifests`); with
                             --to DIRECTORY, elsewhere
    chart.py package         write dist/offramp-VERSION.tgz; --to as above
    chart.py lint FILE...    lint the chart with each file of values; exit 1 with the findings
    chart.py render FILE...  a JSON list: for each file of values, its objects and the notes

Made from other files are the schema of `config` (from the service's settings), the table of values
in the README (from values.yaml), and the copies of Prometheus rules and Grafana dashboards, which a
chart can only use from inside its own folder. Tests ask whether all of it is up to date.

Helm itself comes as a Python library with the `dev` extra; no cluster and no network is asked.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CHART = ROOT / "deploy/helm/offramp"
MANIFESTS = ROOT / "deploy/kubernetes"

RELEASE, NAMESPACE = "offramp", "offramp"

# What the chart says itself, or what would not serve.
OWN = {
    *("config", "model", "model_id", "served_model_name", "hostname", "port"),
    *("api_key", "api_key_file", "admin_key_file", "dry_run", "preload_only"),
}
# The grace period is reckoned from these.
NEEDED = ("drain_seconds", "shutdown_timeout")
COPIES = {
    "files/rules": ("deploy/prometheus/rules", "*.yml"),
    "files/dashboards": ("deploy/grafana/dashboards", "*.json"),
}
BEGIN, END = "<!-- values: made by `make chart` -->\n", "<!-- values end -->\n"

Values = dict[str, Any]


# -- made from other files -------------------------------------------------------------------


def config_schema() -> Values:
    """The schema of `config`: each setting with type, bounds and meaning; null is the default."""
    from offramp_service.settings import Settings

    properties = {}
    for name, field in Settings.model_json_schema()["properties"].items():
        if name in OWN:
            continue
        (form,) = [one for one in field.pop("anyOf", [field]) if one != {"type": "null"}]
        form = {key: one for key, one in (form | field).items() if key not in ("title", "default")}
        if name not in NEEDED:
            form["type"] = [form["type"], "null"]
            if "enum" in form:
                form["enum"] = [*form["enum"], None]
        properties[name] = form
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(NEEDED),
        "properties": properties,
    }


def schema() -> str:
    path = CHART / "values.schema.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    whole["properties"]["config"] = config_schema()
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def values_table() -> str:
    """Each value with a comment that begins with `# --`, as rows of Markdown."""
    lines = (CHART / "values.yaml").read_text(encoding="utf-8").splitlines()
    root = yaml.compose("\n".join(lines), Loader=yaml.SafeLoader)
    rows = ["| value | default | meaning |", "|---|---|---|"]
    for name, default, text in _commented(root, lines):
        rows.append(f"| `{name}` | `{default}` | {text} |")
    return "\n".join(rows) + "\n"


def _commented(
    node: yaml.MappingNode, lines: list[str], above: str = ""
) -> Iterator[tuple[str, str, str]]:
    for key, value in node.value:
        name = f"{above}{key.value}"
        text = _comment(lines, key.start_mark.line)
        if text is not None:
            default = json.dumps(_plain(value), ensure_ascii=False)
            yield name, default if len(default) < 50 else "see values.yaml", text
        elif isinstance(value, yaml.MappingNode) and value.value:
            yield from _commented(value, lines, f"{name}.")
        else:
            raise ValueError(f"values.yaml: {name} has no comment that begins with `# --`")


def _comment(lines: list[str], number: int) -> str | None:
    """What stands directly above a line, if it begins with `# --`."""
    first = number
    while first and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    words = " ".join(line.lstrip().removeprefix("#").strip() for line in lines[first:number])
    return words.removeprefix("-- ").replace("|", "\\|") if words.startswith("-- ") else None


def _plain(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    return loader.construct_object(node, deep=True)


def readme() -> str:
    text = (CHART / "README.md").read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return before + BEGIN + values_table() + END + rest.split(END)[1]


def copies() -> dict[Path, str]:
    """What the chart's copies of other folders' files must be."""
    return {
        CHART / inside / source.name: source.read_text(encoding="utf-8")
        for inside, (outside, pattern) in COPIES.items()
        for source in sorted((ROOT / outside).glob(pattern))
    }


def made() -> dict[Path, str]:
    """All that `sync` writes, by path."""
    return {CHART / "values.schema.json": schema(), CHART / "README.md": readme()} | copies()


def sync() -> None:
    contents = made()
    for inside, (_, pattern) in COPIES.items():
        for path in (CHART / inside).glob(pattern):
            if path not in contents:
                path.unlink()
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


# -- made from the chart ---------------------------------------------------------------------


def render(values: Values, name: str = RELEASE, namespace: str = NAMESPACE) -> dict[str, Any]:
    """Objects by the template that they are from, and the notes.

    Raises:
        helm_python.HelmError: the values are refused.
    """
    import helm_python

    with helm_python.Chart.load(CHART) as chart:
        rendered = chart.render(values, name=name, namespace=namespace)
    objects: dict[str, list[Values]] = {}
    for path, text in sorted(rendered.items()):
        template = path.split("/templates/", 1)[1]
        if template.endswith(".yaml"):
            documents = [one for one in yaml.safe_load_all(text) if one]
            if documents:
                objects[template] = documents
    return {"objects": objects, "notes": rendered[f"{CHART.name}/templates/NOTES.txt"]}


def lint(values: Values) -> list[str]:
    import helm_python

    report = helm_python.lint(CHART, values, strict=True)
    return [f"{one['path']}: {one['error']}" for one in report["messages"] if one["severity"] > 1]


def manifests() -> dict[str, str]:
    """The plain manifests by file: the chart's objects without what only Helm needs."""
    values = yaml.safe_load((MANIFESTS / "values.yaml").read_text(encoding="utf-8"))
    files = {}
    for template, documents in render(values)["objects"].items():
        if template.startswith("tests/"):
            continue
        for document in documents:
            _forget_helm(document)
        head = "# Made from deploy/helm/offramp with values.yaml (`make manifests`).\n"
        body = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=100)
        files[template] = head + body
    return files


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as such, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _forget_helm(node: Any) -> None:
    if isinstance(node, dict):
        node.pop("helm.sh/chart", None)
        if node.get("app.kubernetes.io/managed-by") == "Helm":
            del node["app.kubernetes.io/managed-by"]
        for value in node.values():
            _forget_helm(value)
    elif isinstance(node, list):
        for value in node:
            _forget_helm(value)


# -- the command -----------------------------------------------------------------------------


def _read(path: str) -> Values:
    values: Values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return values


def main(command: str = "", *files: str) -> int:
    if command == "sync":
        sync()
    elif command == "manifests":
        directory = Path(files[1]) if files[:1] == ("--to",) else MANIFESTS
        for name, content in manifests().items():
            (directory / name).write_text(content, encoding="utf-8")
    elif command == "package":
        import helm_python

        directory = Path(files[1]) if files[:1] == ("--to",) else ROOT / "dist"
        directory.mkdir(exist_ok=True)
        print(helm_python.package(CHART, destination=directory))
    elif command == "lint":
        found = [f"{file}: {one}" for file in files for one in lint(_read(file))]
        print("\n".join(found) if found else f"{len(files)} files of values: nothing found")
        return 1 if found else 0
    elif command == "render":
        print(json.dumps([render(_read(file)) for file in files]))
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
