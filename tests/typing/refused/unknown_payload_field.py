"""The payload has the fields of its model."""

from pydantic import BaseModel

from outbox import EventEnvelope


class OrderPlaced(BaseModel):
    order_id: int


def refused(event: EventEnvelope[OrderPlaced]) -> None:
    print(event.payload.order_number)  # refused
