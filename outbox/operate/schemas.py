"""JSON Schemas of registered payloads, and what of a change breaks those who use them. Pure.

A stream holds events of older publishers, so what an older schema allows must stay readable; and
fields that readers know must not vanish. Both are breaks. That readers of an older schema may
refuse what only the newer one allows is noted, and is no break: update them before the publishers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import zip_longest
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict, override

from outbox.registry import Registry

# The keywords of JSON Schema that pydantic writes and that say what a value may be.
Schema = TypedDict(
    "Schema",
    {
        "$ref": str,
        "$defs": dict[str, "Schema"],
        "anyOf": list["Schema"],
        "oneOf": list["Schema"],
        "allOf": list["Schema"],
        "type": str | list[str],
        "enum": list[Any],
        "const": Any,
        "format": str,
        "pattern": str,
        "multipleOf": int | float,
        "minimum": int | float,
        "maximum": int | float,
        "exclusiveMinimum": int | float,
        "exclusiveMaximum": int | float,
        "minLength": int,
        "maxLength": int,
        "minItems": int,
        "maxItems": int,
        "minProperties": int,
        "maxProperties": int,
        "properties": dict[str, "Schema"],
        "required": list[str],
        "additionalProperties": "Schema | bool",
        "patternProperties": dict[str, "Schema"],
        "propertyNames": "Schema",
        "items": "Schema",
        "prefixItems": list["Schema"],
    },
    total=False,
)


class Entry(TypedDict):
    """What is compared of one frozen registration."""

    schema: Schema


_FROZEN = TypeAdapter(dict[str, Entry])


class Kind(StrEnum):
    """What has changed for the worse; the last one is a note only."""

    LOST_SUBJECT = "lost subject"
    REMOVED_FIELD = "removed field"
    REQUIRED_FIELD = "newly required field"
    NARROWED_TYPE = "narrowed type"
    CLOSED_ENUM = "closed enum"
    WIDENED = "widened"


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a subject's schema, and where: `$` is the payload."""

    kind: Kind
    subject: str
    path: str
    detail: str

    @property
    def breaks(self) -> bool:
        """True unless it is a note."""
        return self.kind is not Kind.WIDENED

    @override
    def __str__(self) -> str:
        return f"{self.subject} {self.path}: {self.kind}: {self.detail}"


def freeze(registry: Registry) -> dict[str, Any]:
    """Return the schemas of all registrations by subject, the same for the same payloads."""
    return {
        each.subject: {
            "payload": each.payload.__name__,
            "deprecated_by": each.deprecated_by,
            "schema": each.payload.model_json_schema(),
        }
        for each in registry
    }


def changes(old: object, new: object) -> list[Change]:
    """Return what of the change from `old` to `new`, both frozen, concerns others.

    Raises:
        ValueError: one of them is not what `freeze` returns.
    """
    was, now = _checked(old), _checked(new)
    found: list[Change] = []
    for subject in sorted(was):
        if subject not in now:
            found.append(Change(Kind.LOST_SUBJECT, subject, "$", "it is not registered any more"))
            continue
        before, after = was[subject]["schema"], now[subject]["schema"]
        compared = _Comparison(subject, before.get("$defs", {}), after.get("$defs", {}))
        found += compared.schemas("$", before, after)
    return found


