"""`offramp-serve` with one more route, which tells what is alive inside.

    python service/bench/watched_server.py --model-id DIR --port 0

`GET /soak/alive` gives the number of asyncio tasks, that of this very request included, and the
names of the threads.
"""

import asyncio
import sys
import threading

from fastapi import FastAPI

from offramp_service.__main__ import main
from offramp_service.app import create_app
from offramp_service.settings import Settings


def make_app(settings: Settings) -> FastAPI:
    """The application of `offramp-serve`, watched."""
    app = create_app(settings)

    async def alive() -> dict[str, int | list[str]]:
        threads = sorted(thread.name for thread in threading.enumerate())
        return {"tasks": len(asyncio.all_tasks()), "threads": threads}

    app.add_api_route("/soak/alive", alive)
    return app


if __name__ == "__main__":
    sys.exit(main(make_app=make_app))
