"""A file of the repository as a module. Test and bench folders are not packages, so what one test
borrows of another's fixtures, or tries of a bench, is loaded by its path."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def load(path: str) -> ModuleType:
    """Runs the file at `path`, from the repository's root, anew under a name of its own."""
    name = "loaded_" + path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
