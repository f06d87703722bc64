"""Proof that a handler left the transaction alone.

The session and its connection refuse every commit but ours while a handler runs. What no event
can refuse (a COMMIT or ROLLBACK as SQL text, a swallowed database error) shows afterwards: the
transaction has another xid, or answers 25P02.
"""

from types import TracebackType
from typing import Self

from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from outbox.errors import OutboxError
from outbox.postgres import inbox

ABORTED = "25P02"  # in_failed_sql_transaction


class TransactionBroken(OutboxError):  # noqa: N818 - internal
    """The handler ended or broke the transaction; nothing of it was committed."""


class TransactionEscaped(OutboxError):  # noqa: N818 - internal
    """The handler ended the transaction by SQL: what it had done may be committed already."""


class Guard:
    """Refuses commits of a session's transaction, from `with` on until `release`."""

    def __init__(self, session: AsyncSession, connection: Connection, xid: str) -> None:
        self._session = session
        self._connection = connection
        self._xid = xid
        self._transaction = session.sync_session.get_transaction()
        self._violation: str | None = None
        self._released = False

    def __enter__(self) -> Self:
        event.listen(self._session.sync_session, "before_commit", self._before_commit)
        event.listen(self._connection, "commit", self._on_commit)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        event.remove(self._session.sync_session, "before_commit", self._before_commit)
        event.remove(self._connection, "commit", self._on_commit)

    def _before_commit(self, session: Session) -> None:
        if not session.in_nested_transaction():  # a savepoint may be released
            self._refuse("committed the session")

    def _on_commit(self, connection: Connection) -> None:
        del connection
        self._refuse("committed the connection")

    def _refuse(self, what: str) -> None:
        if self._released:
            return
        self._violation = f"the handler {what}; the listener does that"
        raise TransactionBroken(self._violation)

    def _current(self) -> SessionTransaction | None:
        return self._session.sync_session.get_transaction()

    async def check(self, schema: str) -> None:
        """Return if the transaction is the same and alive.

        Raises:
            TransactionBroken: it will roll back; the attempt failed.
            TransactionEscaped: it ended without us; the attempt must not be repeated.
        """
        if self._violation is not None:
            raise TransactionBroken(self._violation)
        current = self._current()
        if current is None or current is not self._transaction or not current.is_active:
            raise TransactionBroken("the handler ended the session's transaction")
        try:
            xid = await inbox.current_xid(self._session, schema)
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) == ABORTED:
                raise TransactionBroken("the handler swallowed a database error") from error
            raise
        if xid != self._xid:
            raise TransactionEscaped("the handler ended the transaction by SQL")

    def release(self) -> None:
        """Allow the one commit that follows."""
        self._released = True
