"""`create_app(settings)`: the application of the process with the engine; wiring and lifespan only.

Life of a request: a door in `routes/` reads it → `batcher` admits it → `pipeline` tokenises →
`batcher` queues it → `scheduler` says when, and with whom → `engine`, in threads of its own, runs
the layers and answers each text where it leaves → the door words the response.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from offramp_service.jobs import Engine as Computes
from offramp_service.metrics_port import metrics_port
from offramp_service.models import Models
from offramp_service.routes import admin, info, probes, ui, v2
from offramp_service.served_model import ServedModel
from offramp_service.settings import Settings
from offramp_service.watched import watching
from offramp_service.wiring import DOOR_PATHS, add_doors, open_keys, open_tracer, surround


def create_app(
    settings: Settings, model: ServedModel | None = None, *, computes: Computes | None = None
) -> FastAPI:
    """The application; loads its models, except the default one if that is given. `computes`
    answers batches in place of the models' engines, so that all the rest can be measured.

    Raises:
        CheckpointError, SettingsError: see `load_model`; the latter also where traces are asked
            for and the extra for them is not installed.
        KeyFileError: see `Keyring`.
    """
    keys, tracer = open_keys(settings), open_tracer(settings)
    models = Models(
        settings,
        {settings.model_names[0]: model} if model is not None else {},
        DOOR_PATHS,
        computes=computes,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await models.warm()
        try:
            async with watching(models), metrics_port(models):
                yield
        finally:
            await models.close()
            if tracer is not None:
                await asyncio.to_thread(tracer.close)

    app = FastAPI(
        title="offramp",
        version=version("offramp"),
        summary="Text classification that answers as soon as it is sure.",
        lifespan=lifespan,
    )
    add_doors(app, models)
    app.include_router(v2.router(models))
    app.include_router(probes.router(models))
    app.include_router(info.router(models))
    if settings.admin_key_file is not None:
        app.include_router(admin.router(models))
    if settings.ui:
        app.router.routes.extend(ui.routes(models))
    surround(app, models, keys, tracer)
    app.state.models = models
    return app
