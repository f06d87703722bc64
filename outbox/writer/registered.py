"""What the registry says about an event: its subject, its payload's model and its key."""

from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from outbox.errors import InvalidEvent
from outbox.registry import Registration, registry

Model = TypeVar("Model", bound=BaseModel)


def subject_of(payload: BaseModel) -> str:
    """Return the one subject that the payload's class is registered for.

    Raises:
        TypeError: it has none, or several, which are named.
    """
    subjects = registry.subjects_of(type(payload))
    if len(subjects) == 1:
        return subjects[0]
    name = type(payload).__name__
    if not subjects:
        raise TypeError(f"{name} is registered for no subject: name one, add(session, subject, …)")
    raise TypeError(f"{name} is registered for {', '.join(subjects)}: name one of them")


def fitted(
    subject: str, known: Registration | None, payload: object, key: str | None
) -> tuple[object, str | None]:
    """Return the payload as its subject's model, and the key that is given or made of it.

    A subject for which nothing is registered takes any payload, but no other subject's.

    Raises:
        InvalidEvent: the payload is not what the subject is registered with, or its key fails.
    """
    if known is None:
        if isinstance(payload, BaseModel):
            _refuse_others(subject, payload)
        return payload, key
    model = validated(known.subject, known.payload, payload)
    content = model if model is payload else _with_extras(model)
    return content, _key(known, model) if key is None else key


def _refuse_others(subject: str, payload: BaseModel) -> None:
    subjects = registry.subjects_of(type(payload))
    if subjects:
        name = type(payload).__name__
        rule = f"{name} is registered for {', '.join(subjects)}, not for '{subject}'"
        raise InvalidEvent("payload", rule)


def validated(subject: str, wanted: type[Model], payload: object) -> Model:
    """Return `payload` if it is a `wanted`, or the one that a mapping makes.

    Raises:
        InvalidEvent: it is neither, or the first of its fields that is wrong, without its value.
    """
    if isinstance(payload, wanted):
        return payload
    name = wanted.__name__
    if not isinstance(payload, Mapping):
        rule = f"'{subject}' takes {name} or a mapping, not {type(payload).__name__}"
        raise InvalidEvent("payload", rule)
    free = "extra" not in wanted.model_config
    try:
        # What the model does not name travels along, as the wire promises of unknown fields.
        return wanted.model_validate(dict(payload), extra="allow" if free else None)
    except ValidationError as error:
        raise InvalidEvent("payload", f"is no {name}: {_first(error)}") from None
    except RecursionError:
        raise InvalidEvent("payload", "is too deep, or holds itself") from None


def _with_extras(model: BaseModel) -> object:
    """Return the model, or its plain form with what a mapping held beyond its fields.

    Readers ignore unknown fields, but those of the caller must not vanish on the way to them.
    """
    content: dict[str, object] = model.model_dump(mode="json")
    return content if _add_extras(model, content) else model


def _add_extras(model: BaseModel, content: dict[str, object]) -> bool:
    extras = model.model_extra or {}
    content.update(extras)
    found = bool(extras)
    for name in type(model).model_fields:
        value, inner = getattr(model, name), content.get(name)
        if isinstance(value, BaseModel) and isinstance(inner, dict):
            found = _add_extras(value, inner) or found
    return found


def _first(error: ValidationError) -> str:
    """Return where and how the first field is wrong, without its value."""
    found = error.errors(include_input=False, include_url=False, include_context=False)
    where = ".".join(map(str, found[0]["loc"])) or "the whole"
    more = f" ({len(found) - 1} more)" if len(found) > 1 else ""
    return f"{where}: {found[0]['msg']}{more}"


def _key(known: Registration, model: BaseModel) -> str | None:
    if known.key is None:
        return None
    try:
        return known.key(model)
    except Exception as error:
        rule = f"the key registered for '{known.subject}' failed: {type(error).__name__}"
        raise InvalidEvent("key", rule) from error
