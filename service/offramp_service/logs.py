"""Where log lines go and what they look like: standard error, for people or as JSON.

Nobody who is served may notice the log: a line that cannot be written, on a full disk or into a
closed pipe, is let go. It knows nothing about what is logged.
"""

import json
import logging
import os
import sys
import time

from offramp_service.settings import Settings


def configure_logging(settings: Settings) -> None:
    """Of the whole process."""
    handler = _Lenient(sys.stderr)
    handler.setFormatter(
        JsonLines()
        if settings.json_output
        else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn.error").setLevel(
        logging.DEBUG if settings.log_level == "debug" else logging.WARNING
    )


def flush_output() -> None:
    """Before the end: what cannot be written now never will be, and must not become the exit code,
    as it does where Python finds it when it ends."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class JsonLines(logging.Formatter):
    """A line is a JSON object; a record's `fields`, if it has any, are members of it."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class _Lenient(logging.StreamHandler):  # type: ignore[type-arg]  # of whichever stream
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        """A line that cannot be written is nobody's business; one that cannot be made is a bug."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
