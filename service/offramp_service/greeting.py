"""One line for a person at a terminal when the server is ready, with something to paste, and a page
to open."""

import json
import logging
from contextlib import suppress

from offramp_service.pipeline import RoomPipeline

log = logging.getLogger(__name__)


def greet(pipeline: RoomPipeline, address: tuple[str, int]) -> None:
    """One line for a person, with something to paste into a terminal."""
    host, port = address[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    body = {"input": "What will the weather be like tomorrow?"}
    if pipeline.model.max_speedup >= 2:
        body["speedup"] = 2  # type: ignore[assignment]
    curl = (
        f"curl -i http://{host}:{port}/classify -H 'content-type: application/json' "
        f"-d '{json.dumps(body)}'"
    )
    if pipeline.settings.json_output:
        log.info("listening on http://%s:%d", host, port)
    else:
        with suppress(OSError):  # nobody who is served may notice a full disk
            page = f" or open http://{host}:{port}/ui" if pipeline.settings.ui else ""
            print(f"{pipeline.model.name} is ready. Try: {curl}{page}", flush=True)
