"""Events of a Session: its hooks, attached by its first `add`."""

from typing import cast

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import InvalidRequestError, UnboundExecutionError
from sqlalchemy.orm import Session, SessionTransaction
from typing_extensions import override

from outbox.errors import InvalidSession
from outbox.postgres import wake
from outbox.writer import connections, internals
from outbox.writer.buffers import PendingEvent, Place, Share

_KEY = "outbox.writer"  # in Session.info, which a session keeps for its own life
_FLUSHES_MAX = 100  # as many as Session.commit itself allows


class Buffer(connections.Participant):
    """What a session has added and not yet written, by the transaction that owns it."""

    def __init__(self) -> None:
        super().__init__()
        self.shares: dict[SessionTransaction, Share] = {}

    @override
    def open_shares(self) -> list[Share]:
        """Return the shares of all transactions that are open."""
        return list(self.shares.values())


def open_share(
    session: Session, place: Place, *, asynchronous: bool
) -> tuple[Share, Engine | Connection, tuple[str, ...], Buffer]:
    """Return the share of the current transaction or savepoint, begun when there is none.

    Also the bind that its events will be written through, and that connection's savepoints.

    Raises:
        InvalidSession: the session is closed, failed, has no or the wrong bind, or AUTOCOMMIT.
    """
    root = session.get_transaction()
    transaction = session.get_nested_transaction() or root
    if transaction is None or root is None:
        root = transaction = _begin(session)
    if not transaction.is_active:
        raise InvalidSession("the session's transaction has failed or is ending: roll back first")
    buffer: Buffer | None = session.info.get(_KEY)
    share = None if buffer is None else buffer.shares.get(transaction)
    bind = None if share is None else share.binds.get(place)
    if bind is None:
        bind = _checked_bind(session, place, asynchronous=asynchronous)
        buffer = _attached(session)
        share = buffer.shares.setdefault(transaction, Share())
        _join_held(session, buffer, bind, root)
        share.binds[place] = bind
    assert buffer is not None and share is not None  # noqa: S101, PT018 - set together with bind
    if isinstance(bind, Connection):
        return share, bind, internals.savepoints(bind), buffer
    held = internals.held_connection(root, bind)
    names = () if held is None else internals.savepoints(held[0])
    return share, bind, names, buffer


def write_now(session: Session, *, last: bool) -> int:
    """Write what the current transaction or savepoint has buffered; return how many events.

    Objects are flushed first, so that their row locks are taken before ids are drawn.

    Args:
        last: COMMIT follows at once, so the relay may be told in it.
    """
    _flush(session)
    buffer: Buffer | None = session.info.get(_KEY)
    transaction = session.get_nested_transaction() or session.get_transaction()
    if buffer is None or transaction is None:
        return 0
    share = buffer.shares.get(transaction)
    return 0 if share is None else _write(session, buffer, share, last=last)


def held_by(session: Session) -> list[PendingEvent]:
    """Return what the session's open transactions hold, and the connections that they use."""
    buffer: Buffer | None = session.info.get(_KEY)
    found = [] if buffer is None else [x for share in buffer.open_shares() for x in share.items]
    for connection in internals.connections(session):
        found += connections.held_by(connection)
    return found


def _begin(session: Session) -> SessionTransaction:
    if not session.autobegin:
        raise InvalidSession("this session has autobegin=False and no transaction: begin one first")
    try:
        return session.begin()
    except InvalidRequestError as error:
        raise InvalidSession(f"no transaction can begin on this session: {error}") from error


def _checked_bind(session: Session, place: Place, *, asynchronous: bool) -> Engine | Connection:
    try:
        bind = session.get_bind(**(place.bind_arguments or {}))  # type: ignore[arg-type]
    except UnboundExecutionError as error:
        raise InvalidSession(
            "this session has no bind for events; name one with Outbox(bind_arguments=...)"
        ) from error
    options = getattr(session, "execution_options", None) or {}
    if options.get("isolation_level") == "AUTOCOMMIT":
        raise InvalidSession("an AUTOCOMMIT connection has no transaction for events to be part of")
    internals.check_database(bind, asynchronous=asynchronous)
    return bind


def _attached(session: Session) -> Buffer:
    buffer: Buffer | None = session.info.get(_KEY)
    if buffer is None:
        buffer = session.info[_KEY] = Buffer()
        internals.listen(session, "before_commit", _before_commit)
        internals.listen(session, "after_begin", _after_begin)
        internals.listen(session, "after_commit", _after_commit)
        internals.listen(session, "after_rollback", _after_rollback)
        internals.listen(session, "after_transaction_end", _after_transaction_end)
    return buffer


def _join_held(
    session: Session, buffer: Buffer, bind: Engine | Connection, root: SessionTransaction
) -> None:
    """Follow the connection that the transaction has, or will be given without asking."""
    held = internals.held_connection(root, bind)
    if held is not None:
        internals.refuse_autocommit(held[0])
        connections.join(held[0], buffer)
    elif isinstance(bind, Connection):
        connections.join(bind, buffer)
    elif internals.is_ending(root):
        # A first add inside a hook of commit(): our own hook is too late for this round, and a
        # transaction without a connection has no commit event. I/O is allowed here.
        connections.join(session.connection(bind_arguments={"bind": bind}), buffer)


