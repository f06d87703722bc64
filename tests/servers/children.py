"""Child processes of tests."""

import asyncio
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


async def killed(module: str, *arguments: str) -> None:
    """Run `module` in a child process until it has ended itself by SIGKILL; fail otherwise."""
    child = await asyncio.create_subprocess_exec(sys.executable, "-m", module, *arguments, cwd=ROOT)
    try:
        async with asyncio.timeout(30):
            code = await child.wait()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    assert code == -signal.SIGKILL