def _checked(frozen: object) -> dict[str, Entry]:
    try:
        return _FROZEN.validate_python(frozen)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(f"{where}: {first['msg']}") from error


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Compares the schemas of one subject; references lead into either one's definitions."""

    subject: str
    old_definitions: dict[str, Schema]
    new_definitions: dict[str, Schema]
    outer: tuple[tuple[Schema, Schema], ...] = ()  # what holds this place: a model may hold itself

    def schemas(self, path: str, old: Schema, new: Schema) -> Iterator[Change]:
        """Compare two schemas that may be references or unions."""
        before = list(_variants(old, self.old_definitions))
        after = list(_variants(new, self.new_definitions))
        for variant in before:
            yield from self._fits(path, variant, after)
        for variant in after:
            if not any(_same_kind(each, variant) for each in before):
                yield self._change(Kind.WIDENED, path, f"{_name(variant)} is allowed now")

    def _fits(self, path: str, old: Schema, after: list[Schema]) -> Iterator[Change]:
        """Compare one alternative with those that may stand for it; the best one counts."""
        candidates = [each for each in after if _same_kind(each, old)]
        if not candidates:
            wanted = " or ".join(map(_name, after))
            yield self._change(Kind.NARROWED_TYPE, path, f"{_name(old)} is not {wanted}")
            return
        yield from min((list(self._variant(path, old, each)) for each in candidates), key=_breaks)

    def _variant(self, path: str, old: Schema, new: Schema) -> Iterator[Change]:
        if not new or (old, new) in self.outer:
            return
        yield from self._enum(path, old, new)
        yield from self._limits(path, old, new)
        inner = replace(self, outer=(*self.outer, (old, new)))
        if new.get("type") == "object":
            yield from inner.fields(path, old, new)
        if new.get("type") == "array":
            yield from inner.items(path, old, new)

    def _enum(self, path: str, old: Schema, new: Schema) -> Iterator[Change]:
        before, after = _values(old), _values(new)
        if after is None:
            if before is not None:
                yield self._change(Kind.WIDENED, path, "any value is allowed now")
            return
        if before is None:
            yield self._change(Kind.CLOSED_ENUM, path, f"only {_listed(after)} are allowed now")
            return
        if lost := [each for each in before if each not in after]:
            yield self._change(Kind.CLOSED_ENUM, path, f"{_listed(lost)} are not allowed any more")
        if more := [each for each in after if each not in before]:
            yield self._change(Kind.WIDENED, path, f"{_listed(more)} are allowed now")

    def _limits(self, path: str, old: Schema, new: Schema) -> Iterator[Change]:
        for name, before, after in (
            ("format", old.get("format"), new.get("format")),
            ("pattern", old.get("pattern"), new.get("pattern")),
        ):
            if after is not None and after != before:
                detail = f"{name} {after!r} instead of {before!r}"
                yield self._change(Kind.NARROWED_TYPE, path, detail)
        step, wider = new.get("multipleOf"), old.get("multipleOf")
        if step is not None and (wider is None or wider % step):
            yield self._change(Kind.NARROWED_TYPE, path, f"multipleOf {step} instead of {wider}")
        for limit in _LIMITS:
            if limit.tightness(new) > limit.tightness(old):
                detail = f"{limit.of(new)} instead of {limit.of(old)}"
                yield self._change(Kind.NARROWED_TYPE, path, detail)

    def fields(self, path: str, old: Schema, new: Schema) -> Iterator[Change]:
        """Compare the fields of two objects."""
        before, after = old.get("properties", {}), new.get("properties", {})
        was, now = set(old.get("required", ())), set(new.get("required", ()))
        for name in before:
            if name not in after:
                yield self._change(Kind.REMOVED_FIELD, f"{path}.{name}", "readers may need it")
                continue
            yield from self.schemas(f"{path}.{name}", before[name], after[name])
            if name in was - now:
                yield self._change(Kind.WIDENED, f"{path}.{name}", "it may be missing now")
        if old.get("additionalProperties") is False:
            for name in sorted(after.keys() - before.keys()):
                yield self._change(Kind.WIDENED, f"{path}.{name}", "older readers refuse it")
        for name in sorted(now - was):
            yield self._change(Kind.REQUIRED_FIELD, f"{path}.{name}", "older events lack it")
        yield from self._others(path, old, new)

    def _others(self, path: str, old: Schema, new: Schema) -> Iterator[Change]:
        """Compare what is said of fields that have no name."""
        (old_names, before), (new_names, after) = _unnamed(old), _unnamed(new)
        if before is False:
            return
        if after is False:
            yield self._change(Kind.NARROWED_TYPE, path, "other fields are not allowed any more")
            return
        yield from self.schemas(f"{path} names", old_names, new_names)
        if after is not True:
            yield from self.schemas(f"{path}.*", {} if before is True else before, after)

    def items(self, path: str, old: Schema, new: Schema) -> Iterator[Change]:
        """Compare the first items, which a tuple describes one by one, and all that follow."""
        before, after = old.get("prefixItems", []), new.get("prefixItems", [])
        rest = old.get("items", {}), new.get("items", {})
        for index, (was, now) in enumerate(zip_longest(before, after)):
            here = rest[0] if was is None else was, rest[1] if now is None else now
            yield from self.schemas(f"{path}[{index}]", *here)
        if old.get("maxItems") != len(before) and new.get("maxItems") != len(after):
            yield from self.schemas(f"{path}[]", *rest)

    def _change(self, kind: Kind, path: str, detail: str) -> Change:
        return Change(kind, self.subject, path, detail)


