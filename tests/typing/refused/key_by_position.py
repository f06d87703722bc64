"""What follows the payload is named."""

from sqlalchemy.orm import Session

from outbox import Outbox


def refused(events: Outbox, session: Session) -> None:
    events.add(session, "evt.order.placed.v1", {}, "order-7")  # refused
