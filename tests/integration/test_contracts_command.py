"""`outbox contracts` lists, prints, freezes and checks what a module registers, without servers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = """
from pydantic import BaseModel
import outbox

@outbox.register("evt.order.bought.v1", deprecated_by="evt.order.placed.v1")
@outbox.register("evt.order.placed.v1")
class Placed(BaseModel):
    order_id: int
    note: str | None = None
"""


def contracts(
    folder: Path, *arguments: str, module: str = "app"
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "outbox.cli.main", "contracts", "--import", module, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(MODULE)
    return tmp_path


def test_list_shows_subjects_payloads_and_successors(app: Path) -> None:
    done = contracts(app, "list")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "evt.order.bought.v1  Placed  deprecated by evt.order.placed.v1",
        "evt.order.placed.v1  Placed",
    ]


def test_schema_is_json_schema(app: Path) -> None:
    done = contracts(app, "schema", "evt.order.placed.v1")
    assert json.loads(done.stdout)["required"] == ["order_id"]
    assert contracts(app, "schema", "evt.other.v1").returncode == 2
    assert contracts(app, "schema").returncode == 2


def test_check_fails_only_on_a_breaking_change(app: Path) -> None:
    assert contracts(app, "freeze").returncode == 0
    assert contracts(app, "check", "schemas.json").returncode == 0
    (app / "app.py").write_text(MODULE.replace("order_id: int", "order_id: int\n    more: int = 1"))
    assert contracts(app, "check", "schemas.json").returncode == 0
    (app / "app.py").write_text(MODULE.replace("order_id: int", "order_id: int\n    more: int"))
    done = contracts(app, "check", "schemas.json")
    assert done.returncode == 1
    assert "BREAK  evt.order.placed.v1 $.more: newly required field" in done.stdout
    assert "breaking changes since schemas.json: 2" in done.stdout


def test_freeze_to_stdout_writes_no_file(app: Path) -> None:
    done = contracts(app, "freeze", "-")
    assert set(json.loads(done.stdout)) == {"evt.order.bought.v1", "evt.order.placed.v1"}
    assert not (app / "schemas.json").exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "not json",
        "\x00",
        "[" * 100_000,
        '{"evt.order.placed.v1": 1}',
        '{"evt.order.placed.v1": {"schema": {"properties": []}}}',
    ],
    ids=range(7),
)
def test_rubbish_is_one_line_and_exit_code_2(app: Path, content: str) -> None:
    (app / "old.json").write_text(content)
    done = contracts(app, "check", "old.json")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "old.json is not what `freeze` writes" in done.stderr


@pytest.mark.parametrize(
    ("module", "says"),
    [("nowhere", "No module named 'nowhere'"), ("json", "no payload is registered")],
)
def test_module_that_registers_nothing_is_named(app: Path, module: str, says: str) -> None:
    done = contracts(app, "list", module=module)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_file_is_named(app: Path) -> None:
    done = contracts(app, "check", "nope.json")
    assert done.returncode == 2
    assert "nope.json cannot be read" in done.stderr


def test_glams_frozen_schemas_hold(tmp_path: Path) -> None:
    import outbox.contracts  # noqa: PLC0415 - its registrations must not reach other tests' module

    frozen = Path(outbox.contracts.__file__).with_name("schemas.json")
    done = contracts(tmp_path, "check", str(frozen), module="outbox.contracts")
    assert done.returncode == 0, done.stdout
