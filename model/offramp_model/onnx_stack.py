"""The encoder as ONNX Runtime sessions, one for each stretch from exit to exit: a `LayerStack`.

Hidden states go from session to session as the same packed tokens that the torch encoder uses, so
compaction, exit heads and the layer loop are the very same code, over numpy's arrays: nothing here
loads torch.

All sessions of a process share one pool of threads, whose idle ones do not spin between calls: with
a pool for each session, as by default, chains of small sessions take several times as long. They
share one arena of memory as well, as only one of them, or one for each worker, runs at a time: by
default each would keep what its largest batch took. Any number of threads may call a stack at once.

onnxruntime (extra `onnx`) is imported when a stack is made. It knows nothing about policies,
directories or how graphs are written.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from offramp_model.config import MultiExitConfig, ProblemType
from offramp_model.exit_head import ExitHead
from offramp_model.policies import HeadOutput
from offramp_model.rows import PackedTokens, Run, TokenBatch
from offramp_model.run_slots import MAX_RUNS, plan_runs

# Published builds of onnxruntime (1.32) report to their maker over the network, unless this is set
# before they are loaded. Nothing here reports to anybody; and where the network is closed, a last
# attempt of theirs holds up the end of the process for seconds.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

log = logging.getLogger(__name__)

Graph = Path | bytes
"""An ONNX file, or what would be in it."""

Device = Literal["cpu", "cuda"]
CUDA = "CUDAExecutionProvider"
_PROVIDERS: dict[Device, list[str]] = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": [CUDA, "CPUExecutionProvider"],  # what the first does not know, the second runs
}

_lock = Lock()
_pool_threads: int | None = None


class OnnxStack:
    """Embeddings and segments of one encoder, with its exit heads.

    Args:
        embeddings: token ids → hidden states.
        segments: by exit layer.
        heads: of the exits, in their order, float32.
        config: exits, pooling and labels.
        vocab_size: rows of the embedding table.
        max_positions: longest text, in tokens with specials, that the position table allows.
        threads: of the pool that all stacks of a process share; the first one decides. Default:
            the cores that the process may use.
        device: "cuda" runs what onnxruntime can on its CUDA provider; hidden states come back to
            the host at every exit.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: a graph is not one that onnxruntime can run.
    """

    def __init__(
        self,
        embeddings: Graph,
        segments: Mapping[int, Graph],
        heads: Sequence[ExitHead],
        config: MultiExitConfig,
        *,
        vocab_size: int,
        max_positions: int,
        threads: int | None = None,
        device: Device = "cpu",
    ) -> None:
        self._config = config
        self._heads = heads
        self._embeddings = make_session(embeddings, threads, device)
        self._inputs = [one.name for one in self._embeddings.get_inputs()]
        self._segments = {
            layer: make_session(graph, threads, device) for layer, graph in segments.items()
        }
        self.vocab_size, self.max_positions = vocab_size, max_positions

    @property
    def num_layers(self) -> int:
        return self._config.num_layers

    @property
    def num_labels(self) -> int:
        return self._config.num_labels

    @property
    def problem_type(self) -> ProblemType:
        return self._config.problem_type

    @property
    def exit_layers(self) -> tuple[int, ...]:
        return self._config.exit_layers

    def embed(self, batch: TokenBatch) -> PackedTokens:
        """Token ids → hidden states before the first layer."""
        feeds = {name: getattr(batch, name) for name in self._inputs}
        (values,) = self._embeddings.run(None, feeds)
        return PackedTokens(values, batch.cu_seqlens)

    def segment(self, exit_layer: int, hidden: PackedTokens) -> PackedTokens:
        (after,) = run_segment(self._segments[exit_layer], hidden.values, hidden.runs)
        return hidden.replace(after)

    def exit_head(self, exit_layer: int, hidden: PackedTokens) -> HeadOutput:
        return self._heads[self._config.exit_index(exit_layer)].answer(hidden)


def run_segment(
    session: Any, values: NDArray[np.float32], runs: Sequence[Run]
) -> list[NDArray[np.float32]]:
    """Packed hidden states [T, H] through one session, in as few calls as it takes; what it puts
    out, [T, ...] each."""
    width = values.shape[1]
    if len(runs) <= MAX_RUNS:
        outputs: list[NDArray[np.float32]] = session.run(
            None, {"hidden": values, **plan_runs(runs, width)}
        )
        return outputs
    parts = []
    for first in range(0, len(runs), MAX_RUNS):
        some = runs[first : first + MAX_RUNS]
        parts.append(run_segment(session, values[some[0].start : some[-1].stop], some))
    return [np.concatenate(same) for same in zip(*parts, strict=True)]


def make_session(graph: Graph, threads: int | None = None, device: Device = "cpu") -> Any:
    """A session in the shared pool and arena, which the first one makes; `threads` and `device` as
    for `OnnxStack`.

    Raises:
        ValueError: onnxruntime cannot run the graph, or not on this device.
    """
    import onnxruntime

    there = onnxruntime.get_available_providers()
    if device == "cuda" and CUDA not in there:
        raise ValueError(f"this onnxruntime has no {CUDA}; it has: {', '.join(there)}")
    _share(threads or len(os.sched_getaffinity(0)))
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    # It would keep a memory plan for each combination of shapes it has seen, and no two batches are
    # alike here: the process grows for as long as it serves.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.x64quantprecision", exact_int8())
    options.log_severity_level = 3  # a failing call raises; it need not also print
    try:
        session = onnxruntime.InferenceSession(
            graph, options, providers=_PROVIDERS[device], enable_fallback=0
        )
    except Exception as error:  # onnxruntime's errors have no base of their own
        where = graph if isinstance(graph, Path) else "the graph"
        raise ValueError(f"{where}: onnxruntime cannot run it: {error}") from error
    if device == "cuda" and CUDA not in session.get_providers():  # it falls back without a word
        raise ValueError(f"onnxruntime has {CUDA} and cannot start it here")
    return session


def exact_int8() -> Literal["0", "1"]:
    """The value of `session.x64quantprecision` with which int8 products are exact on this machine.

    x86 without VNNI adds pairs of them in 16 bits, which overflow: "1" takes another kernel there,
    three quarters as fast and exact. With VNNI the usual one is exact, and twice as fast as that.
    """
    return "0" if {"avx512_vnni", "avx_vnni"} & _cpu_flags() else "1"


@cache
def _cpu_flags() -> frozenset[str]:
    """What the kernel says of the first processor; nothing where it says nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def _share(threads: int) -> None:
    """Before the first session of the process; later calls can change nothing."""
    import onnxruntime

    global _pool_threads
    with _lock:
        if _pool_threads is None:
            onnxruntime.set_global_thread_pool_sizes(threads, 1)
            onnxruntime.create_and_register_allocator(
                onnxruntime.OrtMemoryInfo(
                    "Cpu",
                    onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR,
                    0,
                    onnxruntime.OrtMemType.DEFAULT,
                ),
                None,  # grows as an arena of its own would
            )
            _pool_threads = threads
        elif _pool_threads != threads:
            log.warning(
                "the pool of onnxruntime keeps its %d threads, %d were asked for",
                *(_pool_threads, threads),
            )
