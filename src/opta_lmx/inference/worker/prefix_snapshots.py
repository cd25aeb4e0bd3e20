"""Prefix cache for models with recurrent or sliding-window layers, whose caches cannot be cut at a token.

Whole caches are kept as they stood at chosen positions (end of the system prompt, end of the history, end of an answer)
and serve any prompt that begins with exactly those tokens.
"""

import copy
import hashlib
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from opta_lmx.types import CacheReport

_REMEMBERED_EVICTIONS = 4096


@dataclass(frozen=True, slots=True)
class _Snapshot:
    length: int
    caches: list[Any]
    nbytes: int


class PrefixSnapshots:
    """Never holds more than ``budget_bytes``; the least recently used snapshots go first."""

    exact_positions_only = True

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._snapshots: OrderedDict[bytes, _Snapshot] = OrderedDict()
        self._evicted: OrderedDict[bytes, int] = OrderedDict()
        self._bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all caches held."""
        return self._bytes

    def fetch(self, tokens: list[int]) -> tuple[list[Any] | None, CacheReport]:
        """A copy of the longest snapshot that ``tokens`` begin with, None if there is none; and why it ends there."""
        keys = self._keys(tokens)
        found = [key for key in keys if key in self._snapshots]
        if not found:
            lost = any(key in self._evicted for key in keys)
            return None, CacheReport(0, 0, "evicted" if lost else "first_seen")
        key = found[-1]
        self._snapshots.move_to_end(key)
        snapshot = self._snapshots[key]
        cause = "none" if snapshot.length == len(tokens) else "diverged"
        if any(later in self._evicted for later in keys[keys.index(key) + 1 :]):
            cause = "evicted"
        return copy.deepcopy(snapshot.caches), CacheReport(snapshot.length, snapshot.length, cause)

    def known(self, tokens: list[int]) -> int:
        """How many tokens ``fetch`` would serve; changes nothing."""
        lengths = [self._snapshots[key].length for key in self._keys(tokens) if key in self._snapshots]
        return lengths[-1] if lengths else 0

    def store(self, tokens: list[int], caches: list[Any]) -> None:
        """Keep a copy of ``caches``, which cover exactly ``tokens``."""
        key = _digest(tokens)
        if key in self._snapshots:
            self._snapshots.move_to_end(key)
            return
        kept = _compact(caches)
        snapshot = _Snapshot(len(tokens), kept, sum(layer.nbytes for layer in kept))
        if snapshot.nbytes > self._budget:
            return
        self._snapshots[key] = snapshot
        self._evicted.pop(key, None)
        self._bytes += snapshot.nbytes
        while self._bytes > self._budget:
            gone, old = self._snapshots.popitem(last=False)
            self._bytes -= old.nbytes
            self._evicted[gone] = old.length
            if len(self._evicted) > _REMEMBERED_EVICTIONS:
                self._evicted.popitem(last=False)

    def check(self) -> None:
        """Assert that the books are right; for tests."""
        assert sum(snapshot.nbytes for snapshot in self._snapshots.values()) == self._bytes <= self._budget

    def _keys(self, tokens: list[int]) -> list[bytes]:
        """Digest of ``tokens`` at every length somebody ever stored, shortest first."""
        lengths = {snapshot.length for snapshot in self._snapshots.values()} | set(self._evicted.values())
        hasher, done, keys = hashlib.blake2b(digest_size=16), 0, []
        for length in sorted(length for length in lengths if length <= len(tokens)):
            hasher.update(array("q", tokens[done:length]).tobytes())
            done = length
            keys.append(hasher.copy().digest())
        return keys


def _compact(caches: list[Any]) -> list[Any]:
    """Copies with buffers of their own and no room to grow: a view would keep alive whatever it is a part of."""
    kept = copy.deepcopy(caches)
    for layer in kept:
        layer.state = tree_map(mx.contiguous, layer.state)
    mx.eval([layer.state for layer in kept])
    return kept


def _digest(tokens: list[int]) -> bytes:
    return hashlib.blake2b(array("q", tokens).tobytes(), digest_size=16).digest()
