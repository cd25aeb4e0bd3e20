"""What the running sequences' caches take, and what they may take.

The worker starts with the bytes the server set aside at the load. When more is needed it asks (``KvWant``), and the
server answers what the memory ledger allows (``KvGrant``); once idle, both go back to the first sum.
"""

from opta_lmx.inference.worker.geometry import CacheGeometry

# mlx-lm grows a cache by this many tokens at a time.
_STEP_TOKENS = 256

# Asked for on top of what is needed, but at most as much again: work rarely stops growing, and questions take time.
_SPARE_BYTES = 256 * 1024**2


class KvBooks:
    """Pure arithmetic over the model's cache shapes. A budget of None has no bound."""

    def __init__(self, shape: CacheGeometry, budget_bytes: int | None) -> None:
        self.shape = shape
        self._base = budget_bytes
        self._granted = budget_bytes
        self._asked: int | None = None
        self._question: int | None = None
        self._needed = 0
        self._denied: int | None = None

    def need(self, rows: int, longest_tokens: int) -> int:
        """Bytes of a joint cache: every row is as long as the longest, rounded up to the next growth."""
        length = -(-longest_tokens // _STEP_TOKENS) * _STEP_TOKENS
        return rows * self.shape.bytes_for(length)

    def allows(self, need_bytes: int, hoped_bytes: int = 0) -> bool:
        """True if the grant covers ``need_bytes``; if not, the server is asked, unless it has just refused as much.

        The question is for ``hoped_bytes`` if that is more: one answer then serves everybody in line.
        """
        if self.covers(need_bytes):
            return True
        if self._denied is not None and need_bytes >= self._denied:
            return False
        if self._asked is None or need_bytes > self._asked:
            wanted = max(need_bytes, hoped_bytes)
            self._asked = self._question = wanted + min(wanted, _SPARE_BYTES)
            self._needed = need_bytes
        return False

    def covers(self, need_bytes: int) -> bool:
        """True if the grant covers ``need_bytes``; nobody is asked."""
        return self._granted is None or need_bytes <= self._granted

    @property
    def granted_bytes(self) -> int | None:
        """What the caches may take now; None has no bound."""
        return self._granted

    @property
    def waiting(self) -> bool:
        """True between a question and its answer."""
        return self._asked is not None

    def question(self) -> int | None:
        """The sum to ask the server for, told once."""
        question, self._question = self._question, None
        return question

    def grant(self, granted_bytes: int) -> None:
        """The server's answer; it may be less than what was asked."""
        if self._asked is not None and granted_bytes < self._needed:
            self._denied = self._needed
        self._granted, self._asked = granted_bytes, None

    def ask_again(self) -> None:
        """Something has ended, so that a sum refused before may be had now."""
        self._denied = None

    def reset(self) -> None:
        """Nothing runs: back to the first sum, as the server does when it hears of it."""
        self._granted, self._asked, self._question, self._denied = self._base, None, None, None