def _write(session: Session, buffer: Buffer, share: Share, *, last: bool) -> int:
    count = 0
    for bind in dict.fromkeys(item.bind for item in share.items):
        connection = session.connection(bind_arguments={"bind": bind})
        internals.refuse_autocommit(connection)
        connections.join(connection, buffer)
        whole = last and isinstance(bind, Engine)  # a joined connection is committed by its owner
        items = [item for item in share.items if item.bind is bind]
        if not whole:
            items = _safe_inside(session, connection, items)
        if items:
            notify = whole and not internals.is_twophase(connection)
            connections.write_items(connection, [share], items, notify=notify)
        count += len(items)
    buffer.wrote = buffer.wrote or count > 0
    return count


def _safe_inside(
    session: Session, connection: Connection, items: list[PendingEvent]
) -> list[PendingEvent]:
    """Return the events that no savepoint opened since could take along in its rollback.

    The session's own savepoints do not count: the current transaction owns these events.
    """
    transaction = session.get_nested_transaction() or session.get_transaction()
    own = internals.session_savepoints(transaction, connection)
    open_now = internals.savepoints(connection)
    foreign = tuple(name for name in open_now if name not in own)
    return [
        item
        for item in items
        if tuple(name for name in item.savepoints if name not in own) == foreign
    ]


def _flush(session: Session) -> None:
    """Flush until clean: hooks may add objects, and their locks must precede the events' ids."""
    for _ in range(_FLUSHES_MAX):
        if not (session.new or session.deleted or session.dirty):
            return
        session.flush()


def _before_commit(session: Session) -> None:
    if session.in_nested_transaction():
        return  # a savepoint's release
    buffer: Buffer = session.info[_KEY]
    root = cast("SessionTransaction", session.get_transaction())
    _flush(session)
    buffer.committing = True
    share = buffer.shares.get(root)
    if share is None:
        return
    _write(session, buffer, share, last=True)
    if not session.twophase and len(internals.engines(root)) > 1 and buffer.wrote:
        raise InvalidSession(
            "events cannot be part of a commit on several engines without twophase=True"
        )


def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    buffer: Buffer = session.info[_KEY]
    if transaction.parent is None and buffer.shares:
        connections.join(connection, buffer)


def _after_commit(session: Session) -> None:
    buffer: Buffer = session.info[_KEY]
    nested = session.get_nested_transaction()
    if nested is not None:
        _release(buffer, nested)
        return
    root = cast("SessionTransaction", session.get_transaction())
    wrote, buffer.wrote, buffer.committing = buffer.wrote, False, False
    share = buffer.shares.get(root)
    if share is not None and share.items:
        _hand_over(share)
        if share.items:
            raise InvalidSession("events were added too late in this commit; it wrote nothing else")
    if wrote:
        wake.notify_local()


def _release(buffer: Buffer, nested: SessionTransaction) -> None:
    """Give a released savepoint's events to the transaction or savepoint around it."""
    share = buffer.shares.get(nested)
    if share is None:
        return
    parent = nested.parent
    while parent is not None and parent.parent is not None and not parent.nested:
        parent = parent.parent  # a flush's own subtransaction owns nothing
    assert parent is not None  # noqa: S101 - a savepoint has a parent
    around = buffer.shares.setdefault(parent, Share())
    share.pour_into(around)


def _after_rollback(session: Session) -> None:
    buffer: Buffer = session.info[_KEY]
    transaction = session.get_nested_transaction() or session.get_transaction()
    if transaction is not None:
        buffer.shares.pop(transaction, None)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    """Drop what the transaction still owns, but for a session that only visited a connection."""
    buffer: Buffer = session.info[_KEY]
    share = buffer.shares.pop(transaction, None)
    if transaction.parent is None:
        buffer.committing = buffer.wrote = False
        if share is not None and share.items and _left_open(session, transaction, share):
            _hand_over(share)


def _left_open(session: Session, transaction: SessionTransaction, share: Share) -> bool:
    """Return True when the session ended and left its rows to the owner of the connection."""
    connection = share.items[0].bind
    if not isinstance(connection, Connection):
        return False
    held = internals.held_connection(transaction, connection)
    if held is not None:
        return not held[1]
    mode = session.join_transaction_mode
    return mode == "rollback_only" or (
        mode == "conditional_savepoint" and not connection.in_nested_transaction()
    )


def _hand_over(share: Share) -> None:
    """Give what is left to the connections whose transactions are still open."""
    for connection in dict.fromkeys(item.bind for item in share.items):
        if not isinstance(connection, Connection) or connection.closed or connection.invalidated:
            continue
        root = connection.get_transaction()
        if root is None or not root.is_active:
            continue
        moved = Share()
        moved.items = [item for item in share.items if item.bind is connection]
        moved.known = {k: x for k, x in share.known.items() if x.bind is connection}
        share.items = [item for item in share.items if item.bind is not connection]
        moved.pour_into(connections.ledger_of(connection).share)
