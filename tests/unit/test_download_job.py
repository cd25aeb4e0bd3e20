"""How a download looks while it runs: sizes, speed, time left."""

from opta_lmx.manager.download_job import DownloadState, Job
from opta_lmx.manager.hub import HubFile, Plan, Progress


def job(present: int = 0) -> Job:
    """A download of 1000 bytes in two files, of which some are here."""
    files = (HubFile("a", 900, "0" * 64, None), HubFile("b", 100, None, "0" * 40))
    plan = Plan("c", files, {"a": present} if present else {})
    return Job("d", "x/y", None, (), DownloadState.DOWNLOADING, plan, dict(plan.present))


async def test_the_speed_is_that_of_the_last_seconds() -> None:
    """Bytes a second over five seconds; what was fast before is forgotten, and the time left follows."""
    download = job()
    for at, size in ((0.0, 0), (1.0, 500), (5.5, 590), (6.0, 600)):
        download.advance(Progress({"a": size}, ()), at)
    shown = download.snapshot()
    assert (shown.done_bytes, shown.total_bytes) == (600, 1000)
    assert (shown.bytes_per_second, shown.eta_seconds) == (20.0, 20.0)


async def test_bytes_from_before_are_done_and_no_speed() -> None:
    """While they are hashed again the bar does not fall back, and nothing seems to arrive."""
    download = job(present=300)
    for at, size in ((0.0, 0), (1.0, 200), (2.0, 300)):
        download.advance(Progress({"a": size}, ()), at)
        shown = download.snapshot()
        assert (shown.done_bytes, shown.bytes_per_second, shown.eta_seconds) == (300, 0.0, None)


async def test_each_file_ends_once() -> None:
    """However often the child tells of it."""
    download = job()
    assert download.advance(Progress({"b": 100}, ("b",)), 0.0) == 1
    assert download.advance(Progress({"b": 100, "a": 900}, ("b", "a")), 1.0) == 1
    assert [file.verified for file in download.snapshot().files] == [True, True]


async def test_the_end_has_no_speed() -> None:
    """A download that has ended does not move."""
    download = job()
    for at, size in ((0.0, 0), (1.0, 900)):
        download.advance(Progress({"a": size}, ()), at)
    download.state = DownloadState.CANCELLED
    shown = download.snapshot()
    assert (shown.bytes_per_second, shown.eta_seconds) == (0.0, None)
