"""The shape of the repository, where a machine can check it."""

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from offramp_kernels import contract
from offramp_model import rows

ROOT = Path(__file__).parents[2]
PACKAGES = [
    "offramp_kernels",
    "offramp_loadtest",
    "offramp_model",
    "offramp_service",
    "offramp_training",
]


@pytest.mark.parametrize("folder", ["kernels", "model", "service", "training", "loadtest"])
def test_top_folders_are_not_packages(folder: str) -> None:
    # A package `kernels` at the root is what transformers would import as Hugging Face's.
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed_and_their_exports_sorted(package: str) -> None:
    module = importlib.import_module(package)
    assert (Path(str(module.__file__)).parent / "py.typed").exists()
    exported = getattr(module, "__all__", [])
    constants = [name for name in exported if name.isupper()]
    classes = [name for name in exported if not name.isupper() and name[0].isupper()]
    others = [name for name in exported if name[0].islower()]
    assert list(exported) == sorted(constants) + sorted(classes) + sorted(others)
    assert all(hasattr(module, name) for name in exported)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_says_what_it_is(package: str) -> None:
    module = importlib.import_module(package)
    for path in Path(str(module.__file__)).parent.rglob("*.py"):
        assert path.read_text(encoding="utf-8").lstrip().startswith('"""'), path


def test_the_version_is_in_the_changelog() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(.+?)\]", changelog, re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == project["version"]


def test_batches_hold_what_the_kernels_take() -> None:
    assert rows.MAX_ROWS == contract.MAX_ROWS


def test_the_command_that_serves_loads_no_torch() -> None:
    """Until a checkpoint is opened that runs in it; graphs never do (tests/e2e)."""
    unwanted = ("torch", "triton", "onnx", "onnxruntime", "matplotlib", "offramp_kernels")
    program = f"""
import sys
import offramp_model, offramp_service.__main__
print([name for name in {unwanted} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_the_model_and_the_service_do_not_load_transformers() -> None:
    """What answers requests needs `tokenizers` only; imports inside functions count too."""
    for package in ("offramp_kernels", "offramp_model", "offramp_service"):
        module = importlib.import_module(package)
        for path in Path(str(module.__file__)).parent.rglob("*.py"):
            assert not re.search(
                r"^\s*(import|from) transformers", path.read_text(encoding="utf-8"), re.MULTILINE
            ), path
