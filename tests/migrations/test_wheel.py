"""The built wheel brings its migrations along."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from outbox.postgres import schema

ROOT = Path(__file__).parents[2]
MIGRATE = """
import asyncio, sys
import outbox.postgres.schema as schema
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

async def main():
    engine = create_async_engine(sys.argv[1], poolclass=NullPool)
    await schema.upgrade(engine)
    await schema.check_version(engine)

asyncio.run(main())
print(schema.__file__)
print(schema.location())
"""


def _run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _dependencies(target: Path) -> None:
    """Link every installed package but ours into `target`: the machine may have no network."""
    target.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if (
            not entry.name.startswith(("outbox", "_editable_impl_outbox"))
            and entry.suffix != ".pth"
        ):
            (target / entry.name).symlink_to(entry)


def test_checkout_finds_the_migrations_beside_the_package() -> None:
    """In an editable checkout the environment is the repository's `migrations/`."""
    assert schema.location() == ROOT / "migrations"


@pytest.mark.timeout(180)
def test_wheel_migrates_alone(tmp_path: Path, empty_database_url: str) -> None:
    """The wheel, installed without the checkout, migrates a fresh database."""
    python = sys.executable
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", ROOT)
    _run(python, *build, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("outbox_jetstream-*.whl")

    venv.create(tmp_path / "venv", with_pip=False, system_site_packages=False)
    alone = next((tmp_path / "venv").glob("[bS]*/python*"))
    where = _run(
        alone, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path
    )
    site = Path(where.strip())
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site)
    _run(python, *install, wheel, cwd=tmp_path)
    _dependencies(tmp_path / "dependencies")
    (site / "dependencies.pth").write_text(f"{tmp_path / 'dependencies'}\n")

    module, migrations = _run(alone, "-c", MIGRATE, empty_database_url, cwd=tmp_path).splitlines()
    assert Path(module).is_relative_to(site)
    assert Path(migrations) == site / "outbox" / "_migrations"
