"""The points of a sweep: every combination of values for some of a recipe's keys, all checked.

Knows texts and recipes; not data, backbones or what comes of a point.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from offramp_training.config import (
    Recipe,
    parse_recipe,
    refuse_without_effect,
    set_value,
    toml_value,
)
from offramp_training.errors import RecipeError

SEED = "loop.seed"

Settings = dict[str, Any]  # the grid's keys and one value each


@dataclass(frozen=True)
class Point:
    """One run to do."""

    name: str  # of its directory
    settings: Settings
    recipe: Recipe

    @property
    def configuration(self) -> Settings:
        return {key: value for key, value in self.settings.items() if key != SEED}


def parse_grid(axes: Iterable[str], seeds: str | None = None) -> dict[str, list[Any]]:
    """`section.key=[v1, v2, ...]` texts and a list of seeds, as keys and their values."""
    grid: dict[str, list[Any]] = {}
    for axis in axes:
        key, _, text = axis.partition("=")
        key, values = ".".join(part.strip() for part in key.split(".")), toml_value(text.strip())
        if not all(key.split(".")) or not isinstance(values, list) or not values:
            raise RecipeError(
                f"--grid {axis}: allowed: section.key=[value, value, ...] in TOML, "
                'e.g. optimiser.lr=[1e-4, 3e-4] or model.pooling=["cls", "mean"]'
            )
        _add_axis(grid, key, values)
    if seeds is not None:
        numbers = seeds.split(",")
        if not all(number.strip().isdecimal() for number in numbers):
            raise RecipeError(f"--seeds {seeds}: allowed: whole numbers, e.g. 0,1,2")
        _add_axis(grid, SEED, [int(number) for number in numbers])
    if not grid:
        raise RecipeError("nothing to sweep; allowed: --grid section.key=[v1, v2], --seeds 0,1,2")
    return grid


def _add_axis(grid: dict[str, list[Any]], key: str, values: list[Any]) -> None:
    if key in grid:
        raise RecipeError(f"{key} is in the grid twice; allowed: each key once")
    texts = [value_text(value) for value in values]
    if len(set(texts)) < len(texts):
        raise RecipeError(f"{key} = [{', '.join(texts)}]: a value is there twice")
    grid[key] = values


def make_points(table: dict[str, Any], grid: dict[str, list[Any]]) -> list[Point]:
    """Every combination of the grid's values as a checked recipe, the last key changing fastest."""
    points = []
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        name, changed = _directory_name(settings), copy.deepcopy(table)
        try:
            for key, value in settings.items():
                set_value(changed, key, value)
            points.append(Point(name, settings, parse_recipe(changed)))
        except RecipeError as error:
            raise RecipeError(f"point {name}: {error}") from None
    refuse_without_effect([point.recipe for point in points])
    names = [point.name for point in points]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RecipeError(f"two points would be called {twice}; allowed: values of one kind")
    return points


def _directory_name(settings: Settings) -> str:
    """Readable, and different for different values; parts that no file name can hold are cut."""
    text = ",".join(f"{key}={value_text(value)}" for key, value in settings.items())
    name = re.sub(r"[^A-Za-z0-9.,=_+-]+", "_", text.replace('"', ""))
    if name == text.replace('"', "") and len(name) <= 100:
        return name
    return f"{name[:90]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def value_text(value: Any) -> str:
    """A value as people read it; different for different values."""
    return json.dumps(value, ensure_ascii=False, default=str, separators=(",", ":"))
