"""Prefix cache for models whose layers are all plain KV caches: a radix tree over token ids.

A node holds the keys and values of the tokens on its edge. Prompts share what they share, token by token, and a
prompt that parts from the known in the middle of an edge reuses the edge up to there.
"""

import hashlib
from array import array as int_array
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from opta_lmx.types import CacheReport

# Joins known to have been evicted, kept to tell "evicted" from "first seen"; a few bytes each.
_REMEMBERED_EVICTIONS = 4096


@dataclass(slots=True, eq=False)
class _Node:
    """``layers`` holds (keys, values) of shape (1, heads, len(tokens), head size) for each layer."""

    # Digest of every token from the root to the node's end, in a state that children go on from.
    hasher: Any
    tokens: list[int]
    layers: list[tuple[mx.array, mx.array]]
    parent: "_Node | None"
    used: int
    children: dict[int, "_Node"] = field(default_factory=dict)

    @property
    def key(self) -> bytes:
        """Names the node by all the tokens before its end, however edges are split: any store can hold it under it."""
        digest: bytes = self.hasher.digest()
        return digest

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)


class PrefixTree:
    """Never holds more than ``budget_bytes``; the least recently used leaves go first."""

    exact_positions_only = False

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._root = _Node(hashlib.blake2b(digest_size=16), [], [], None, 0)
        self._bytes = 0
        self._clock = 0
        self._evicted: dict[tuple[bytes, int], None] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held."""
        return self._bytes

    def fetch(self, tokens: list[int]) -> tuple[list[Any] | None, CacheReport]:
        """Caches for the longest known beginning of ``tokens``, None if nothing is known; and why it ends there."""
        path, hit = self._walk(tokens)
        self._clock += 1
        for node, _ in path:
            node.used = self._clock
        report = CacheReport(hit, hit, self._cause(tokens, path, hit))
        return (_assemble(path) if hit else None), report

    def known(self, tokens: list[int]) -> int:
        """How many tokens ``fetch`` would serve; changes nothing."""
        return self._walk(tokens)[1]

    def store(self, tokens: list[int], caches: list[Any]) -> None:
        """Keep what is new of a sequence; ``caches`` are plain caches that cover at least ``tokens``."""
        path, known = self._walk(tokens)
        if known == len(tokens):
            return
        span = tokens[known:]
        if len(span) * _token_bytes(caches) > self._budget:
            return
        self._clock += 1
        parent = self._branch_point(path)
        layers = [
            (
                mx.contiguous(layer.keys[..., known : len(tokens), :]),
                mx.contiguous(layer.values[..., known : len(tokens), :]),
            )
            for layer in caches
        ]
        mx.eval(layers)
        node = _Node(_extended(parent.hasher, span), span, layers, parent, self._clock)
        for ancestor, _ in path:
            ancestor.used = self._clock
        parent.children[span[0]] = node
        self._evicted.pop((parent.key, span[0]), None)
        self._bytes += node.nbytes
        self._shrink()

    def check(self) -> None:
        """Assert that the books are right; for tests."""
        nodes = self._nodes()
        assert sum(node.nbytes for node in nodes) == self._bytes <= self._budget
        assert all(node.parent is not None and node.parent.children[node.tokens[0]] is node for node in nodes)

    def _walk(self, tokens: list[int]) -> tuple[list[tuple[_Node, int]], int]:
        """The nodes along ``tokens`` with how many tokens of each match, and the total."""
        path: list[tuple[_Node, int]] = []
        node, at = self._root, 0
        while at < len(tokens) and (child := node.children.get(tokens[at])) is not None:
            matched = _common(child.tokens, tokens, at)
            path.append((child, matched))
            at += matched
            if matched < len(child.tokens):
                break
            node = child
        return path, at

    def _cause(self, tokens: list[int], path: list[tuple[_Node, int]], hit: int) -> str:
        if hit == len(tokens):
            return "none"
        node, matched = path[-1] if path else (self._root, 0)
        if matched == len(node.tokens) and (node.key, tokens[hit]) in self._evicted:
            return "evicted"
        if matched < len(node.tokens) or node.children:
            return "diverged" if hit else "first_seen"
        return "first_seen"

    def _branch_point(self, path: list[tuple[_Node, int]]) -> _Node:
        """The node a new edge starts from, made by splitting an edge if it starts inside one."""
        if not path:
            return self._root
        node, matched = path[-1]
        if matched == len(node.tokens):
            return node
        assert node.parent is not None
        upper_tokens, lower_tokens = node.tokens[:matched], node.tokens[matched:]
        upper = _Node(_extended(node.parent.hasher, upper_tokens), upper_tokens, [], node.parent, node.used)
        before = node.nbytes
        lower: list[tuple[mx.array, mx.array]] = []
        for keys, values in node.layers:
            upper.layers.append((mx.contiguous(keys[..., :matched, :]), mx.contiguous(values[..., :matched, :])))
            lower.append((mx.contiguous(keys[..., matched:, :]), mx.contiguous(values[..., matched:, :])))
        mx.eval(upper.layers, lower)
        node.parent.children[upper_tokens[0]] = upper
        node.tokens, node.layers, node.parent = lower_tokens, lower, upper
        upper.children[lower_tokens[0]] = node
        self._bytes += upper.nbytes + node.nbytes - before
        path[-1] = (upper, matched)
        return upper

    def _shrink(self) -> None:
        if self._bytes <= self._budget:
            return
        leaves = sorted((node for node in self._nodes() if not node.children), key=lambda node: node.used)
        while self._bytes > self._budget and leaves:
            leaf = leaves.pop(0)
            parent = leaf.parent
            assert parent is not None
            del parent.children[leaf.tokens[0]]
            self._bytes -= leaf.nbytes
            self._evicted[parent.key, leaf.tokens[0]] = None
            if len(self._evicted) > _REMEMBERED_EVICTIONS:
                del self._evicted[next(iter(self._evicted))]
            if parent is not self._root and not parent.children:
                leaves.append(parent)
                leaves.sort(key=lambda node: node.used)

    def _nodes(self) -> list[_Node]:
        nodes, todo = [], list(self._root.children.values())
        while todo:
            node = todo.pop()
            nodes.append(node)
            todo.extend(node.children.values())
        return nodes


def _assemble(path: list[tuple[_Node, int]]) -> list[Any]:
    """Fresh caches over the matched part of each node. Nothing of a node is shared that decoding could write to."""
    caches = []
    for layer in range(len(path[0][0].layers)):
        parts = [(node.layers[layer], matched) for node, matched in path]
        cache = KVCache()
        cache.keys = mx.concatenate([keys[..., :matched, :] for (keys, _), matched in parts], axis=2)
        cache.values = mx.concatenate([values[..., :matched, :] for (_, values), matched in parts], axis=2)
        cache.offset = cache.keys.shape[2]
        caches.append(cache)
    return caches


def _token_bytes(caches: list[Any]) -> int:
    """Bytes one token takes across all layers."""
    arrays = (array for layer in caches for array in (layer.keys, layer.values))
    return sum(array.shape[1] * array.shape[3] * array.dtype.size for array in arrays)


def _common(edge: list[int], tokens: list[int], at: int) -> int:
    """Length of the common beginning of ``edge`` and ``tokens[at:]``."""
    rest = tokens[at : at + len(edge)]
    if rest == edge:
        return len(edge)
    return next((i for i, (a, b) in enumerate(zip(edge, rest, strict=False)) if a != b), len(rest))


def _extended(hasher: Any, tokens: list[int]) -> Any:
    longer = hasher.copy()
    longer.update(int_array("q", tokens).tobytes())
    return longer
