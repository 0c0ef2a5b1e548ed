"""The command line in a process of its own, whose memory is measured."""

import os
import subprocess
import sys

from cli.conftest import REPOSITORY


def run(*args: str) -> tuple[str, float]:
    """Run the command line as a user does; return what it printed, and its peak memory in GB."""
    process = subprocess.Popen(
        [sys.executable, "cli.py", *args], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with process.stdout:
        text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, text
    return text, usage.ru_maxrss * 1024 / 1e9
