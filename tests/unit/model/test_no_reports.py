"""Nothing that runs a model tells anybody about it."""

import os
import subprocess
import sys
from pathlib import Path

MAKE_A_SESSION = """
from onnx import TensorProto, helper
from offramp_model.onnx_stack import make_session
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "g", [x], [y])
opset = helper.make_opsetid("", 17)
make_session(helper.make_model(graph, ir_version=8, opset_imports=[opset]).SerializeToString(), 1)
"""


def test_onnxruntime_prepares_no_reports(tmp_path: Path) -> None:
    """A build that reports keeps an identifier and what it is to send under the home directory."""
    environment = os.environ | {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run([sys.executable, "-c", MAKE_A_SESSION], env=environment, check=True, timeout=50)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
