"""Where the commands' logs go: stderr, for people or as one JSON object a line."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from typing_extensions import override

from outbox.context import EventLogFilter
from outbox.errors import ConfigurationError
from outbox.settings import Settings

_KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class Console(logging.Formatter):
    """One line for people: time, level, sentence, facts."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).astimezone().strftime("%H:%M:%S")
        facts = "".join(f" {name}={value}" for name, value in _facts(record).items())
        line = f"{time} {record.levelname:<7} {record.getMessage()}{facts}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class Json(logging.Formatter):
    """One JSON object a line, for a log collector."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_facts(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(settings: Settings, *, quiet: bool = False) -> None:
    """Send all logs to stderr as the settings say.

    Args:
        quiet: warnings only, unless a level was set: of a command that only looks, or acts once.

    Raises:
        ConfigurationError: the level or the format does not exist.
    """
    formats: dict[str, type[logging.Formatter]] = {"console": Console, "json": Json}
    level = settings.log_level.upper()
    if quiet and "log_level" not in settings.model_fields_set:
        level = "WARNING"
    if level not in logging.getLevelNamesMapping():
        raise ConfigurationError(f"log_level (OUTBOX_LOG_LEVEL): {level!r} is not a level")
    if settings.log_format not in formats:
        raise ConfigurationError("log_format (OUTBOX_LOG_FORMAT): must be 'console' or 'json'")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formats[settings.log_format]())
    handler.addFilter(EventLogFilter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("alembic").setLevel(max(logging.WARNING, logging.getLevelName(level)))


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    found = vars(record).items()
    return {name: value for name, value in found if name not in _KNOWN and value is not None}
