"""Lint: what the interpreter forgives and a GPU does not, read from the kernels' source."""

import ast
from pathlib import Path

import pytest

import offramp_kernels

PACKAGE = Path(offramp_kernels.__file__).parent
KERNEL_FILES = sorted(PACKAGE.glob("*_kernel.py"))


def loads(source: str) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "load"
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "tl"
    ]


def is_masked(load: ast.Call) -> bool:
    return len(load.args) > 1 or any(keyword.arg == "mask" for keyword in load.keywords)


def has_other(load: ast.Call) -> bool:
    return len(load.args) > 2 or any(keyword.arg == "other" for keyword in load.keywords)


def test_there_are_kernels_to_read() -> None:
    assert {path.name for path in KERNEL_FILES} >= {
        "add_layernorm_kernel.py",
        "compact_plan_kernel.py",
        "exit_head_kernel.py",
        "gather_rows_kernel.py",
        "linear_kernel.py",
        "varlen_attn_kernel.py",
    }


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.stem)
def test_every_masked_load_says_what_the_masked_lanes_hold(path: Path) -> None:
    masked = [load for load in loads(path.read_text()) if is_masked(load)]
    assert masked
    assert [load.lineno for load in masked if not has_other(load)] == []


@pytest.mark.parametrize(
    "source", ["tl.load(p, mask=m)", "tl.load(p, m)", "tl.load(p + i, mask=a & b, eviction=e)"]
)
def test_the_lint_sees_a_load_without_other(source: str) -> None:
    (load,) = loads(source)
    assert is_masked(load)
    assert not has_other(load)


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.stem)
def test_launchers_neither_tune_nor_wait(path: Path) -> None:
    """The one wait allowed is ``plan.read_counts``, where the answer's size is asked for."""
    names = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert names.isdisjoint({"item", "tolist", "cpu", "numpy", "synchronize", "autotune"})
