"""`Publisher`: the publishing base class of GLAM's services, on the outbox."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from outbox.context import EntryPoint, LogFacts, logged
from outbox.contracts.payloads import ErrorPayload
from outbox.envelope import uuid7_text
from outbox.settings import Settings
from outbox.writer import Outbox, add_dead_letter, registered
from outbox.writer.adding import AnySession

_Payload = BaseModel | Mapping[str, Any]


class Publisher(ABC):
    """Publishes the events of one service, each in the caller's transaction.

    The older class published to the broker at once; this one adds the event to the session's
    transaction, and the relay publishes it after COMMIT. A subclass names its service:

    ```python
    class MerchantPublisher(Publisher):
        service_name = "merchant-service"
    ```

    Args:
        js_client: not used; older constructors pass it.
        logger: where the publisher notes what it adds; default: this module's.
        settings: None means defaults, never the environment.

    Raises:
        InvalidEvent: the service's name is not 1 to 255 printable characters.
    """

    def __init__(
        self,
        js_client: object = None,
        logger: logging.Logger | None = None,
        *,
        settings: Settings | None = None,
    ) -> None:
        del js_client
        self.logger = logger or logging.getLogger(__name__)
        self.events = Outbox(self.service_name, settings=settings)

    @property
    @abstractmethod
    def service_name(self) -> str:
        """Name of the service, in every envelope; a plain class attribute will do."""

    async def publish_event(  # noqa: PLR0917 - the older calls are positional
        self,
        session: AnySession,
        subject: str | None = None,
        payload: _Payload | None = None,
        correlation_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        key: str | None = None,
        *,
        event_type: str | None = None,
        data: _Payload | None = None,
    ) -> str:
        """Add an event to the session's transaction; return its id.

        Args:
            subject: one of `Subjects`; `event_type` is its older name.
            payload: the subject's payload, or a mapping that it validates; `data` is the older
                name.
            key: default: the merchant's id, from the payload.

        Raises:
            InvalidEvent: names the field and the rule; the transaction stays usable.
            InvalidSession: the session cannot carry events; nothing was changed.
            TypeError: subject or payload are missing, or given by both names.
        """
        where = _one("subject", subject, "event_type", event_type)
        what = _one("payload", payload, "data", data)
        event_id = uuid7_text()
        facts = self._facts(event_id, where, correlation_id)
        with logged(facts):
            self.events.add(
                session,
                where,
                what,
                key=key,
                correlation_id=correlation_id,
                event_id=event_id,
                metadata=metadata,
            )
            self.logger.info("added an event")
        return event_id

    async def publish_to_dlq(
        self,
        session: AnySession,
        original_subject: str,
        error_payload: ErrorPayload | Mapping[str, Any],
        correlation_id: str | None = None,
        error: Exception | str | None = None,
    ) -> str:
        """Add an `ErrorPayload` on the `dlq.` subject of `original_subject`; return its id.

        Args:
            error: its type and text replace the payload's `error_code` and `error_message` where
                those are empty.

        Raises:
            InvalidEvent: names the field and the rule; the transaction stays usable.
            InvalidSession: the session cannot carry events; nothing was changed.
        """
        payload = registered.validated(original_subject, ErrorPayload, error_payload)
        if error is not None:
            payload = payload.model_copy(
                update={
                    "error_code": payload.error_code or type(error).__name__,
                    "error_message": payload.error_message or str(error),
                }
            )
        with logged(self._facts(None, original_subject, correlation_id)):
            event_id = add_dead_letter(
                self.events, session, original_subject, payload, correlation_id=correlation_id
            )
            self.logger.error("added a dead letter", extra={"event_id": event_id})
        return event_id

    def _facts(self, event_id: str | None, subject: str, correlation_id: str | None) -> LogFacts:
        name = self.service_name
        correlation = correlation_id or event_id
        return LogFacts(EntryPoint.PUBLISHER, name, event_id, str(subject), correlation, name)


def _one(name: str, given: Any, older_name: str, older: Any) -> Any:
    """Return the one that was given, by its name or by its older name."""
    if (given is None) == (older is None):
        which = "is missing" if given is None else f"and {older_name} are the same: give one"
        raise TypeError(f"publish_event: {name} {which}")
    return older if given is None else given
