"""A time of delivery is a datetime."""

from sqlalchemy.orm import Session

from outbox import Outbox


def refused(events: Outbox, session: Session) -> None:
    events.add(session, "evt.order.placed.v1", {}, deliver_at=60)  # refused
