"""What the tests of a lab type: commands of overland, and commands in the lab's namespaces."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

OVERLAND = (sys.executable, "-m", "overland")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`overland ARGUMENTS`, whatever comes of it."""
    return subprocess.run([*OVERLAND, *arguments], capture_output=True, text=True, check=False)


def ok(*arguments: str) -> Any:
    """What `overland ARGUMENTS` says, parsed if it is JSON; it must succeed."""
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if done.stdout.startswith(("{", "[")) else done.stdout


def within(namespace: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a network namespace, whatever comes of it."""
    entered = ["ip", "netns", "exec", namespace, *command]
    return subprocess.run(entered, capture_output=True, text=True, check=False)
