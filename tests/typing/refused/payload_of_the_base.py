"""An event of a base model is no event of the derived one."""

from pydantic import BaseModel

from outbox import EventEnvelope


class OrderPlaced(BaseModel):
    order_id: int


class RushOrderPlaced(OrderPlaced):
    hours: int


def refused(event: EventEnvelope[OrderPlaced]) -> EventEnvelope[RushOrderPlaced]:
    return event  # refused
