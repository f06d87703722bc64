"""The verdict of the GLAM demo names each kind of fault, and none where there is none."""

from collections import Counter
from dataclasses import replace

import pytest

from examples.glam.verdict import Evidence, Verdict

SUBJECT = "evt.merchant.created.v1"
LISTENERS = {"a-one": SUBJECT, "a-all": "evt.>", "a-other": "evt.credit.>"}
TOLD = [("e1", SUBJECT), ("e2", SUBJECT)]
EFFECTS = [("e1", "a-one"), ("e1", "a-all"), ("e2", "a-all")]
DEAD = [("e2", "a-one")]


def verdict(
    *,
    told: list[tuple[str, str]] | None = None,
    effects: list[tuple[str, str]] | None = None,
    dead: list[tuple[str, str]] | None = None,
    unpublished: int = 0,
    stored: dict[str, int] | None = None,
) -> Verdict:
    services = {
        "shop": Evidence(TOLD if told is None else told, [], unpublished=unpublished),
        "mail": Evidence(
            [],
            EFFECTS if effects is None else effects,
            DEAD if dead is None else dead,
            duplicates=3,
        ),
    }
    counts = Counter({"e1": 1, "e2": 1} if stored is None else stored)
    return Verdict(services, counts, LISTENERS, poison=["a-one"])


def test_exactly_the_right_effects_are_no_fault() -> None:
    right = verdict()
    assert right.faults() == []
    assert right.rows() == [
        ("shop", (2, 2, 0, 0, 0)),
        ("mail", (0, 0, 3, 3, 1)),
        ("all", (2, 2, 3, 3, 1)),
    ]


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        (verdict(told=[*TOLD, TOLD[0]]), "1 events committed more than once"),
        (verdict(unpublished=2), "2 events left in an outbox"),
        (verdict(stored={"e1": 1}), "1 committed, not on the stream"),
        (verdict(stored={"e1": 1, "e2": 1, "e3": 1}), "1 on the stream, not committed"),
        (verdict(stored={"e1": 2, "e2": 1}), "1 stored more than once"),
        (verdict(effects=EFFECTS[1:]), "1 a-one: without an effect"),
        (verdict(effects=[*EFFECTS, EFFECTS[1]]), "1 a-all: more than one effect"),
        (verdict(effects=[*EFFECTS, ("e1", "a-other")]), "1 a-other: effects of nothing"),
        (verdict(effects=[*EFFECTS, ("e2", "a-one")]), "1 a-one: given up and handled"),
        (verdict(dead=[]), "dead letters of [], not of ['a-one']"),
        (verdict(dead=[*DEAD, ("e1", "relay")]), "dead letters of ['a-one', 'relay']"),
    ],
)
def test_each_fault_is_named(wrong: Verdict, fault: str) -> None:
    assert any(fault in each for each in wrong.faults()), wrong.faults()


def test_without_poison_a_dead_letter_is_a_fault() -> None:
    assert replace(verdict(), poison=[]).faults() == ["dead letters of ['a-one'], not of []"]
