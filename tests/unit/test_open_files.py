"""How many files the server may open, in a process of its own: the limit is the process's."""

import subprocess
import sys

import pytest

_PROGRAM = """
import resource, sys
from opta_lmx.api.connection import raise_open_files
from opta_lmx.config import LoggingConfig
from opta_lmx.monitoring.logging import configure_logging
configure_logging(LoggingConfig())
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
raise_open_files(200)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(
    ("soft", "hard", "allowed", "warned"),
    [(64, 1024, 456, False), (64, 300, 300, True), (1000, 1024, 1000, False)],
    ids=["raised", "as far as may be", "enough"],
)
def test_the_limit_is_raised_as_far_as_connections_need(soft: int, hard: int, allowed: int, warned: bool) -> None:
    """200 connections and 256 other files; where the system permits fewer, the log says so with the remedy."""
    command = [sys.executable, "-c", _PROGRAM, str(soft), str(hard)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert int(ended.stdout) == allowed
    assert ("open_files_limited" in ended.stderr and '"wanted": 456' in ended.stderr) is warned
