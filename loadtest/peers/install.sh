#!/bin/sh
# A virtual environment for one peer, with what its requirements name and nothing of offramp's.
#   sh loadtest/peers/install.sh PEER DIRECTORY       PYTHON  interpreter to start from
#
# torch goes first, as in scripts/install.sh: the CPU build. Does nothing where the environment was
# made from the same requirements.
set -eu

PYTHON=${PYTHON:-python3}
CPU_INDEX=https://download.pytorch.org/whl/cpu
wanted=$(cd "$(dirname "$0")" && pwd)/requirements/$1.txt
venv=$2/$1

cmp -s "$wanted" "$venv/.installed" && exit 0
echo "installing $1 into $venv" >&2
"$PYTHON" -m venv --clear "$venv"
pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
torch=$(grep '^torch==' "$wanted")
pip install "$torch+cpu" 2>/dev/null || pip install "$torch" --index-url "$CPU_INDEX"
pip install --requirement "$wanted"
cp "$wanted" "$venv/.installed"
