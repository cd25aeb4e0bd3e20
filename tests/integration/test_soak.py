"""Seconds of the soak in every run of the tests, of one seed; ``scripts/soak`` is the whole of it, of any."""

from pathlib import Path

import pytest

from tests.load.soak.run import Plan, build_models, soak


@pytest.mark.mlx
@pytest.mark.timeout(180)
async def test_the_sheet_of_some_seconds_comes_out_even(tmp_path: Path) -> None:
    """All kinds of requests at once, killed workers among them: each has one end, and nothing is held afterwards."""
    (tmp_path / "models").mkdir()
    build_models(tmp_path / "models")
    sheet = await soak(Plan(seed=1, seconds=8, clients=16, kill_every=2), tmp_path)
    assert sheet.is_even, sheet.to_text()
