"One event, one line of JSON on standard error: what a log collector can read without a parser of its own."

import json
import logging
import sys
from datetime import UTC, datetime

LOGGER = logging.getLogger("shopai.serving")
UVICORN = {  # the server's own words in the same form
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"json": {"()": "serving.logs.JsonLines"}},
    "handlers": {"json": {"class": "logging.StreamHandler", "formatter": "json"}},
    "loggers": {"uvicorn": {"handlers": ["json"], "propagate": False}},
}


class JsonLines(logging.Formatter):
    "Time, level and event of a record, then what `event` was given; a traceback stays inside its line."

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower(), "event": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(level: str) -> None:
    "Send shopai's own events to standard error, once, however often an app is made."
    LOGGER.setLevel(level.upper())
    if not LOGGER.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonLines())
        LOGGER.addHandler(handler)
        LOGGER.propagate = False


def event(level: str, text: str, exc_info: bool | Exception = False, **fields: object) -> None:
    "Log one event with named fields."
    LOGGER.log(logging.getLevelNamesMapping()[level.upper()], text, exc_info=exc_info, extra={"fields": fields})
