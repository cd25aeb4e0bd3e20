"""Choosing the next token of every row at once.

Order: processors (bias, penalties, grammar) on the logits, then temperature, then top-k, then top-p of what top-k left;
min-p cuts what is less likely than that share of the likeliest token. Of equals at the edge the lower ids stay. A row
draws one uniform number a token from its own generator and looks it up in the distribution of what is left, in the
order of ids: its choices depend on its seed and its logits and on nothing else in the batch.

Two ways with the same rule: ``HostLaunch`` (host_sampler.py) and ``DeviceLaunch`` (device_sampler.py).
"""

from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from opta_lmx.inference.worker.device_sampler import sample_on_device
from opta_lmx.inference.worker.host_sampler import sample_on_host
from opta_lmx.inference.worker.sampler_rows import Logits, RowTable

# Stands for the token of a row whose logits are not numbers: damaged weights, or an overflow in the model.
NOT_A_NUMBER = -1


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


class Launched(Protocol):
    """One forward, and the choice that follows it. ``tokens`` are the choice where it can feed a forward unseen."""

    tokens: mx.array | None

    def start(self) -> None:
        """Queue it; what it reads must be in place by now."""
        ...

    def keep(self, rows: list[int], table: RowTable) -> None:
        """Forget every row but these; ``table`` describes the ones that stay."""
        ...

    def collect(self) -> list[int]:
        """Wait for the forward; the chosen token of each row."""
        ...

    def logits(self) -> Logits:
        """The processed logits the tokens were chosen from; call it after ``collect``."""
        ...


class HostLaunch:
    """Waits for the logits, then samples in numpy. ``tokens`` stays None: they are not known ahead."""

    tokens: mx.array | None = None

    def __init__(self, logits: mx.array, table: RowTable) -> None:
        """``logits`` (rows, vocabulary), not evaluated yet."""
        self._lazy = logits if logits.dtype == mx.float32 else logits.astype(mx.float32)
        self._table = table
        self._host: Logits | None = None

    def start(self) -> None:
        """Queue the forward."""
        mx.async_eval(self._lazy)

    def keep(self, rows: list[int], table: RowTable) -> None:
        """Forget every row but these; ``table`` describes the ones that stay."""
        self._lazy, self._table = self._lazy[mx.array(rows)], table

    def collect(self) -> list[int]:
        """Wait for the forward; the chosen token of each row."""
        mx.eval(self._lazy)
        table = self._table
        logits: Logits = np.array(self._lazy, copy=bool(table.processed))
        run_processors(logits, table)
        self._host = logits
        tokens = logits.argmax(axis=-1)
        # argmax finds a NaN if there is one.
        broken = np.isnan(logits[np.arange(len(tokens)), tokens])
        if len(table.sampled):
            tokens[table.sampled] = sample_on_host(logits if table.all_sampled else logits[table.sampled], table)
        tokens[broken] = NOT_A_NUMBER
        return _as_list(tokens)

    def logits(self) -> Logits:
        """The processed logits the tokens were chosen from; call it after ``collect``."""
        assert self._host is not None
        return self._host


class DeviceLaunch:
    """Samples in MLX; ``tokens`` (rows,) can feed the next forward before anybody has waited for this one.

    For rows without processors, which are numpy's: a batch with any of them is launched with HostLaunch.
    """

    def __init__(self, logits: mx.array, table: RowTable) -> None:
        """``logits`` (rows, vocabulary), not evaluated yet."""
        self._logits = logits.astype(mx.float32)
        chosen = sample_on_device(self._logits, table) if len(table.sampled) else mx.argmax(logits, axis=-1)
        self.tokens: mx.array | None = chosen
        # Damaged weights make every logit NaN, so one tells.
        self._chosen = mx.where(mx.isnan(self._logits[:, 0]), NOT_A_NUMBER, chosen.astype(mx.int32))

    def start(self) -> None:
        """Queue the forward and the choice."""
        mx.async_eval(self.tokens, self._chosen)

    def keep(self, rows: list[int], table: RowTable) -> None:
        """Forget every row but these; their tokens are chosen already, so the table is not asked again."""
        at = mx.array(rows)
        self._logits, self._chosen = self._logits[at], self._chosen[at]
        self.tokens = mx.maximum(self._chosen, 0)

    def collect(self) -> list[int]:
        """Wait for the forward; the chosen token of each row."""
        return _as_list(self._chosen)

    def logits(self) -> Logits:
        """The processed logits the tokens were chosen from."""
        return np.array(self._logits)


def _as_list(tokens: Any) -> list[int]:
    values: list[int] = tokens.tolist()
    return values