_LimitName = Literal[
    "minimum",
    "exclusiveMinimum",
    "maximum",
    "exclusiveMaximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
]


@dataclass(frozen=True, slots=True)
class _Limit:
    """A lower limit (sign 1) or an upper one (sign -1), under either of its names."""

    sign: int
    names: tuple[_LimitName, ...]
    none: float = -math.inf  # as tight as no limit at all

    def tightness(self, schema: Schema) -> tuple[float, bool]:
        """Return what is greater, the fewer values the limit allows."""
        found = ((self.sign * schema[name], "exclusive" in name) for name in self._given(schema))
        return max(found, default=(self.none, False))

    def of(self, schema: Schema) -> str:
        """Return the limit as people read it."""
        return " and ".join(f"{name} {schema[name]}" for name in self._given(schema)) or "no limit"

    def _given(self, schema: Schema) -> list[_LimitName]:
        return [name for name in self.names if name in schema]


_LIMITS = (
    _Limit(1, ("minimum", "exclusiveMinimum")),
    _Limit(-1, ("maximum", "exclusiveMaximum")),
    _Limit(1, ("minLength",), none=0),
    _Limit(-1, ("maxLength",)),
    _Limit(1, ("minItems",), none=0),
    _Limit(-1, ("maxItems",)),
    _Limit(1, ("minProperties",), none=0),
    _Limit(-1, ("maxProperties",)),
)
_DEPTH_MAX = 50  # of references to references


def _variants(schema: Schema, definitions: dict[str, Schema], depth: int = 0) -> Iterator[Schema]:
    """Yield the alternatives of a schema, each with one type; `{}` allows anything."""
    if depth > _DEPTH_MAX:
        raise ValueError("references lead in a circle")
    if "$ref" in schema:
        target = definitions.get(schema["$ref"].rpartition("/")[2])
        if target is None:
            raise ValueError(f"{schema['$ref']} is not defined")
        yield from _variants(target, definitions, depth + 1)
        return
    inner = schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf")
    if inner is not None:
        for each in inner:
            yield from _variants(each, definitions, depth + 1)
    else:
        for kind in _types(schema):
            yield {**schema, "type": kind} if kind else {}


def _types(schema: Schema) -> list[str]:
    """Return the types that a schema without references allows; an empty one stands for all."""
    if "type" in schema:
        return list(schema["type"]) if isinstance(schema["type"], list) else [schema["type"]]
    values = _values(schema)
    if values is None:
        return [""]
    return sorted({_JSON_TYPES.get(type(each), "null") for each in values})


_JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number"}


def _same_kind(new: Schema, old: Schema) -> bool:
    """Return whether `new` may allow what `old` does, by their types alone."""
    if not new:
        return True
    kinds = new.get("type"), old.get("type")
    return kinds[0] == kinds[1] or kinds == ("number", "integer")


def _unnamed(schema: Schema) -> tuple[Schema, Schema | bool]:
    """Return what the names, and what the values, of fields that have no name of their own are."""
    for pattern, values in schema.get("patternProperties", {}).items():
        return {"type": "string", "pattern": pattern}, values  # pydantic writes one pattern
    names: Schema = {**schema.get("propertyNames", {}), "type": "string"}
    return names, schema.get("additionalProperties", True)


def _values(schema: Schema) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return schema.get("enum")


def _listed(values: list[Any]) -> str:
    return ", ".join(map(repr, values))


def _name(schema: Schema) -> str:
    return str(schema.get("type", "anything"))


def _breaks(found: list[Change]) -> int:
    return sum(each.breaks for each in found)
