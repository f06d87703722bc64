"""What the doctor, and workers that start, say of servers that are set up badly."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad it is."""

    ERROR = "error"  # breaks a sentence of the promise
    WARNING = "warning"  # will, when something else goes wrong
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be."""

    severity: Severity
    what: str
    why: str
    mend: str  # a command or statement


_LEVELS = {
    Severity.ERROR: logging.ERROR,
    Severity.WARNING: logging.WARNING,
    Severity.NOTE: logging.INFO,
}


def log(logger: logging.Logger, found: Iterable[Finding], **fields: str) -> None:
    """Log each finding once, as bad as it is."""
    for each in found:
        facts = {"why": each.why, "mend": each.mend, **fields}
        logger.log(_LEVELS[each.severity], "%s", each.what, extra=facts)
