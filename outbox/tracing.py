"""The seam for traces: what the library asks of a tracer, and the one that is installed.

Without one nothing is computed. `outbox.observe.tracing` installs OpenTelemetry's.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

TRACE_HEADERS = ("traceparent", "tracestate")  # W3C Trace Context, section 3.2 and 3.3


class Tracer(Protocol):
    """Spans of publishing and of processing, and the context that travels with an event."""

    def header_lines(self) -> bytes:
        """Return the current context as finished header lines, nothing when there is none."""

    def publishing(self, stream: str, rows: Sequence[Any]) -> AbstractContextManager[None]:
        """Surround the publishing of `rows`, which have event_id, subject and header lines."""

    def processing(self, listener: str, events: Sequence[Any]) -> AbstractContextManager[None]:
        """Surround one attempt at envelopes: from the inbox row to the end of the transaction."""


installed: Tracer | None = None
_NOTHING = nullcontext()


def install(tracer: Tracer | None) -> None:
    """Have `tracer` asked from now on in this process; None ends that."""
    global installed  # noqa: PLW0603 - one for the process, as OpenTelemetry's provider is
    installed = tracer


def publishing(stream: str, rows: Sequence[Any]) -> AbstractContextManager[None]:
    """Surround the publishing of a page."""
    return _NOTHING if installed is None else installed.publishing(stream, rows)


def processing(listener: str, events: Sequence[Any]) -> AbstractContextManager[None]:
    """Surround one attempt at events."""
    return _NOTHING if installed is None else installed.processing(listener, events)
