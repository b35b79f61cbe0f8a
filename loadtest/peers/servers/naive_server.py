"""FastAPI around transformers' pipeline, one text at a time: what one writes in five minutes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from classifier import options
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline


class Body(BaseModel):
    text: str


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """In each worker: the pipeline."""
    given = options()
    torch.set_num_threads(given.threads)
    app.state.classify = pipeline(
        "text-classification", model=str(given.model), trust_remote_code=True
    )
    yield


app = FastAPI(lifespan=lifespan)


@app.post("/classify")
def answer(body: Body) -> dict[str, Any]:
    """In the thread pool, as FastAPI runs what is not async."""
    found: dict[str, Any] = app.state.classify(body.text, truncation=True)[0]
    return found


if __name__ == "__main__":
    given = options()
    uvicorn.run(
        "naive_server:app",
        app_dir=str(Path(__file__).parent),
        host="127.0.0.1",
        port=given.listen,
        workers=given.workers,
        log_level="warning",
        timeout_worker_healthcheck=60,  # a busy machine loads torch for longer than its 5 s
    )
