"""Who is compared: each server's command, the settings it may choose from, and what it is asked.

Every server gets the same weights, the same cores, and the settings of idle threads and of the
allocator that offramp's own command makes for itself. Tables and command lines only: nothing here
runs or measures.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from adapters import Adapter, infinity, offramp, plain, triton

HERE = Path(__file__).parent
Setting = dict[str, Any]
Kind = Literal["torch", "onnx", "offramp"]

FREED_MEMORY_KEPT = str(256 << 20)
PEER_ENVIRONMENT = {
    # As offramp-serve does for itself: idle threads spin for microseconds, freed memory is kept.
    "GOMP_SPINCOUNT": "10000",
    "MALLOC_TRIM_THRESHOLD_": FREED_MEMORY_KEPT,
    "MALLOC_MMAP_THRESHOLD_": FREED_MEMORY_KEPT,
    "TOKENIZERS_PARALLELISM": "false",
    # Nothing is fetched and nothing is reported.
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "PYTHONPATH": "",
}


@dataclass(frozen=True)
class Places:
    """Where things lie."""

    cache: Path  # environments, weights, logs
    checkpoint: Path
    int8: Path

    @property
    def final_head(self) -> Path:
        return self.cache / "weights" / "final-head"

    @property
    def graphs(self) -> Path:
        return self.cache / "weights" / "int8"

    def python(self, environment: str) -> Path:
        return self.cache / environment / "bin" / "python"


@dataclass(frozen=True)
class Server:
    """A process to start, in one of the settings of its grid."""

    name: str
    environment: str  # its virtual environment; "" is offramp's own
    adapter: Adapter  # what it is asked while it is tuned
    grid: tuple[Setting, ...]
    command: Callable[[Setting, Places, int], list[str]]

    def variables(self, setting: Setting, places: Places) -> dict[str, str]:
        """Environment variables beyond those there are."""
        if not self.environment:
            return {}
        own = {"OMP_NUM_THREADS": str(setting["threads"]), "HF_HOME": str(places.cache / "hf")}
        return PEER_ENVIRONMENT | own


@dataclass(frozen=True)
class Subject:
    """A row of the table: a server as it is asked."""

    name: str
    server: str
    adapter: Adapter
    kind: Kind


def every(**choices: Sequence[Any]) -> Iterable[Setting]:
    """All combinations."""
    names = list(choices)
    return (dict(zip(names, values, strict=True)) for values in product(*choices.values()))


def _with(base: Setting, *changes: Setting) -> tuple[Setting, ...]:
    """A setting, and others that differ from it in a few things."""
    return tuple(base | change for change in ({}, *changes))


# -- commands ------------------------------------------------------------------------------------


def _written_here(script: str, environment: str) -> Callable[[Setting, Places, int], list[str]]:
    """A server in `servers/`: its flags are the setting's names."""

    def command(setting: Setting, places: Places, port: int) -> list[str]:
        flags = ["--model", str(places.final_head), "--listen", str(port)]
        for name, value in setting.items():
            given = str(places.graphs / f"{value}.onnx") if name == "graph" else f"{value:g}"
            flags += [f"--{name.replace('_', '-')}", given]
        return [str(places.python(environment)), str(HERE / "servers" / script), *flags]

    return command


def _infinity(setting: Setting, places: Places, port: int) -> list[str]:
    flags = {
        "--model-id": places.final_head,
        "--served-model-name": "classifier",
        "--engine": "torch",
        "--device": "cpu",
        "--dtype": "float32",
        "--batch-size": setting["batch_size"],
        "--host": "127.0.0.1",
        "--port": port,
        "--log-level": "warning",
    }
    switches = ["--no-bettertransformer", "--no-model-warmup", "--no-compile"]
    program = str(places.python("infinity").with_name("infinity_emb"))
    return [program, "v2", *(str(part) for pair in flags.items() for part in pair), *switches]


