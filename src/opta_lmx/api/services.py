"""What the routes are given: the rooms below, and nothing of how they were wired."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from opta_lmx.config import Config
from opta_lmx.config_changes import ConfigChanges
from opta_lmx.inference.engine import InferenceEngine
from opta_lmx.manager.changes import ChangeFeed
from opta_lmx.manager.download import DownloadManager
from opta_lmx.manager.memory import MemoryMonitor
from opta_lmx.manager.model import ModelManager
from opta_lmx.manager.residency import Residency
from opta_lmx.monitoring.timing import RequestBook


@dataclass(slots=True)
class Services:
    """Hangs on ``app.state.services``; ``uptime`` gives seconds since the start, ``requests`` what they took.

    A reload puts another ``config`` here, and changes nothing else. What is part of one decision is read at one time.
    """

    config: Config
    engine: InferenceEngine
    models: ModelManager
    residency: Residency
    memory: MemoryMonitor
    downloads: DownloadManager
    uptime: Callable[[], float]
    reload: Callable[[], Awaitable[ConfigChanges]]
    requests: RequestBook = field(default_factory=RequestBook)
    changes: ChangeFeed = field(default_factory=ChangeFeed)
