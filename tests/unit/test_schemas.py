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


class Chain(BaseModel):
    value: int
    next: "Chain | None" = None


class Links(BaseModel):
    """A chain of texts."""

    value: str
    next: "Links | None" = None


class Card(BaseModel):
    kind: Literal["card"]
    item: Item


class Cash(BaseModel):
    kind: Literal["cash"]
    item: Item


class CardWithoutCount(BaseModel):
    kind: Literal["card"]
    item: ItemWithoutCount


class CashWithoutCount(BaseModel):
    kind: Literal["cash"]
    item: ItemWithoutCount


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
    (
        "inside each of a union",
        Kind.REMOVED_FIELD,
        "$.a.item.count",
        lambda: (model(a=Card | Cash), model(a=CardWithoutCount | CashWithoutCount)),
    ),
    (
        "union lost a model",
        Kind.CLOSED_ENUM,
        "$.a.kind",
        lambda: (model(a=Card | Cash), model(a=Card)),
    ),
    ("inside itself", Kind.NARROWED_TYPE, "$.a.value", lambda: (model(a=Chain), model(a=Links))),
    (
        "inside a tuple",
        Kind.NARROWED_TYPE,
        "$.a[1]",
        lambda: (model(a=tuple[int, str]), model(a=tuple[int, int])),
    ),
    (
        "list to tuple",
        Kind.NARROWED_TYPE,
        "$.a",
        lambda: (model(a=list[int]), model(a=tuple[int, int])),
    ),
    (
        "names in a dict",
        Kind.CLOSED_ENUM,
        "$.a names",
        lambda: (model(a=dict[str, int]), model(a=dict[Literal["x"], int])),
    ),
    (
        "pattern of names in a dict",
        Kind.NARROWED_TYPE,
        "$.a names",
        lambda: (
            model(a=dict[str, int]),
            model(a=dict[Annotated[str, Field(pattern="^x")], int]),
        ),
    ),
    (
        "excluded limit",
        Kind.NARROWED_TYPE,
        "$.a",
        lambda: (model(a=Annotated[int, Field(ge=0)]), model(a=Annotated[int, Field(gt=0)])),
    ),
    (
        "coarser",
        Kind.NARROWED_TYPE,
        "$.a",
        lambda: (model(a=int), model(a=Annotated[int, Field(multiple_of=5)])),
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
    ("recursive and optional", lambda: (model(a=Chain), model(a=Chain))),
    ("tuple to list", lambda: (model(a=tuple[int, int]), model(a=list[int]))),
    (
        "included limit",
        lambda: (model(a=Annotated[int, Field(gt=0)]), model(a=Annotated[int, Field(ge=0)])),
    ),
    (
        "finer",
        lambda: (
            model(a=Annotated[int, Field(multiple_of=10)]),
            model(a=Annotated[int, Field(multiple_of=5)]),
        ),
    ),
    (
        "limit that limits nothing",
        lambda: (model(a=str), model(a=Annotated[str, Field(min_length=0)])),
    ),
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


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (model(a=Colour), model(a=MoreColours), "$.a: widened: 'green'"),
        (model(a=int), model(a=float), "$.a: widened: number"),
        (model(a=str), model(a=str | None), "$.a: widened: null"),
        (model(a=str), model(a=Any), "$.a: widened: anything"),
        (model(a=str), model(a=(str, "")), "$.a: widened: it may be missing"),
        (closed(a=str), model(a=str, b=(str, "")), "$.b: widened: older readers"),
    ],
)
def test_what_older_readers_may_refuse_is_noted(
    old: type[BaseModel], new: type[BaseModel], says: str
) -> None:
    (note,) = compared(old, new)
    assert (note.kind, note.breaks) == (Kind.WIDENED, False)
    assert says in str(note)


@pytest.mark.parametrize(
    "rubbish",
    [
        {SUBJECT: None},
        {SUBJECT: {"schema": []}},
        {SUBJECT: {"schema": {"properties": {"a": {"maxLength": "much"}}}}},
        {SUBJECT: {"schema": {"$defs": []}}},
        [],
        {SUBJECT: {"schema": {"$ref": "#/$defs/Nowhere"}}},
        {SUBJECT: {"schema": {"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}}}},
    ],
)
def test_rubbish_is_a_value_error(rubbish: object) -> None:
    registry = Registry()
    registry.register(SUBJECT)(Item)
    with pytest.raises(ValueError, match=r"should be a valid|not defined|circle"):
        changes(rubbish, freeze(registry))


def test_frozen_schemas_are_the_same_each_time_and_sorted() -> None:
    registry = Registry()
    registry.register("evt.b.v1", "evt.a.v1", deprecated_by="evt.c.v1")(Item)
    frozen = freeze(registry)
    assert list(frozen) == ["evt.a.v1", "evt.b.v1"]
    assert frozen == freeze(registry)
    assert frozen["evt.a.v1"]["payload"] == "Item"
    assert frozen["evt.a.v1"]["deprecated_by"] == "evt.c.v1"
