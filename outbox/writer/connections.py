"""Events of a Connection: its own, and those of the sessions that use it.

The Connection's `commit` event is the last moment before the driver's COMMIT. A commit never
succeeds while events added to it are unwritten.
"""

from collections.abc import Iterable
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Transaction
from sqlalchemy.exc import InvalidRequestError, ResourceClosedError

from outbox.errors import InvalidSession
from outbox.writer import internals
from outbox.writer.buffers import PendingEvent, Place, Share, write


class Participant:
    """A session's shares, as a connection sees them."""

    def __init__(self) -> None:
        self.committing = False  # its commit has begun: the end of its savepoint is its COMMIT
        self.wrote = False

    def open_shares(self) -> list[Share]:
        """Return the shares of all transactions that are open."""
        raise NotImplementedError


class Ledger:
    """What one connection's current transaction will commit."""

    keep_written = False  # `outbox.testing` shows what a transaction has written already

    def __init__(self) -> None:
        self.root: Transaction | None = None
        self.share = Share()
        self.written = Share()
        self.sessions: list[Participant] = []
        self.twophase = False

    def follow(self, connection: Connection) -> None:
        """Forget what belonged to an earlier transaction: it has ended, and not by our COMMIT."""
        root = connection.get_transaction()
        if self.root is not root:
            self.root, self.share, self.written, self.sessions = root, Share(), Share(), []

    def shares(self) -> list[Share]:
        """Return every share that may hold events of this transaction."""
        return [share for each in self.sessions for share in each.open_shares()] + [self.share]


_ledgers: WeakKeyDictionary[Connection, Ledger] = WeakKeyDictionary()


def ledger_of(connection: Connection) -> Ledger:
    """Return the ledger of the current transaction, attaching the hooks the first time."""
    ledger = _ledgers.get(connection)
    if ledger is None:
        ledger = _ledgers[connection] = Ledger()
        internals.listen(connection, "commit", _write_before_commit)
        internals.listen(connection, "rollback_savepoint", _forget_savepoint)
        internals.listen(connection, "release_savepoint", _release_savepoint)
    ledger.follow(connection)
    if not ledger.twophase and internals.is_twophase(connection):
        ledger.twophase = True
        internals.listen(connection, "prepare_twophase", _write_before_prepare)
        internals.listen(connection, "commit_twophase", _write_before_twophase_commit)
    return ledger


def open_share(connection: Connection, place: Place, *, asynchronous: bool) -> Share:
    """Return the share of this connection's transaction, which is begun when there is none.

    Raises:
        InvalidSession: the connection is closed, failed, not PostgreSQL, or in AUTOCOMMIT.
    """
    internals.check_database(connection, asynchronous=asynchronous)
    try:
        transaction = connection.get_transaction() or connection.begin()
    except (InvalidRequestError, ResourceClosedError) as error:
        raise InvalidSession(f"no transaction can begin on this connection: {error}") from error
    nested = connection.get_nested_transaction()
    if not transaction.is_active or (nested is not None and not nested.is_active):
        raise InvalidSession("the connection's transaction has failed or ended: roll back first")
    share = ledger_of(connection).share
    share.binds[place] = connection
    return share


def join(connection: Connection, participant: Participant) -> None:
    """Have the connection's commit write what a session has still buffered by then."""
    ledger = ledger_of(connection)
    if participant not in ledger.sessions:
        ledger.sessions.append(participant)


def write_early(connection: Connection) -> int:
    """Write what the connection itself holds; return how many events were written.

    Events added outside the innermost open savepoint stay: if they were written inside it, its
    rollback would take them along. COMMIT writes them.
    """
    ledger = ledger_of(connection)
    open_now = internals.savepoints(connection)
    items = [item for item in ledger.share.items if item.savepoints == open_now]
    write_items(connection, [ledger.share], items, notify=False)
    return len(items)


def write_items(
    connection: Connection, shares: Iterable[Share], items: list[PendingEvent], *, notify: bool
) -> None:
    """Write `items` of `shares` as `buffers.write` does; they are remembered for tests only."""
    write(connection, shares, items, notify=notify)
    if Ledger.keep_written:
        inside = internals.savepoints(connection)  # a rollback of one of these takes the rows along
        for item in items:
            item.savepoints = inside
        ledger_of(connection).written.items += items


def held_by(connection: Connection) -> list[PendingEvent]:
    """Return what the connection's transaction holds or has written, where that is remembered."""
    ledger = ledger_of(connection)
    return [*ledger.share.items, *ledger.written.items]


def _write_before_commit(connection: Connection) -> None:
    _write_all(connection, notify=True)


def _write_before_prepare(connection: Connection, xid: object) -> None:
    del xid
    _write_all(connection, notify=False)  # PREPARE refuses a transaction that executed NOTIFY


def _write_before_twophase_commit(connection: Connection, xid: object, is_prepared: object) -> None:
    del xid
    if not is_prepared:  # without a prepare this is the one moment
        _write_all(connection, notify=False)


def _write_all(connection: Connection, *, notify: bool) -> None:
    ledger = _ledgers[connection]
    ledger.follow(connection)
    shares = ledger.shares()
    items = [item for share in shares for item in share.items if item.belongs_to(connection)]
    if not items:
        return
    internals.refuse_autocommit(connection)
    write_items(connection, shares, items, notify=notify)
    for session in ledger.sessions:
        session.wrote = True


def _forget_savepoint(connection: Connection, name: str, context: object) -> None:
    del context
    ledger = _ledgers[connection]
    for share in (*ledger.shares(), ledger.written):
        share.roll_back(name)


def _release_savepoint(connection: Connection, name: str, context: object) -> None:
    del context
    ledger = _ledgers[connection]
    for session in ledger.sessions:
        if session.committing:  # join_transaction_mode="create_savepoint": this is its COMMIT
            shares = session.open_shares()
            items = [x for share in shares for x in share.items if x.belongs_to(connection)]
            write_items(connection, shares, items, notify=False)
    for share in (*ledger.shares(), ledger.written):
        share.release(name)
