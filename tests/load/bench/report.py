"""The table people read and the JSON other programs do; pure."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tests.load.bench.measure import Measured
from tests.load.bench.promises import Verdict, verdicts
from tests.load.bench.summary import BARE, RAW, Row, Unit, decode_rows, in_unit, single_rows

_SUFFIX: Mapping[Unit, str] = {"ms": ", ms", "s": ", s", "MB": ", MB", "percent": ", %"}
# For what was not measured.
_NOTHING = "-"

_NAMES: Mapping[str, str] = {RAW: "raw mlx-lm", BARE: "bare loop"}


def to_text(runs: Sequence[Measured], conditions: Mapping[str, Any]) -> str:
    """All of it, for reading."""
    parts = [*map(_model, runs)]
    promised = [verdict for run in runs for verdict in verdicts(run, run.servers[0])]
    parts.append("\n".join(["Promised", *table([], [_verdict(verdict) for verdict in promised])]))
    if failures := [f"  {run.model}: {failure}" for run in runs for failure in run.book.failures]:
        parts.append("\n".join(["Failed", *failures]))
    parts.append("\n".join(["Conditions", *(f"  {name}: {value}" for name, value in conditions.items())]))
    return "\n\n".join(parts) + "\n"


def to_json(runs: Sequence[Measured], conditions: Mapping[str, Any]) -> dict[str, Any]:
    """All of it. Samples and promises are in seconds, bytes and plain numbers, the summary in the units it names."""
    return {
        "conditions": dict(conditions),
        "models": [_model_json(run) for run in runs],
        "promises": [
            asdict(verdict) | {"model": run.model, "kept": verdict.kept}
            for run in runs
            for verdict in verdicts(run, run.servers[0])
        ],
    }


def show(value: float | None, unit: Unit) -> str:
    """A number with about three digits that mean something, in its unit's scale."""
    if value is None:
        return _NOTHING
    scaled = in_unit(value, unit)
    if unit in ("count", "percent", "MB") or abs(scaled) >= 1000:
        return f"{scaled:,.0f}"
    return f"{scaled:.1f}" if abs(scaled) >= 100 else f"{scaled:.2f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of aligned columns: the first to the left, the others to the right."""
    lines = [list(head), *map(list, rows)] if head else [*map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        yield ("  " + "  ".join(cells)).rstrip()


def describe(facts: Mapping[str, Any]) -> str:
    """A model in a few words."""
    if not facts:
        return "model not at hand"
    shape = f"{facts.get('num_hidden_layers', '?')} layers x {facts.get('hidden_size', '?')}"
    bits = f", {facts['quantization'].get('bits')}-bit" if "quantization" in facts else ""
    vocabulary, size = facts.get("vocab_size", 0), facts["weights_bytes"] / 1e6
    return f"{facts.get('model_type', '?')}, {shape}, vocabulary {vocabulary:,}{bits}, {size:,.1f} MB of weights"


def _model(run: Measured) -> str:
    profile = run.profile
    heading = f"{run.model}: {describe(run.facts)}"
    streams = f"greedy streams of {profile.answer_tokens} tokens, so many at once"
    decode = table([streams, *map(str, profile.batches)], _decode_lines(run))
    subjects = [RAW, *run.servers]
    single = table(["one at a time, or one number each", *subjects], _single_lines(run, subjects))
    return "\n".join([heading, *decode, *single])


def _decode_lines(run: Measured) -> Iterator[list[str]]:
    """A line for each subject and number, across the batches."""
    by_batch = [decode_rows(batch) for batch in run.profile.batches]
    for subject in (RAW, BARE, *run.servers):
        for across in zip(*by_batch, strict=True):
            values = [row.compute(run.book, subject) for row in across]
            if any(value is not None for value in values):
                label = f"{_NAMES.get(subject, subject)} {_label(across[0])}"
                yield [label, *(show(value, across[0].unit) for value in values)]


def _single_lines(run: Measured, subjects: Sequence[str]) -> Iterator[list[str]]:
    """A line for each number, across the subjects."""
    for row in single_rows(run.profile):
        values = [row.compute(run.book, subject) for subject in subjects]
        if any(value is not None for value in values):
            yield [_label(row), *(show(value, row.unit) for value in values)]


def _summary(run: Measured) -> Iterator[dict[str, Any]]:
    """The rows of the table, as far as they were measured."""
    rows: list[tuple[int | None, Row]] = [(None, row) for row in single_rows(run.profile)]
    rows += [(batch, row) for batch in run.profile.batches for row in decode_rows(batch)]
    for batch, row in rows:
        for subject in (RAW, BARE, *run.servers):
            if (value := row.compute(run.book, subject)) is not None:
                number = in_unit(value, row.unit)
                yield {"what": row.label, "batch": batch, "subject": subject, "unit": row.unit, "value": number}


def _label(row: Row) -> str:
    return row.label + _SUFFIX.get(row.unit, "")


def _verdict(verdict: Verdict) -> list[str]:
    word = {True: "PASS", False: "MISS", None: "not measured"}[verdict.kept]
    sign = "≤" if verdict.at_most else "≥"
    bound = f"{sign} {show(verdict.bound, verdict.unit)}"
    return [f"{verdict.what}{_SUFFIX.get(verdict.unit, '')}", show(verdict.value, verdict.unit), bound, word]


def _model_json(run: Measured) -> dict[str, Any]:
    samples: dict[str, dict[str, list[float]]] = {}
    for key, values in run.book.samples.items():
        samples.setdefault(key.subject, {})[key.metric] = list(values.values())
    return {
        "model": run.model,
        "facts": run.facts,
        "profile": asdict(run.profile),
        "summary": list(_summary(run)),
        "samples": samples,
        "failures": run.book.failures,
    }
