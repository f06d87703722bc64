"""Every error of the package.

```text
OutboxError
├── InvalidEvent         (ValueError)  the caller's event: field, rule, shortened value
├── InvalidSession       (TypeError)   the caller's session cannot carry events
├── ConfigurationError                 settings, schema version, stream drift: refuse to start
├── PublishError                       the broker did not confirm an event
├── HandlerError                       a handler broke its contract, or timed out
├── BrokerUnavailable                  nobody's failure: back off, spend nothing
├── DatabaseUnavailable                nobody's failure: back off, spend nothing
├── Retry                              raised by a handler: roll back, come again
└── Reject                             raised by a handler: roll back, dead letter now
```
"""

from datetime import timedelta

from sqlalchemy import exc

VALUE_SHOWN_MAX = 40


def hide_parameters(error: BaseException | None) -> None:
    """Keep the values of SQL statements out of the texts of `error` and of what led to it.

    SQLAlchemy prints a failed statement's parameters: payloads, in ours and in most handlers'.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, exc.StatementError):
            error.hide_parameters = True
        error = error.__cause__ or error.__context__


def shorten(value: object) -> str:
    """Return `value` as at most 40 printable ASCII characters, safe for a terminal or a log."""
    text = value if isinstance(value, str) else repr(value)
    shown = ascii(text[: VALUE_SHOWN_MAX + 1])[1:-1]
    return shown if len(shown) <= VALUE_SHOWN_MAX else shown[: VALUE_SHOWN_MAX - 1] + "…"


class OutboxError(Exception):
    """Base of every error that this package raises."""


class InvalidEvent(OutboxError, ValueError):  # noqa: N818 - the public name is fixed by the design
    """An event that cannot be added; nothing was written and the transaction stays usable."""

    def __init__(self, field: str, rule: str, value: object = "") -> None:
        shown = shorten(value)
        super().__init__(f"{field}: {rule}" + (f" (got '{shown}')" if shown else ""))
        self.field = field
        self.rule = rule
        self.value = shown


class InvalidSession(OutboxError, TypeError):  # noqa: N818 - the public name is fixed by the design
    """A session or connection that cannot carry events; nothing was written."""


class ConfigurationError(OutboxError):
    """Settings, schema or broker objects do not fit; the process refuses to start."""


class PublishError(OutboxError):
    """The broker did not confirm an event; its row stays in the outbox.

    `refused` is False when the outcome is unknown (the event is sent again with the same id), and
    True when the broker refused this event for its own sake.
    """

    def __init__(self, event_id: str, reason: str, *, refused: bool = False) -> None:
        super().__init__(f"event {event_id} was not confirmed: {reason}")
        self.event_id = event_id
        self.reason = reason
        self.refused = refused


class HandlerError(OutboxError):
    """A handler ended the transaction that it was given, or ran out of time; it was rolled back."""

    def __init__(self, listener: str, event_id: str, reason: str) -> None:
        super().__init__(f"{listener} failed on event {event_id}: {reason}")
        self.listener = listener
        self.event_id = event_id
        self.reason = reason


class BrokerUnavailable(OutboxError):  # noqa: N818 - the public name is fixed by the design
    """NATS or its JetStream cannot be reached; nothing was spent, try again later."""


class DatabaseUnavailable(OutboxError):  # noqa: N818 - the public name is fixed by the design
    """PostgreSQL cannot be reached; nothing was spent, try again later."""


class Retry(OutboxError):  # noqa: N818 - raised by handlers as an instruction
    """Raised by a handler: roll back and deliver the event again, `after` this long when given."""

    def __init__(self, reason: str = "", *, after: timedelta | float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.after = timedelta(seconds=after) if isinstance(after, int | float) else after


class Reject(OutboxError):  # noqa: N818 - raised by handlers as an instruction
    """Raised by a handler: roll back and keep the event as a dead letter now."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
