"""What breaks a reader or an older event is found; what breaks neither is not."""

from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from pydantic import BaseModel, ConfigDict, Field

from outbox.operate.schemas import Change, Kind, changes, freeze
from outbox.registry import Registry

SUBJECT = "evt.order.placed.v1"


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class FewerColours(StrEnum):
    RED = "red"


class MoreColours(StrEnum):
    RED = "red"
    BLUE = "blue"
    GREEN = "green"


class Item(BaseModel):
    sku: str
    count: int


class ItemWithoutCount(BaseModel):
    sku: str


class ItemWithNote(BaseModel):
    """An item, now with a note."""

    sku: str
    count: int
    note: str | None = None


class Tree(BaseModel):
    name: str
    children: list["Tree"] = []


def model(**fields: Any) -> type[BaseModel]:
    """Return a model of these fields; a tuple is a type and its default."""
    plain = {name: each[0] if isinstance(each, tuple) else each for name, each in fields.items()}
    defaults = {name: each[1] for name, each in fields.items() if isinstance(each, tuple)}
    return type("Payload", (BaseModel,), {"__annotations__": plain, **defaults})


def closed(**fields: Any) -> type[BaseModel]:
    """Return a model that refuses other fields."""
    return type(
        "Payload",
        (BaseModel,),
        {"__annotations__": fields, "model_config": ConfigDict(extra="forbid")},
    )


def compared(old: type[BaseModel], new: type[BaseModel]) -> list[Change]:
    frozen = []
    for each in (old, new):
        registry = Registry()
        registry.register(SUBJECT)(each)
        frozen.append(freeze(registry))
    return changes(*frozen)


BREAKS: list[tuple[str, Kind, str, Callable[[], tuple[type[BaseModel], type[BaseModel]]]]] = [
    ("removed", Kind.REMOVED_FIELD, "$.b", lambda: (model(a=int, b=str), model(a=int))),
    ("removed optional", Kind.REMOVED_FIELD, "$.b", lambda: (model(b=(int, 1)), model())),
    ("renamed", Kind.REQUIRED_FIELD, "$.c", lambda: (model(b=str), model(c=str))),
    ("new and required", Kind.REQUIRED_FIELD, "$.b", lambda: (model(a=int), model(a=int, b=str))),
    ("became required", Kind.REQUIRED_FIELD, "$.a", lambda: (model(a=(int, 1)), model(a=int))),
    ("other type", Kind.NARROWED_TYPE, "$.a", lambda: (model(a=str), model(a=int))),
    ("number to integer", Kind.NARROWED_TYPE, "$.a", lambda: (model(a=float), model(a=int))),
    ("not null", Kind.NARROWED_TYPE, "$.a", lambda: (model(a=str | None), model(a=str))),
    ("union lost one", Kind.NARROWED_TYPE, "$.a", lambda: (model(a=int | str), model(a=int))),
    ("any to str", Kind.NARROWED_TYPE, "$.a", lambda: (model(a=Any), model(a=str))),
    ("format", Kind.NARROWED_TYPE, "$.a", lambda: (model(a=str), model(a=UUID))),
    ("other format", Kind.NARROWED_TYPE, "$.a", lambda: (model(a=UUID), model(a=datetime))),
    (
        "length",
        Kind.NARROWED_TYPE,
        "$.a",
        lambda: (model(a=str), model(a=Annotated[str, Field(max_length=5)])),
    ),
    (
        "range",
        Kind.NARROWED_TYPE,
        "$.a",
        lambda: (
            model(a=Annotated[int, Field(ge=0, le=10)]),
            model(a=Annotated[int, Field(ge=1, le=10)]),
        ),
    ),
    (
        "pattern",
        Kind.NARROWED_TYPE,
        "$.a",
        lambda: (model(a=str), model(a=Annotated[str, Field(pattern="^x")])),
    ),
    ("enum lost one", Kind.CLOSED_ENUM, "$.a", lambda: (model(a=Colour), model(a=FewerColours))),
    ("str to enum", Kind.CLOSED_ENUM, "$.a", lambda: (model(a=str), model(a=Colour))),
    ("str to literal", Kind.CLOSED_ENUM, "$.a", lambda: (model(a=str), model(a=Literal["x"]))),
    (
        "inside a model",
        Kind.REMOVED_FIELD,
        "$.a.count",
        lambda: (model(a=Item), model(a=ItemWithoutCount)),
    ),
    (
        "inside a list",
        Kind.REMOVED_FIELD,
        "$.a[].count",
        lambda: (model(a=list[Item]), model(a=list[ItemWithoutCount])),
    ),
    (
        "inside an optional model",
        Kind.REQUIRED_FIELD,
        "$.a.count",
        lambda: (model(a=ItemWithoutCount | None), model(a=Item | None)),
    ),
    (
        "inside a dict",
        Kind.NARROWED_TYPE,
        "$.a.*",
        lambda: (model(a=dict[str, str]), model(a=dict[str, int])),
    ),
    ("closed to others", Kind.NARROWED_TYPE, "$", lambda: (model(a=int), closed(a=int))),
]

