"""Traces by OpenTelemetry (extra `otel`): one trace from `add` to the last service's handler.

The context that is current at `add` travels with the event in W3C headers. The relay's publish span
links to the contexts of its page, a listener's process span continues that of its event, and what
its handler adds continues the process span. Names and attributes follow OpenTelemetry's semantic
conventions for messaging (v1.30). Payloads and texts of exceptions are in no span.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanContext, SpanKind, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from outbox import tracing

LINKS_MAX = 128  # of one span; the SDK drops more by default
_TRACEPARENT = re.compile(rb"^traceparent: ([^\r]+)\r$", re.IGNORECASE | re.MULTILINE)
_W3C = TraceContextTextMapPropagator()


def instrument(tracer_provider: TracerProvider | None = None) -> None:
    """Trace `add`, relays and listeners of this process from now on.

    Args:
        tracer_provider: the global one by default, whenever it is set.
    """
    tracing.install(_OpenTelemetry(trace.get_tracer("outbox", _version(), tracer_provider)))


def uninstrument() -> None:
    """End what `instrument` began."""
    tracing.install(None)


class _OpenTelemetry:
    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer

    def header_lines(self) -> bytes:
        if not trace.get_current_span().get_span_context().is_valid:
            return b""
        found: dict[str, str] = {}
        _W3C.inject(found)
        return "".join(f"{name}: {value}\r\n" for name, value in found.items() if value).encode()

    @contextmanager
    def publishing(self, stream: str, rows: Sequence[Any]) -> Iterator[None]:
        """Begin a span when a row belongs to a trace that is recorded."""
        links = [Link(each) for each in _sampled(row.headers for row in rows)]
        if not links:
            yield
            return
        one = rows[0] if len(rows) == 1 else None
        where = stream if one is None else one.subject
        attributes: dict[str, Any] = _attributes("publish", "send", where)
        if one is None:
            attributes["messaging.batch.message_count"] = len(rows)
        else:
            attributes["messaging.message.id"] = one.event_id
        with self._span(f"publish {where}", SpanKind.PRODUCER, attributes, links=links):
            yield

    @contextmanager
    def processing(self, listener: str, events: Sequence[Any]) -> Iterator[None]:
        """Begin a span; of a single event it continues the event's own trace."""
        one = events[0] if len(events) == 1 else None
        where = one.event_type if one is not None else _common([e.event_type for e in events])
        attributes: dict[str, Any] = _attributes("process", "process", where)
        attributes["messaging.consumer.group.name"] = listener
        contexts = [_extracted(event.headers) for event in events[:LINKS_MAX]]
        parent, links = Context(), [Link(_span_context(each)) for each in contexts]
        if one is not None:
            parent, links = contexts[0], []
            attributes["messaging.message.id"] = one.event_id
            attributes["outbox.delivery.attempt"] = one.delivery.attempt
        else:
            attributes["messaging.batch.message_count"] = len(events)
        links = [link for link in links if link.context.is_valid]
        name = f"process {where}"
        with self._span(name, SpanKind.CONSUMER, attributes, links=links, context=parent):
            yield

    @contextmanager
    def _span(
        self,
        name: str,
        kind: SpanKind,
        attributes: dict[str, Any],
        *,
        links: Sequence[Link],
        context: Context | None = None,
    ) -> Iterator[None]:
        with self._tracer.start_as_current_span(
            name,
            context=context,
            kind=kind,
            attributes=attributes,
            links=links,
            record_exception=False,  # its text may quote a payload
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            except BaseException as error:
                cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
                span.set_attribute("error.type", type(cause).__name__)
                span.set_status(StatusCode.ERROR, type(cause).__name__)
                raise


def _attributes(name: str, kind: str, destination: str) -> dict[str, Any]:
    return {
        "messaging.system": "nats",
        "messaging.operation.name": name,
        "messaging.operation.type": kind,
        "messaging.destination.name": destination,
    }


def _sampled(blocks: Iterable[bytes]) -> Iterator[SpanContext]:
    """Yield the contexts of recorded traces, each once, up to what a span may link to."""
    seen: set[bytes] = set()
    for block in blocks:
        found = _TRACEPARENT.search(block)
        if found is None or found[1] in seen:
            continue
        seen.add(found[1])
        context = _span_context(_extracted({"traceparent": found[1].decode("latin-1")}))
        if context.is_valid and context.trace_flags.sampled:
            yield context
        if len(seen) >= LINKS_MAX:
            return


def _extracted(headers: Mapping[str, str]) -> Context:
    """Return the context of an event's headers; names of headers have no case."""
    found = {
        name.lower(): value
        for name, value in headers.items()
        if name.lower() in tracing.TRACE_HEADERS
    }
    return _W3C.extract(found, context=Context())


def _span_context(context: Context) -> SpanContext:
    return trace.get_current_span(context).get_span_context()


def _common(subjects: Sequence[str]) -> str:
    return subjects[0] if len(set(subjects)) == 1 else "(several)"


def _version() -> str | None:
    try:
        return version("outbox-jetstream")
    except PackageNotFoundError:
        return None
