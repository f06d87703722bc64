"""The README is true: its quickstart runs to the letter, its names and links exist."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from pydantic import SecretStr

from outbox.cli import main, options
from outbox.envelope import Malformed
from outbox.listener import dead
from outbox.relay import verdict
from outbox.settings import Settings, variables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PROMISE = """
An event added in a transaction that commits is delivered; one added in a transaction that rolls back never is.
Publication is at least once. The effect of a handler in its own database is exactly once. Events of one key, added by
transactions that locked or wrote the same row before they committed, are published in that order, and handled in it by
listeners with `ordered = True`; scheduled, requeued, replayed and repaired events take their place when they are sent.
Nothing is dropped silently: what cannot be published or handled is kept, with its reason, until a person decides. What the
broker loses after it acknowledged is noticed and sent again.
"""  # noqa: E501 - to the letter
SETTINGS_BEGIN = "checked by tests/test_docs.py -->\n"
SETTINGS_END = "<!-- /settings -->"


def shown(default: object) -> str:
    """Return a setting's default as an operator would write it."""
    if default is None or (isinstance(default, SecretStr) and not default.get_secret_value()):
        return ""
    if isinstance(default, timedelta):
        return f"`{default.total_seconds():g}`"
    if isinstance(default, tuple):
        return f"`{','.join(default)}`"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default}`"


def settings_table() -> str:
    """Return the README's table of settings."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for variable, name in variables().items():
        field = Settings.model_fields[name]
        rows.append(f"| `{variable}` | {shown(field.default)} | {field.description} |")
    return "\n".join(rows) + "\n"


def section(title: str) -> str:
    """Return what stands below a heading of the second level."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(title: str, language: str) -> list[str]:
    """Return the code blocks of one language in a section."""
    return re.findall(rf"```{language}\n(.*?)```", section(title), re.DOTALL)


def links(text: str) -> list[str]:
    """Return the targets of relative links."""
    found = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    return [target for target in found if "://" not in target]


# ---- the quickstart ----------------------------------------------------------------------------


@contextmanager
def running_dev(command: str, directory: Path) -> Iterator[dict[str, str]]:
    """Run the quickstart's servers; yield what its export lines say."""
    script = Path(sys.executable).parent / shlex.split(command)[0]
    child = subprocess.Popen(
        [str(script), *shlex.split(command)[1:]],
        cwd=directory,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert child.stdout is not None
    try:
        exports: dict[str, str] = {}
        for line in child.stdout:
            if line.startswith("export "):
                name, _, value = line.removeprefix("export ").strip().partition("=")
                exports[name] = value
            if line.startswith("Ctrl-C"):
                break
        yield exports
    finally:
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=60)
    assert child.returncode == 0


def test_the_quickstart_does_what_it_says(tmp_path: Path) -> None:
    """Its commands and its program, as they stand there, print what stands there."""
    install, dev = blocks("Quickstart", "sh")[0].splitlines()
    assert install == "pip install 'outbox-jetstream[embedded,cli]'"
    assert blocks("Quickstart", "sh")[1].strip() == "python quickstart.py"
    (program,) = blocks("Quickstart", "python")
    (output,) = blocks("Quickstart", "text")
    (tmp_path / "quickstart.py").write_text(program)
    with running_dev(dev, tmp_path) as exports:
        assert exports.keys() == {"OUTBOX_DATABASE_URL", "OUTBOX_NATS_URL"}
        done = subprocess.run(
            [sys.executable, "-W", "error", "quickstart.py"],
            cwd=tmp_path,
            env={**os.environ, **exports},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert (done.returncode, done.stdout) == (0, output), done.stderr
        status = subprocess.run(
            [sys.executable, "-m", "outbox.cli.main", "status"],
            cwd=ROOT,
            env={**os.environ, **exports},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        for name, number in {"pending": 0, "published": 1, "inbox": 1}.items():
            assert re.search(rf"{name}\D*{number}\b", status.stdout), status.stdout


# ---- what it names -----------------------------------------------------------------------------


def test_the_promise_stands_there_to_the_letter() -> None:
    quoted = [line.removeprefix("> ") for line in README.splitlines() if line.startswith("> ")]
    assert "\n".join(quoted) == PROMISE.strip()


def test_each_sentence_of_the_promise_has_a_test_or_a_plain_not_yet() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.*?) ?\|$", section("Guarantees"), re.MULTILINE)
    said = [row for row in rows if row[0] not in {"sentence", "---"}]
    assert " ".join(sentence for sentence, _, _ in said).split() == PROMISE.split()
    for sentence, state, tests in said:
        assert links(tests) or "**not yet**" in state, sentence
        assert all(target.startswith("tests/") for target in links(tests))


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    missing = [each for each in links(path.read_text()) if not (path.parent / each).exists()]
    assert missing == []


def test_the_settings_table_is_the_settings() -> None:
    table = README.split(SETTINGS_BEGIN)[1].split(SETTINGS_END)[0]
    assert table == settings_table(), "run `python -m tests.test_docs`"


def test_variables_that_are_named_exist() -> None:
    for path in DOCS:
        named = set(re.findall(r"\bOUTBOX_[A-Z_]*[A-Z]\b", path.read_text()))
        assert named <= variables().keys(), path.name


def test_commands_that_are_named_exist_and_the_others_are_named() -> None:
    named = set(re.findall(r"`outbox ([a-z]+)", README)) | {"dev"}
    assert named == set(main._EACH)
    flags = set(re.findall(r"`[^`]*(--[a-z-]+)[^`]*`", section("Commands")))
    sources = "".join(each.read_text() for each in Path(main.__file__).parent.glob("*.py"))
    assert all(flag in sources for flag in flags)


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in DOCS:
        assert set(re.findall(r"`make ([a-z-]+)", path.read_text())) <= targets


def test_exit_codes_are_the_commands_own() -> None:
    assert (options.EXIT_OK, options.EXIT_FAILED, options.EXIT_USAGE) == (0, 1, 2)
    assert "Exit codes: 0 done; 1 failed, the reason is on stderr; 2 usage" in section("Commands")


def test_every_reason_of_a_dead_letter_is_explained() -> None:
    table = section("What you see, why, and what to do")
    named = set(re.findall(r"`([a-z_]+)`", table))
    assert {str(reason) for reason in [*Malformed, *verdict.DeadReason, *dead.DeadReason]} <= named


def test_extras_that_are_named_exist() -> None:
    declared = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert set(re.findall(r"^\| `([a-z]+)` \|", section("Installing"), re.MULTILINE)) <= declared


def test_the_hooks_run_the_tools_of_make_check() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [each["repo"] for each in hooks] == ["local"]
    entries = {each["entry"].split()[0].rpartition("/")[2] for each in hooks[0]["hooks"]}
    check = (ROOT / "Makefile").read_text().split("\ncheck:")[1].split("\n\n")[0]
    assert entries == set(re.findall(r"\$\(BIN\)/([a-z-]+)", check))


if __name__ == "__main__":
    before, _, rest = README.partition(SETTINGS_BEGIN)
    after = rest.partition(SETTINGS_END)[2]
    (ROOT / "README.md").write_text(
        before + SETTINGS_BEGIN + settings_table() + SETTINGS_END + after
    )