HARMLESS: list[tuple[str, Callable[[], tuple[type[BaseModel], type[BaseModel]]]]] = [
    ("nothing", lambda: (model(a=int, b=Item), model(a=int, b=Item))),
    ("new and optional", lambda: (model(a=int), model(a=int, b=(str | None, None)))),
    ("became optional", lambda: (model(a=int), model(a=(int, 1)))),
    ("other default", lambda: (model(a=(int, 1)), model(a=(int, 2)))),
    ("other order", lambda: (model(a=int, b=str), model(b=str, a=int))),
    ("integer to number", lambda: (model(a=int), model(a=float))),
    ("may be null", lambda: (model(a=str), model(a=str | None))),
    ("enum got one more", lambda: (model(a=Colour), model(a=MoreColours))),
    ("enum to str", lambda: (model(a=Colour), model(a=str))),
    ("longer", lambda: (model(a=Annotated[str, Field(max_length=5)]), model(a=str))),
    ("no format", lambda: (model(a=UUID), model(a=str))),
    ("described inside", lambda: (model(a=Item), model(a=ItemWithNote))),
    ("open to others", lambda: (closed(a=int), model(a=int))),
    ("union in other order", lambda: (model(a=int | str), model(a=str | int))),
    ("decimals stay", lambda: (model(a=Decimal), model(a=Decimal))),
    ("recursive", lambda: (model(a=Tree), model(a=Tree))),
]


@pytest.mark.parametrize(
    ("kind", "path", "models"), [b[1:] for b in BREAKS], ids=[b[0] for b in BREAKS]
)
def test_break_is_found_and_named(
    kind: Kind, path: str, models: Callable[[], tuple[type[BaseModel], type[BaseModel]]]
) -> None:
    found = [each for each in compared(*models()) if each.breaks]
    assert (kind, path) in {(each.kind, each.path) for each in found}
    assert all(each.subject == SUBJECT for each in found)


@pytest.mark.parametrize("models", [h[1] for h in HARMLESS], ids=[h[0] for h in HARMLESS])
def test_harmless_change_is_no_break(
    models: Callable[[], tuple[type[BaseModel], type[BaseModel]]],
) -> None:
    assert [each for each in compared(*models()) if each.breaks] == []


def test_lost_subject_is_a_break_and_a_new_one_is_none() -> None:
    registry = Registry()
    registry.register(SUBJECT)(Item)
    (lost,) = changes(freeze(registry), {})
    assert (lost.kind, lost.subject, lost.breaks) == (Kind.LOST_SUBJECT, SUBJECT, True)
    assert changes({}, freeze(registry)) == []


def test_what_older_readers_may_refuse_is_noted() -> None:
    (note,) = compared(model(a=Colour), model(a=MoreColours))
    assert (note.kind, note.breaks) == (Kind.WIDENED, False)
    assert "'green'" in str(note)


@pytest.mark.parametrize(
    "rubbish",
    [
        {SUBJECT: None},
        {SUBJECT: {"schema": []}},
        {SUBJECT: {"schema": {"$ref": "#/$defs/Nowhere"}}},
        {SUBJECT: {"schema": {"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}}}},
    ],
)
def test_rubbish_is_a_value_error(rubbish: dict[str, Any]) -> None:
    registry = Registry()
    registry.register(SUBJECT)(Item)
    with pytest.raises(ValueError, match=r"schema|defined|circle"):
        changes(rubbish, freeze(registry))


def test_frozen_schemas_are_the_same_each_time_and_sorted() -> None:
    registry = Registry()
    registry.register("evt.b.v1", "evt.a.v1", deprecated_by="evt.c.v1")(Item)
    frozen = freeze(registry)
    assert list(frozen) == ["evt.a.v1", "evt.b.v1"]
    assert frozen == freeze(registry)
    assert frozen["evt.a.v1"]["payload"] == "Item"
    assert frozen["evt.a.v1"]["deprecated_by"] == "evt.c.v1"
