"""The command `offramp-serve`: read flags, open the checkpoint, serve, drain on SIGTERM. With
`plan` as its first word it serves nothing (`plan_command.py`).

Everything about processes, signals and terminals is here; the application knows none of it.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType

# Texts are tokenised one small request at a time; the library's own threads would compete with
# the engine's for the cores. Read when the library is first used.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The engine's idle OpenMP threads spin for microseconds and then sleep: the event loop needs the
# cores too, and sleeping at once costs the engine (docs/results/engine.md). Read when torch is
# loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# numpy's products between two segments are too small to share: threads of its own would fight the
# engine's for the cores. Read when numpy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import msgspec
import uvicorn
import uvloop
from fastapi import FastAPI
from prometheus_client import disable_created_metrics
from pydantic import ValidationError

from offramp_model.checkpoint import CheckpointError
from offramp_model.memory import keep_freed_memory
from offramp_service import plan_command
from offramp_service.api_keys import KeyFileError
from offramp_service.app import create_app
from offramp_service.bounded_http import KEEP_ALIVE_S, http_options, stop_listening
from offramp_service.config_file import ConfigFileError
from offramp_service.fronts.process import serve_behind_fronts
from offramp_service.garbage import leave_alone_what_stays
from offramp_service.greeting import greet
from offramp_service.logs import configure_logging, flush_output
from offramp_service.models import Models
from offramp_service.pipeline import RoomPipeline
from offramp_service.rehearsal import rehearse
from offramp_service.routes.info import describe
from offramp_service.schemas.reading import encode_json
from offramp_service.served_model import SettingsError
from offramp_service.settings import Settings, parse_command_line
from offramp_service.watched import load_all

log = logging.getLogger("offramp_service")


def main(
    arguments: Sequence[str] | None = None, *, make_app: Callable[[Settings], FastAPI] = create_app
) -> int:
    """Run the command, maybe with an application that is watched or measured; returns its exit
    code."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] == "plan":
        return plan_command.run(given[1:])
    try:
        settings = parse_command_line(given)
    except ValidationError as error:
        return _refuse(*(_explain(one["loc"], one["msg"]) for one in error.errors()))
    except ConfigFileError as error:
        return _refuse(f"--config: {error}")
    _prepare_process(settings)
    try:
        app = make_app(settings)
    except (CheckpointError, KeyFileError, SettingsError) as error:
        return _refuse(str(error))
    if settings.dry_run:
        _print_plan(app.state.models)
        return 0
    _log_all_limits(app.state.models)
    if settings.preload_only:
        return _preload(app)
    return _serve(app, settings) if settings.http_workers == 1 else _serve_behind_fronts(app)


def _serve(app: FastAPI, settings: Settings) -> int:
    models: Models = app.state.models
    server = Server(
        uvicorn.Config(
            app,
            host=settings.hostname,
            port=settings.port,
            lifespan="on",
            **http_options(),
        ),
        models,
    )
    with suppress(SystemExit):  # a failed start; the code is uvicorn's, and depends on its version
        server.run()
    return _ended(models, started=server.started)


def _serve_behind_fronts(app: FastAPI) -> int:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        started = runner.run(serve_behind_fronts(app))
    return _ended(app.state.models, started=started)


def _ended(models: Models, *, started: bool) -> int:
    """The exit code of a process that has served, or has not come so far."""
    flush_output()
    if not started:
        return 3
    if models.lifecycle.died.is_set():
        return 4
    if models.busy:
        os._exit(0)  # a batch that nobody waits for still runs; Python cannot end around it
    return 0


def _preload(app: FastAPI) -> int:
    async def run() -> None:
        async with app.router.lifespan_context(app):
            for pipeline in app.state.models:
                try:
                    answer = await rehearse(pipeline)
                except Exception as error:
                    raise RuntimeError(f"{pipeline.model.name} does not answer") from error
                text = "preloaded %s: a text left after layer %d"
                log.info(text, pipeline.model.name, answer.answer.exit_layer)

    try:
        asyncio.run(run())
    except Exception:
        log.exception("preloading failed")
        return 3
    return 0


