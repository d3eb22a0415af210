"""Logs as JSON, one object a line on stderr."""

import datetime
import json
import logging
import sys
from typing import Any


class JsonFormatter(logging.Formatter):
    """A log line as a JSON object; what `extra={"fields": {...}}` holds goes beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": when, "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def use_json_logs() -> None:
    """Sends the logs of the server, and warnings of everything else, to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level="WARNING", force=True)
    logging.getLogger("sarathi_jax.server").setLevel("INFO")
    # Malformed requests are the clients' business.
    logging.getLogger("uvicorn.error").setLevel("ERROR")
