"""JSON Schemas of registered payloads, and what of a change breaks those who use them. Pure.

A stream holds events of older publishers, so what an older schema allows must stay readable; and
fields that readers know must not vanish. Both are breaks. That readers of an older schema may
refuse what only the newer one allows is noted, and is no break: update them before the publishers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from typing_extensions import override

from outbox.registry import Registry

Schema = Mapping[str, Any]


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


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Return what of the change from `old` to `new`, both frozen, concerns others.

    Raises:
        ValueError: one of them is not what `freeze` returns.
    """
    found: list[Change] = []
    for subject in sorted(old):
        before = _schema(old, subject)
        if subject not in new:
            found.append(Change(Kind.LOST_SUBJECT, subject, "$", "it is not registered any more"))
            continue
        after = _schema(new, subject)
        compared = _Comparison(subject, before.get("$defs", {}), after.get("$defs", {}), set())
        found += compared.schemas("$", before, after)
    return found


def _schema(frozen: Mapping[str, Any], subject: str) -> Schema:
    entry = frozen[subject]
    schema = entry.get("schema") if isinstance(entry, Mapping) else None
    if not isinstance(schema, Mapping):
        raise ValueError(f"{subject!r} has no schema")  # noqa: TRY004 - of a file, no argument
    return schema


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Compares the schemas of one subject; references lead into either one's definitions."""

    subject: str
    old_definitions: Mapping[str, Any]
    new_definitions: Mapping[str, Any]
    seen: set[tuple[str, str]]  # pairs of references that are being compared: models nest

    def schemas(self, path: str, old: Schema, new: Schema) -> Iterator[Change]:
        """Compare two schemas that may be references or unions."""
        pair = (old.get("$ref", ""), new.get("$ref", ""))
        if all(pair):
            if pair in self.seen:
                return
            self.seen.add(pair)
        before = list(_variants(old, self.old_definitions))
        after = list(_variants(new, self.new_definitions))
        for variant in before:
            yield from self._fits(path, variant, after)
        for variant in after:
            if not any(_same_kind(variant, each) for each in before):
                yield self._change(Kind.WIDENED, path, f"{_name(variant)} is allowed now")

    def _fits(self, path: str, old: Schema, after: list[Schema]) -> Iterator[Change]:
        """Compare one alternative with those that may stand for it; the best one counts."""
        candidates = [each for each in after if _same_kind(each, old)]
        if not candidates:
            wanted = " or ".join(map(_name, after))
            yield self._change(Kind.NARROWED_TYPE, path, f"{_name(old)} is not {wanted}")
            return
        best: list[Change] | None = None
        for each in candidates:
            found = list(self._variant(path, old, each))
            if best is None or _count(found) < _count(best):
                best = found
        yield from best or ()

    def _variant(self, path: str, old: Schema, new: Schema) -> Iterator[Change]:
        if not new:
            return
        yield from self._enum(path, old, new)
        yield from self._limits(path, old, new)
        if new.get("type") == "object":
            yield from self._fields(path, old, new)
        if new.get("type") == "array":
            yield from self.schemas(f"{path}[]", old.get("items", {}), new.get("items", {}))

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
        for name in ("format", "pattern", "multipleOf"):
            if name in new and new[name] != old.get(name):
                detail = f"{name} {new[name]!r} instead of {old.get(name)!r}"
                yield self._change(Kind.NARROWED_TYPE, path, detail)
        for name in (*_LOWER, *_UPPER):
            if name not in new:
                continue
            before = old.get(name)
            tighter = before is None or (
                new[name] > before if name in _LOWER else new[name] < before
            )
            if tighter:
                detail = f"{name} {new[name]} instead of {before}"
                yield self._change(Kind.NARROWED_TYPE, path, detail)

    def _fields(self, path: str, old: Schema, new: Schema) -> Iterator[Change]:
        before, after = old.get("properties", {}), new.get("properties", {})
        was, now = set(old.get("required", ())), set(new.get("required", ()))
        for name in before:
            if name not in after:
                yield self._change(Kind.REMOVED_FIELD, f"{path}.{name}", "readers may need it")
                continue
            yield from self.schemas(f"{path}.{name}", before[name], after[name])
            if name in was - now:
                yield self._change(Kind.WIDENED, f"{path}.{name}", "it may be missing now")
        for name in sorted(now - was):
            yield self._change(Kind.REQUIRED_FIELD, f"{path}.{name}", "older events lack it")
        yield from self._others(path, old, new)

    def _others(self, path: str, old: Schema, new: Schema) -> Iterator[Change]:
        """Compare what is said of fields that have no name."""
        before, after = old.get("additionalProperties", True), new.get("additionalProperties", True)
        if after is False and before is not False:
            yield self._change(Kind.NARROWED_TYPE, path, "other fields are not allowed any more")
        elif isinstance(after, Mapping) and before is not False:
            known = before if isinstance(before, Mapping) else {}
            yield from self.schemas(f"{path}.*", known, after)

    def _change(self, kind: Kind, path: str, detail: str) -> Change:
        return Change(kind, self.subject, path, detail)


_LOWER = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_UPPER = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
_DEPTH_MAX = 50  # of references to references


def _variants(schema: Schema, definitions: Mapping[str, Any], depth: int = 0) -> Iterator[Schema]:
    """Yield the alternatives of a schema, each with one type; `{}` allows anything."""
    if depth > _DEPTH_MAX:
        raise ValueError("references lead in a circle")
    if "$ref" in schema:
        target = definitions.get(str(schema["$ref"]).rpartition("/")[2])
        if not isinstance(target, Mapping):
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


def _values(schema: Schema) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return schema.get("enum")


def _listed(values: list[Any]) -> str:
    return ", ".join(map(repr, values))


def _name(schema: Schema) -> str:
    return str(schema.get("type", "anything"))


def _count(found: list[Change]) -> int:
    return sum(each.breaks for each in found)