class Server(uvicorn.Server):
    """uvicorn with our way to end: drain on the first signal, exit at once on the second."""

    def __init__(self, config: uvicorn.Config, models: Models) -> None:
        super().__init__(config)
        self._models = models
        self._draining: asyncio.Task[None] | None = None
        self._signalled = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            leave_alone_what_stays()
            self._loop.add_signal_handler(signal.SIGHUP, self._load_anew)
            greet(self._models.default, self.servers[0].sockets[0].getsockname())
            self._watching = self._loop.create_task(self._end_when_dead())

    async def _end_when_dead(self) -> None:
        await self._models.lifecycle.died.wait()
        log.critical("nothing more can be answered: the process ends")
        self.should_exit = True

    def _load_anew(self) -> None:
        self._loading = self._loop.create_task(load_all(self._models))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn's signal handlers, in the main thread."""
        if self._signalled or not self.started:  # nothing to drain yet
            _exit_at_once(sig, frame)
        self._signalled = True
        self._loop.call_soon_threadsafe(self._start_drain, sig)

    def _start_drain(self, sig: int) -> None:
        self._draining = self._loop.create_task(self._drain(sig))

    async def _drain(self, sig: int) -> None:
        settings = self._models.settings
        log.info("%s: shutting down", signal.Signals(sig).name)
        # Ctrl-C comes from a person, not from an orchestrator that watches readiness.
        serve_on_s = 0.0 if sig == signal.SIGINT else settings.drain_seconds
        await self._models.lifecycle.drain(
            serve_on_s=serve_on_s, finish_s=settings.shutdown_timeout
        )
        await stop_listening(self)
        self._models.let_go()
        self.should_exit = True


def _prepare_process(settings: Settings) -> None:
    keep_freed_memory()
    # PID 1 of a container ignores SIGTERM unless it is handled, and loading takes a moment.
    signal.signal(signal.SIGTERM, _exit_at_once)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to load anew
    # A third of all series, and of no use to anybody here.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    configure_logging(settings)


def _exit_at_once(sig: int, _: FrameType | None) -> None:
    os._exit(128 + sig)


def _print_plan(models: Models) -> None:
    """Settings and `/info` of each model as JSON. Secrets are asterisks there."""
    plan = {
        "settings": models.settings.model_dump(mode="json"),
        "serves": [describe(pipeline) for pipeline in models],
    }
    print(msgspec.json.format(encode_json(plan), indent=2).decode(), flush=True)


def _log_all_limits(models: Models) -> None:
    # In a function of its own: `main` runs as long as the process, and would hold the last of them.
    for pipeline in models:
        _log_limits(pipeline)


def _log_limits(pipeline: RoomPipeline) -> None:
    settings, model = pipeline.settings, pipeline.model
    log.info(
        "serving %s (%s): %d layers, exits %s, policy %s, speed-up %.4g to %.4g (default %.4g), "
        "%s %s on %s, %d threads, %d batches at a time",
        *(model.name, model.sha, model.num_layers, model.config.exit_layers, model.policy.name),
        *(model.min_speedup, model.max_speedup, model.default_speedup),
        *(model.backend, model.dtype, model.device, settings.engine_threads, model.engine_workers),
    )
    log.info(
        "limits: %d tokens a text, %d texts a request, %d tokens and %d texts a batch, "
        "%d texts inside, %d tokens and %d characters queued, %d bytes a body, %d ms a request, "
        "%d s an idle connection",
        *(model.max_input_length, settings.max_client_batch_size, settings.max_batch_tokens),
        *(model.max_batch_texts, settings.max_concurrent_requests, settings.max_queued_tokens),
        *(settings.max_queued_characters, settings.payload_limit, settings.request_timeout_ms),
        KEEP_ALIVE_S,
    )


def _explain(location: tuple[int | str, ...], message: str) -> str:
    flag = f"--{str(location[0]).replace('_', '-')}: " if location else ""
    return flag + message.removeprefix("Value error, ")


def _refuse(*reasons: str) -> int:
    for reason in reasons:
        print(f"offramp-serve: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
