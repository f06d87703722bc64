"""A listener's requeued dead letters: each is run from its own row, once, on it alone."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta

from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from outbox.envelope import MalformedMessage, decode_headers
from outbox.errors import DatabaseUnavailable, hide_parameters
from outbox.jetstream.pulling import Message
from outbox.listener.attempt import InHand, Work
from outbox.listener.handling import Handling, summary
from outbox.postgres import redrive
from outbox.postgres.dead_letters import printable
from outbox.postgres.redrive import Requeued

logger = logging.getLogger(__name__)
LOOK = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class Redriving:
    """Looks for requeued dead letters of one listener while it runs."""

    handling: Handling
    schema: str
    listener: str
    pause: Callable[[timedelta | float], Awaitable[bool]]  # returns True when stopping

    async def run(self) -> None:
        """Look once a second until stopped; an outage is sat out."""
        while not await self.pause(LOOK):
            try:
                await self.once()
            except (SQLAlchemyError, OSError, DatabaseUnavailable) as error:
                logger.debug("cannot redrive", extra={"error_type": type(error).__name__})

    async def once(self) -> int:
        """Run what is requeued now, one after the other; return how many were handled."""
        handled = after = 0
        while not self.handling.stopping.is_set():
            async with self.handling.transaction() as session:
                letter = await redrive.requeued(session, self.schema, self.listener, after)
            if letter is None:
                return handled
            after = letter.id
            handled += await self._one(letter)
        return handled

    async def _one(self, letter: Requeued) -> int:
        try:
            work = self.handling.read(_message(letter), letter.event_id)
        except (MalformedMessage, ValidationError) as error:
            text = summary(error) if isinstance(error, ValidationError) else str(error)
            await self._close(letter, text)
            return 0
        async with self.handling.place():
            with self.handling.logged(work.event):
                return await self._handle(letter, work)

    async def _handle(self, letter: Requeued, work: Work) -> int:
        try:
            new = await self.handling.attempt.run(
                [work], self.handling.handle, marked=False, letter=letter.id
            )
        except (DatabaseUnavailable, InHand):
            return 0  # it stays requeued
        except Exception as error:  # the handler's failure, as in `Handling`
            hide_parameters(error)
            logger.warning(
                "a requeued event failed again",
                extra={"listener": self.listener, "error_type": type(error).__name__},
                exc_info=True,
            )
            await self._close(letter, f"{type(error).__name__}: {error}")
            return 0
        if not new:
            await self._close(letter, None)
        return new

    async def _close(self, letter: Requeued, error: str | None) -> None:
        note = "the inbox knew it" if error is None else error[:200]
        async with self.handling.transaction() as session:
            await redrive.close(
                session,
                self.schema,
                letter.id,
                error=None if error is None else printable(error),
                note=printable(note),
            )


def _message(letter: Requeued) -> Message:
    return Message(
        subject=letter.subject,
        headers=decode_headers(letter.headers),
        body=letter.body,
        reply="",
        stream=letter.stream or "",
        sequence=letter.sequence or 0,
        delivered=1,
        timestamp=letter.failed_at,
    )
