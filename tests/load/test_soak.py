"""The soak as a test: sixty seconds of mixed load and killed workers, and a sheet that comes out even.

``scripts/test -m load tests/load/test_soak.py -s`` prints the sheet.
"""

import secrets
from pathlib import Path

import pytest

from tests.load.soak.run import Plan, build_models, soak

pytestmark = [pytest.mark.load, pytest.mark.mlx, pytest.mark.timeout(300)]


async def test_the_sheet_comes_out_even(tmp_path: Path) -> None:
    """Requests in are requests out, and nothing is held any more."""
    (tmp_path / "models").mkdir()
    build_models(tmp_path / "models")
    sheet = await soak(Plan(secrets.randbits(32), seconds=60, clients=24, kill_every=4), tmp_path)
    print("", sheet.to_text(), sep="\n")  # noqa: T201 - the sheet is what this is run for
    assert sheet.is_even