def _offramp(checkpoint: str) -> Callable[[Setting, Places, int], list[str]]:
    def command(setting: Setting, places: Places, port: int) -> list[str]:
        flags = ["--model-id", str(getattr(places, checkpoint)), "--port", str(port)]
        for name, value in setting.items():
            flag = f"--{name.replace('_', '-')}"
            flags += [flag, str(value)] if not isinstance(value, bool) else [flag] * value
        return [sys.executable, "-m", "offramp_service", "--log-level", "warning", *flags]

    return command


# -- the tables ----------------------------------------------------------------------------------

ONE_WORKER = {"workers": 1, "threads": 2}
TWO_WORKERS = {"workers": 2, "threads": 1}

_BATCHES = _with(
    ONE_WORKER | {"rows": 32, "delay_ms": 0},
    {"rows": 16},
    {"rows": 64, "delay_ms": 5},
    TWO_WORKERS,
)
_SORTED = _with(
    ONE_WORKER | {"rows": 64, "delay_ms": 0, "group": 16},
    {"group": 8},
    {"rows": 32, "group": 8},
    TWO_WORKERS | {"rows": 32, "group": 8},
)
_OFFRAMP = _with(
    {"threads": 2, "max_batch_tokens": 2048},
    {"max_batch_tokens": 1024},
    {"engine_workers": 1},
    {"warmup": True, "group_batches": True},
)


def _graphs(settings: Sequence[Setting]) -> tuple[Setting, ...]:
    """Each with one kind of norm, the first with the other one too."""
    return (*(one | {"graph": "plain"} for one in settings), settings[0] | {"graph": "fused"})


SERVERS: tuple[Server, ...] = (
    Server(
        "naive",
        "naive",
        plain("/classify"),
        tuple(every(threads=(1, 2), workers=(1, 2))),
        _written_here("naive_server.py", "naive"),
    ),
    Server(
        "infinity",
        "infinity",
        infinity("classifier"),
        _with(
            {"threads": 2, "batch_size": 32},
            {"batch_size": 8},
            {"batch_size": 16},
            {"batch_size": 64},
        ),
        _infinity,
    ),
    Server(
        "pytriton",
        "pytriton",
        triton("classifier"),
        _BATCHES,
        _written_here("pytriton_server.py", "pytriton"),
    ),
    Server(
        "mosec", "mosec", plain("/inference"), _BATCHES, _written_here("mosec_server.py", "mosec")
    ),
    Server(
        "mosec, sorted",
        "mosec",
        plain("/inference"),
        _SORTED,
        _written_here("mosec_server.py", "mosec"),
    ),
    Server(
        "mosec int8",
        "mosec",
        plain("/inference"),
        _graphs(_BATCHES),
        _written_here("mosec_server.py", "mosec"),
    ),
    Server(
        "mosec int8, sorted",
        "mosec",
        plain("/inference"),
        _graphs(_SORTED),
        _written_here("mosec_server.py", "mosec"),
    ),
    Server("offramp int8", "", offramp(2.0), _OFFRAMP, _offramp("int8")),
    Server("offramp float32", "", offramp(1.0), _OFFRAMP, _offramp("checkpoint")),
)

SUBJECTS: tuple[Subject, ...] = (
    Subject("naive: FastAPI and a pipeline", "naive", plain("/classify"), "torch"),
    Subject("infinity, torch", "infinity", infinity("classifier"), "torch"),
    Subject("PyTriton, torch", "pytriton", triton("classifier"), "torch"),
    Subject("mosec, torch", "mosec", plain("/inference"), "torch"),
    Subject("mosec, torch, rows sorted", "mosec, sorted", plain("/inference"), "torch"),
    Subject("mosec, ONNX int8", "mosec int8", plain("/inference"), "onnx"),
    Subject("mosec, ONNX int8, rows sorted", "mosec int8, sorted", plain("/inference"), "onnx"),
    Subject("offramp, torch, full depth", "offramp float32", offramp(1.0), "offramp"),
    Subject("offramp, int8, full depth", "offramp int8", offramp(1.0), "offramp"),
    Subject("offramp, int8, speed-up 2", "offramp int8", offramp(2.0), "offramp"),
    Subject("offramp, int8, speed-up 3", "offramp int8", offramp(3.0), "offramp"),
)

ENVIRONMENTS = tuple(dict.fromkeys(one.environment for one in SERVERS if one.environment))
