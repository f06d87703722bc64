"""What the type checkers accept of a caller's code, and what they refuse."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REFUSED = sorted((ROOT / "tests/typing/refused").glob("*.py"))
MARK = "# refused"

type_checkers = pytest.mark.timeout(300)  # both are slow on a cold cache and a busy machine


def marked() -> set[tuple[str, int]]:
    """Return the file and number of every line that must be refused."""
    return {
        (path.name, number)
        for path in REFUSED
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if MARK in line
    }


def mypy(*files: Path, cache: Path) -> set[tuple[str, int]]:
    """Return file and line of every error that mypy finds."""
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context"]
    paths = [str(each) for each in files]
    done = subprocess.run(
        [*command, "--cache-dir", str(cache), *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode in {0, 1}, done.stdout + done.stderr
    found = re.findall(r"^(.+?):(\d+): error:", done.stdout, re.MULTILINE)
    return {(Path(path).name, int(line)) for path, line in found}


def basedpyright(*files: Path, project: Path) -> set[tuple[str, int]]:
    """Return file and line of every error that basedpyright finds in its strict mode.

    The project's own configuration leaves the refused files out, hence another one in `project`.
    """
    settings = {
        "include": [os.path.relpath(each, project) for each in files],
        "extraPaths": [str(ROOT)],
        "typeCheckingMode": "strict",
        "pythonVersion": "3.11",
    }
    config = project / "pyrightconfig.json"
    config.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--project", str(config)]
    done = subprocess.run(
        [*command, "--pythonpath", sys.executable],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    answer = json.loads(done.stdout)
    assert answer["summary"]["filesAnalyzed"] == len(files)
    return {
        (Path(each["file"]).name, each["range"]["start"]["line"] + 1)
        for each in answer["generalDiagnostics"]
        if each["severity"] == "error"
    }


def test_each_file_holds_one_refused_line() -> None:
    assert len(REFUSED) >= 10
    assert sorted(name for name, _ in marked()) == [path.name for path in REFUSED]


@type_checkers
def test_mypy_accepts_the_callers_code_and_refuses_the_marked_lines(tmp_path: Path) -> None:
    api = ROOT / "tests/typing/api.py"
    assert mypy(api, *REFUSED, cache=tmp_path) == marked()


@type_checkers
def test_basedpyright_accepts_the_callers_code_and_refuses_the_marked_lines(
    tmp_path: Path,
) -> None:
    api = ROOT / "tests/typing/api.py"
    assert basedpyright(api, *REFUSED, project=tmp_path) == marked()
