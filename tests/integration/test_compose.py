"""docker-compose.yml names only commands and variables that exist."""

import tomllib
from pathlib import Path
from typing import Any

import yaml

from outbox.cli.main import _parser
from outbox.settings import variables

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
OURS = {name: each for name, each in COMPOSE["services"].items() if "build" in each}


def test_compose_has_the_servers_a_migration_and_a_relay() -> None:
    assert COMPOSE["services"].keys() == {"postgres", "nats", "migrate", "relay"}
    assert "-js" in COMPOSE["services"]["nats"]["command"]
    assert OURS.keys() == {"migrate", "relay"}
    after = OURS["relay"]["depends_on"]["migrate"]
    assert after == {"condition": "service_completed_successfully"}


def test_compose_commands_exist() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for service in OURS.values():
        lines = [service["command"], service.get("healthcheck", {}).get("test", ["CMD"])[1:]]
        for command, *arguments in filter(None, lines):
            assert command in scripts
            if command == "outbox":
                assert _parser().parse_args(arguments).work is not None


def test_compose_variables_exist() -> None:
    for service in OURS.values():
        assert service["environment"].keys() <= variables().keys()


def test_dockerfile_copies_what_exists() -> None:
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists()
