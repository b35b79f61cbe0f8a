"""Metrics that exist from the start and stay few; the phases of the service."""

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from offramp_service.errors import NotReady
from offramp_service.lifecycle import Lifecycle
from offramp_service.metrics import Metrics


def test_every_series_exists_before_the_first_request(metrics: Metrics, read) -> None:
    before = generate_latest(metrics.registry).count(b"\n")
    assert read("exits_total", layer="4", reason="forced") == 0
    assert read("requests_total", route="/classify", code="504") == 0
    assert read("request_failures_total", reason="draining") == 0
    assert read("tokens_total", kind="padding") == 0
    assert read("shadow_agreement_total", layer="3", agree="false") == 0
    assert read("speedup_drift") == read("speedup_correction") == 1
    metrics.shadow_compared(1, agrees=True)
    metrics.shadow_layers_ran(range(1, 5), 2)
    metrics.shadows_dropped(1)
    metrics.batch_formed("tokens", 12, [0.1, 0.2])
    metrics.texts_left(2, [("criterion", 0.01), ("forced", 0.01), ("criterion", 0.01)])
    metrics.layers_ran(range(1, 3), 3, 3)
    metrics.engine_worked(0.01)
    metrics.speedup_given(1.9, 3, 6)
    metrics.request_done("/classify", 200, 0.1)
    metrics.request_failed("backend")
    assert generate_latest(metrics.registry).count(b"\n") == before
    assert read("shadow_layer_executions_total") == 8
    assert read("shadow_agreement_total", layer="1", agree="true") == 1


def test_the_arithmetic_of_layers(metrics: Metrics, read) -> None:
    metrics.texts_left(1, [("criterion", 0.01)])
    metrics.texts_left(3, [("criterion", 0.01), ("forced", 0.01)])
    metrics.texts_left(4, [("final", 0.01)])
    # Exits after layers 1, 3 and 4; a fifth text was given up after the first.
    for layers, texts, leaving in (
        (range(1, 2), 5, 1),
        (range(2, 3), 3, 0),
        (range(3, 4), 3, 2),
        (range(4, 5), 1, 1),
    ):
        metrics.layers_ran(layers, texts, leaving)
    assert [read("layer_executions_total", layer=str(layer)) for layer in (1, 2, 3, 4)] == [
        *(5, 3, 3, 1)
    ]
    assert read("layers_saved_total") == 3 + 1 + 1
    assert read("samples_total") == 4
    assert read("exits_total", layer="3", reason="forced") == 1
    assert read("exit_layer_bucket", le="3.0") == 3
    assert read("layer_batch_size_sum", layer="2") == 3
    assert [
        read("batch_exits_total", outcome=outcome) for outcome in ("unchanged", "shrunk", "ended")
    ] == [1, 2, 1]


def test_achieved_speedups_are_ratios_of_sums(metrics: Metrics, read) -> None:
    metrics.speedup_given(2.0, 1, 1)
    metrics.speedup_given(2.2, 3, 12)
    run, saved = (read("speedup_layers_total", speedup="2", kind=kind) for kind in ("run", "saved"))
    assert (run + saved) / run == 16 / 13  # the mean of 4 and 1 is another number
    assert read("speedup_requested_sum") == pytest.approx(4.2)
    assert read("speedup_layers_total", speedup="1", kind="run") == 0


@pytest.mark.looptime
async def test_a_life() -> None:
    life = Lifecycle()
    with pytest.raises(NotReady, match="starting"):
        life.enter()
    life.warmed()
    life.enter()
    draining = asyncio.create_task(life.drain(serve_on_s=0.5, finish_s=5))
    await asyncio.sleep(0)
    assert (life.ready, life.started) == (False, True)
    life.enter()  # still serving
    await asyncio.sleep(1)
    with pytest.raises(NotReady, match="shutting down"):
        life.enter()
    assert not draining.done()
    life.leave()
    life.leave()
    await draining


def test_a_drain_during_the_start_stays_one() -> None:
    life = Lifecycle()
    life.phase = "draining"
    life.warmed()
    assert (life.phase, life.ready, life.leaving) == ("draining", False, True)


@pytest.mark.looptime
async def test_a_drain_ends_even_if_a_request_does_not(looptime: float) -> None:
    life = Lifecycle()
    life.warmed()
    life.enter()
    await life.drain(serve_on_s=5, finish_s=30)
    assert looptime == 35


def test_the_service_never_imports_what_it_must_not() -> None:
    """In a process of its own: transformers and the training package stay out of the server, and
    torch out of the batcher."""
    program = (
        "import sys, offramp_service.batcher; assert 'torch' not in sys.modules;"
        "import offramp_service.__main__;"
        "assert not {'transformers', 'offramp_training', 'pandas'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=50)


def test_the_process_is_described(metrics: Metrics) -> None:
    """Where the operating system tells: under the names that every exporter uses."""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("needs /proc")
    value = metrics.registry.get_sample_value
    assert (value("process_resident_memory_bytes") or 0) > 1e6
    assert (value("process_cpu_seconds_total") or 0) > 0
    assert value("process_open_fds")
    release = threading.Event()
    threads = value("process_threads") or 0
    assert threads >= 1
    another = threading.Thread(target=release.wait)
    another.start()
    try:
        assert value("process_threads") == threads + 1
    finally:
        release.set()
        another.join()
