"""Choosing the next token of every row at once.

Order: processors (bias, penalties, grammar) on the logits, then temperature, then top-k, then top-p of what top-k left;
min-p cuts what is less likely than that share of the likeliest token. Of equals at the edge the lower ids stay. A row
draws one uniform number a token from its own generator: its choices depend on its seed and its logits and on nothing
else in the batch.

Three ways, and a row's depends on its own parameters: numpy (host_sampler.py), MLX on a GPU (device_sampler.py), and
MLX on the CPU (ahead_sampler.py). The first two look the number up in the distribution of what is left, in the order of
ids; the third from the likeliest down, or makes noise of it.
"""

from typing import Any

import mlx.core as mx
import numpy as np

from opta_lmx.inference.worker.ahead_sampler import choose_ahead
from opta_lmx.inference.worker.device_sampler import sample_on_device
from opta_lmx.inference.worker.host_sampler import choose_on_host
from opta_lmx.inference.worker.sampler_rows import NOT_A_NUMBER, Logits, RowTable


def prepare_processors(table: RowTable) -> None:
    """Let every processor work ahead; call it while a forward runs, once the tokens before it are accepted."""
    for i in table.processed:
        for processor in table.rows[i].processors:
            processor.prepare()


def run_processors(logits: Logits, table: RowTable) -> None:
    """Apply every row's processors to ``logits`` in place."""
    for i in table.processed:
        for processor in table.rows[i].processors:
            processor.apply(logits[i])


class Launched:
    """One forward, and the choice that follows it.

    The rows that MLX can choose for are chosen for in the same graph; the others, ``_late``, wait for their logits and
    are numpy's. A row's way depends on its own parameters alone, so that company never changes what it says.
    ``tokens`` (rows,) are the choice where it can feed the next forward before anybody has waited: where none is late.
    """

    tokens: mx.array | None = None

    def __init__(self, logits: mx.array, table: RowTable) -> None:
        """``logits`` (rows, vocabulary), not evaluated yet."""
        self._lazy = logits.astype(mx.float32)
        self._table = table
        self._draws = table.draws()
        self._late = self._find_late(table)
        self._host: Logits | None = None
        self._chosen: mx.array | None = None
        if len(self._late) < len(table.rows):
            chosen = self._choose()
            # Damaged weights make every logit NaN, so one tells.
            self._chosen = mx.where(mx.isnan(self._lazy[:, 0]), NOT_A_NUMBER, chosen.astype(mx.int32))
            self.tokens = None if self._late else chosen

    @staticmethod
    def _find_late(table: RowTable) -> list[int]:
        """The rows that numpy chooses for, ascending."""
        raise NotImplementedError

    def _choose(self) -> mx.array:
        """The tokens of all rows, of which those of late ones mean nothing."""
        raise NotImplementedError

    def start(self) -> None:
        """Queue forward and choice; what they read must be in place by now."""
        mx.async_eval(
            [array for array in (self._chosen, self.tokens, self._lazy if self._late else None) if array is not None]
        )

    def keep(self, rows: list[int], table: RowTable) -> None:
        """Forget every row but these; ``table`` describes the ones that stay, and what is chosen stays chosen."""
        at = mx.array(rows)
        self._lazy, self._draws, self._table = self._lazy[at], self._draws[rows], table
        self._late = self._find_late(table)
        if self._chosen is not None:
            self._chosen = self._chosen[at]
            self.tokens = None if self._late else mx.maximum(self._chosen, 0)

    def collect(self) -> list[int]:
        """Wait for the forward; the chosen token of each row."""
        if not self._late:
            return _as_list(self._chosen)
        mx.eval(self._lazy)
        logits: Logits = np.array(self._lazy, copy=bool(self._table.processed))
        run_processors(logits, self._table)
        self._host = logits
        part = self._table.part(self._late)
        if part is self._table:
            return _as_list(choose_on_host(logits, part, self._draws))
        tokens = np.array(self._chosen)
        tokens[self._late] = choose_on_host(logits[self._late], part, self._draws[self._late])
        return _as_list(tokens)

    def logits(self) -> Logits:
        """The processed logits the tokens were chosen from; call it after ``collect``."""
        return np.array(self._lazy) if self._host is None else self._host


class HostLaunch(Launched):
    """For MLX's CPU backend: what ahead_sampler.py cannot do is numpy's."""

    @staticmethod
    def _find_late(table: RowTable) -> list[int]:
        return sorted(table.processed + table.hard)

    def _choose(self) -> mx.array:
        return choose_ahead(self._lazy, self._table, self._draws)


class DeviceLaunch(Launched):
    """For GPUs: only rows with processors, which are numpy's, are late."""

    @staticmethod
    def _find_late(table: RowTable) -> list[int]:
        return table.processed

    def _choose(self) -> mx.array:
        if len(self._table.sampled):
            return sample_on_device(self._lazy, self._table, self._draws)
        return mx.argmax(self._lazy, axis=-1)


def _as_list(tokens: Any) -> list[int]:
    values: list[int] = tokens.tolist()
    return values
