"""What the demo found, as a table, and the verdict."""

import importlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Result:
    """Event ids and numbers at the end."""

    committed: Sequence[str]
    rolled_back: Sequence[str]
    published: int
    kills: int
    redelivered: int
    duplicates: int
    effects: Sequence[str]

    def faults(self) -> list[str]:
        """Return what is wrong; nothing when each commit had one effect and nothing else had."""
        committed, effects = set(self.committed), Counter(self.effects)
        found = {
            "commits without an effect": len(committed - effects.keys()),
            "events with more than one effect": sum(n > 1 for n in effects.values()),
            "effects of what was rolled back": len(effects.keys() & set(self.rolled_back)),
            "effects of what nobody committed": len(effects.keys() - committed),
        }
        return [f"{number} {what}" for what, number in found.items() if number]

    def rows(self) -> list[tuple[str, int]]:
        """Return the lines of the table."""
        return [
            ("added", len(self.committed)),
            ("rolled back", len(self.rolled_back)),
            ("relays killed", self.kills),
            ("published", self.published),
            ("redelivered on purpose", self.redelivered),
            ("duplicates seen", self.duplicates),
            ("effects", len(self.effects)),
        ]


def printed(result: Result) -> int:
    """Print table and verdict; return the exit code."""
    print()
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        _print_rich(result.rows())
    else:
        for name, number in result.rows():
            print(f"  {name:<24}{number:>8,}")
    faults = result.faults()
    if faults:
        print(f"\nFAILED: {'; '.join(faults)}", flush=True)
        return 1
    print("\nOK: every committed event took effect exactly once, and nothing else did", flush=True)
    return 0


def _print_rich(rows: Sequence[tuple[str, int]]) -> None:
    table = importlib.import_module("rich.table").Table("", "events")
    table.columns[1].justify = "right"
    for name, number in rows:
        table.add_row(name, f"{number:,}")
    importlib.import_module("rich.console").Console().print(table)
