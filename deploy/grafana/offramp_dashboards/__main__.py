"""`python -m offramp_dashboards [FOLDER]`: writes each dashboard as JSON."""

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from offramp_dashboards import early_exit, host_and_gpu, overview, slo_control
from offramp_dashboards.board import Board

FOLDER = Path(__file__).parents[1] / "dashboards"
BOARDS = (overview.BOARD, early_exit.BOARD, slo_control.BOARD, host_and_gpu.BOARD)


def encode(board: Board) -> str:
    """As it is committed: indented, one line end at the end."""
    return json.dumps(board.build(), cls=JSONEncoder, indent=2, ensure_ascii=False) + "\n"


def main(folder: Path) -> None:
    for board in BOARDS:
        (folder / f"{board.uid}.json").write_text(encode(board), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
