"""A YAML file as one more place where settings come from: `max_batch_tokens: 4096`, one a line.

A value in the file means what the same characters mean in the environment: nothing is guessed about
its type here, the setting decides. What the file says and no setting understands is refused with
its line. It knows YAML and the names it is given, and no setting in particular.
"""

from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path

import yaml

Value = str | list[str]

_NULLS = {"~", "null", "Null", "NULL"}


class ConfigFileError(ValueError):
    """A file that cannot be read, or that says something nobody understands."""


def read_config(path: Path, *, names: Collection[str], lists: Collection[str]) -> dict[str, Value]:
    """The settings that a file names. One without a value (`port:` or `port: null`) keeps its
    default.

    Raises:
        ConfigFileError: the file cannot be read or is not YAML; a key is none of `names`, comes
            twice, or has a list or more where it is none of `lists`. Names the line.
    """
    root = _compose(path)
    if root is None or _is_nothing(root):
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigFileError(f"{_where(path, root)}: allowed are lines of the form name: value")
    values: dict[str, Value] = {}
    seen: set[str] = set()
    for key, node in root.value:
        name = _name(path, key, names)
        if name in seen:
            raise ConfigFileError(f"{_where(path, key)}: {name} is there twice")
        seen.add(name)
        value = _value(node, is_list=name in lists)
        if value is None:
            allowed = "a value or a list of values" if name in lists else "one value"
            raise ConfigFileError(f"{_where(path, node)}: {name}: allowed is {allowed}")
        if not _is_nothing(node):
            values[name] = value
    return values


def _compose(path: Path) -> yaml.Node | None:
    """The file's structure, with nothing built from it; None if it is empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigFileError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigFileError(f"{path} is not UTF-8 text") from None
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        # The error's own text repeats the line, which may hold a key.
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigFileError(f"{path}{line}: this is not YAML") from None
    except RecursionError:
        raise ConfigFileError(f"{path} is nested too deeply") from None
    return node


def _name(path: Path, key: yaml.Node, names: Collection[str]) -> str:
    name = str(key.value) if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
    if name in names:
        return name
    near = get_close_matches(name.lower().lstrip("-").replace("-", "_"), names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigFileError(f"{_where(path, key)}: there is no setting {name[:60]!r}{hint}")


def _value(node: yaml.Node, *, is_list: bool) -> Value | None:
    """None: of a form that such a setting cannot have."""
    if isinstance(node, yaml.ScalarNode):
        return str(node.value)
    if is_list and isinstance(node, yaml.SequenceNode):
        items = [one.value for one in node.value if isinstance(one, yaml.ScalarNode)]
        return items if len(items) == len(node.value) else None
    return None


def _is_nothing(node: yaml.Node) -> bool:
    if not isinstance(node, yaml.ScalarNode):
        return False
    return not node.value or (node.style is None and node.value in _NULLS)


def _where(path: Path, node: yaml.Node) -> str:
    return f"{path}, line {node.start_mark.line + 1}"
