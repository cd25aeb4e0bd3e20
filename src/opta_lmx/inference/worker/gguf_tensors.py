"""A GGUF file's tensors as one safetensors file in MLX's layout, a few megabytes at a time.

Floats and the block types that MLX can hold are carried over exactly; what ``gguf_blocks`` has to dequantise is
quantised again to the bits asked for.
"""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from opta_lmx.inference.worker.gguf_blocks import (
    DEQUANTIZED,
    DTYPES,
    EXACT,
    EXACT_GROUP,
    FLOATS,
    NEW_GROUPS,
    Array,
    Blocks,
    dequantize,
    from_bf16,
    quantize,
    rounded,
)
from opta_lmx.inference.worker.gguf_config import Dimensions, ImportRefused, JsonObject
from opta_lmx.inference.worker.gguf_families import Family, shape_of

# Values that are converted at once: with everything on the way, about a hundred megabytes.
CHUNK_VALUES = 2 * 1024 * 1024

_WIDTH = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4}


@dataclass(frozen=True, slots=True)
class Source:
    """One tensor of the file; ``shape`` counts values, rows first.

    ``rows`` is (rows, bytes of a row); a vector of floats is rows of one value, a stack of matrices all their rows.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rows: Blocks

    @classmethod
    def of(cls, tensor: Any) -> "Source":
        """From a tensor of ``gguf.GGUFReader``, which lists its axes fastest first."""
        shape = tuple(int(size) for size in reversed(tensor.shape))
        kind = tensor.tensor_type.name
        count = shape[0] if len(shape) == 1 and kind in FLOATS else math.prod(shape[:-1])
        return cls(tensor.name, kind, shape, tensor.data.reshape(-1).view(np.uint8).reshape(count, -1))


@dataclass(frozen=True, slots=True)
class Storage:
    """How weights are stored: the type of floats and scales, and the bits of what is quantised again."""

    dtype: str
    bits: int


def half_dtype(sources: Sequence[Source], family: Family) -> str:
    """The type that keeps the file's matrices as they are; scales are F16 in every block type."""
    kinds = {source.kind for source in sources if len(source.shape) > 1}
    if kinds == {"F32"}:
        return "F32"
    return "BF16" if family.wide or kinds <= {"F32", "BF16"} else "F16"


@dataclass(frozen=True, slots=True)
class Group:
    """How a quantised tensor is held: bits of a value, values of a group."""

    bits: int
    size: int


@dataclass(frozen=True, slots=True)
class Target:
    """Where one source tensor goes. ``order`` gives its rows' new order, None where it stays; ``less`` is taken off.

    ``group`` is None for floats. ``parts`` are the safetensors entries: one for a float tensor; weight, scales and
    biases for a quantised one.
    """

    source: Source
    module: str
    order: NDArray[np.intp] | None
    less: float
    group: Group | None
    parts: tuple[tuple[str, str, tuple[int, ...]], ...]


def plan(sources: Sequence[Source], family: Family, dimensions: Dimensions, storage: Storage) -> list[Target]:
    """Names, shapes and row orders of every tensor; raises ImportRefused for a missing, strange or misshapen one."""
    if dimensions.num_hidden_layers > len(sources):
        raise ImportRefused(f"it claims {dimensions.num_hidden_layers:,} layers but has {len(sources):,} tensors")
    names = dict(family.names(dimensions.num_hidden_layers))
    targets = []
    for source in sources:
        base, _, leaf = source.name.rpartition(".")
        short = base.rpartition(".")[2]
        has_place = leaf == "weight" or (leaf == "bias" and family.may_have_bias(short))
        if base not in names or not has_place or (short == "output" and family.tied):
            raise ImportRefused(f"the tensor {source.name!r} has no place in this architecture")
        expected = shape_of(short, family, dimensions)[: 1 if leaf == "bias" else None]
        if source.shape != expected:
            raise ImportRefused(f"the tensor {source.name!r} has the shape {source.shape}, not {expected}")
        heads = dimensions.num_attention_heads if short == "attn_q" else dimensions.num_key_value_heads
        order = half_order(heads, dimensions.head_dim) if short in family.interleaved else None
        less = 1.0 if family.adds_one and short.endswith("norm") else 0.0
        group = _group(source, leaf, storage)
        parts = _parts(source, f"{names[base]}.{leaf}", group, storage.dtype)
        targets.append(Target(source, names[base], order, less, group, parts))
    missing = sorted(_required(names, sources, family) - {source.name for source in sources})
    if missing:
        raise ImportRefused(f"the tensor {missing[0]!r} is missing")
    return targets


def _required(names: dict[str, str], sources: Sequence[Source], family: Family) -> set[str]:
    """Every weight (models without an output matrix use the embedding for it), and biases by groups."""
    with_bias = {source.name.split(".")[-2] for source in sources if source.name.endswith(".bias")}
    biased = family.with_bias.union(*(group for group in family.biased if group & with_bias))
    weights = {f"{base}.weight" for base in names if base != "output"}
    return weights | {f"{base}.bias" for base in names if base.rpartition(".")[2] in biased}


def half_order(heads: int, head_dim: int) -> NDArray[np.intp]:
    """Row numbers that turn pairs (0, 1), (2, 3), ... of each head into its even rows followed by its odd ones."""
    pairs = np.arange(heads * head_dim, dtype=np.intp).reshape(heads, head_dim // 2, 2)
    return pairs.swapaxes(1, 2).reshape(-1)


def _group(source: Source, leaf: str, storage: Storage) -> Group | None:
    if source.kind in FLOATS:
        return None
    exact = EXACT.get(source.kind)
    if exact is None and source.kind not in DEQUANTIZED:
        raise ImportRefused(f"the tensor {source.name!r} has the type {source.kind}, which is not supported")
    size = EXACT_GROUP if exact else next((size for size in NEW_GROUPS if source.shape[-1] % size == 0), 0)
    if leaf != "weight" or len(source.shape) < 2 or not size or source.shape[-1] % size:
        raise ImportRefused(f"the tensor {source.name!r} cannot be of the type {source.kind}")
    return Group(exact.bits if exact else storage.bits, size)


def _parts(source: Source, name: str, group: Group | None, dtype: str) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    if group is None:
        return ((name, dtype, source.shape),)
    *rows, columns = source.shape
    base = name.removesuffix(".weight")
    groups = (*rows, columns // group.size)
    return (
        (name, "U32", (*rows, columns * group.bits // 32)),
        (f"{base}.scales", dtype, groups),
        (f"{base}.biases", dtype, groups),
    )


def quantization_table(targets: Sequence[Target]) -> JsonObject | None:
    """config.json's ``quantization``: the commonest form (by values), and each module that has another."""
    forms = {target.module: target.group for target in targets if target.group is not None}
    if not forms:
        return None
    values: Counter[Group] = Counter()
    for target in targets:
        if target.group is not None:
            values[target.group] += math.prod(target.source.shape)
    common = values.most_common(1)[0][0]
    table: JsonObject = _form(common)
    table |= {module: _form(group) for module, group in forms.items() if group != common}
    return table


def _form(group: Group) -> JsonObject:
    return {"group_size": group.size, "bits": group.bits}


def write(
    path: Path, targets: Sequence[Target], progress: Callable[[int], None], chunk_values: int = CHUNK_VALUES
) -> None:
    """Writes the file; ``progress`` is told the source bytes done so far after every chunk."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offsets: dict[str, int] = {}
    at = 0
    for target in targets:
        for name, dtype, shape in target.parts:
            size = math.prod(shape) * _WIDTH[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (at, at + size)}
            offsets[name] = at
            at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    # Spaces up to a multiple of eight keep the tensors aligned, as the format asks.
    text += b" " * (-len(text) % 8)
    free = shutil.disk_usage(path.parent).free
    if at > free:
        raise ImportRefused(f"its import takes {at:,} bytes of disk, and only {free:,} are free")
    done = 0
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
        for target in targets:
            places = [8 + len(text) + offsets[name] for name, _, _ in target.parts]
            for chunk in _chunks(target, chunk_values):
                _write_chunk(file, target, chunk, places)
                done += chunk.nbytes
                progress(done)


def _chunks(target: Target, chunk_values: int) -> Iterator[Blocks]:
    rows = target.source.rows
    values_of_a_row = math.prod(target.source.shape) // rows.shape[0]
    step = max(chunk_values // values_of_a_row, 1)
    for start in range(0, rows.shape[0], step):
        if target.order is None:
            yield np.ascontiguousarray(rows[start : start + step])
        else:
            yield rows[target.order[start : start + step]]


def _write_chunk(file: BinaryIO, target: Target, chunk: Blocks, places: list[int]) -> None:
    """Converts one chunk, writes each part of it at its place and moves the places on."""
    # What overflows or is no number becomes visible to the check of the stored values.
    with np.errstate(over="ignore", invalid="ignore"):
        arrays = _converted(target, chunk)
    for index, (stored, (_, dtype, _)) in enumerate(zip(arrays, target.parts, strict=True)):
        finite = from_bf16(stored.view(np.uint8)) if dtype == "BF16" else stored
        if not np.isfinite(finite).all():
            raise ImportRefused(f"the tensor {target.source.name!r} holds values that are no finite {dtype} numbers")
        file.seek(places[index])
        file.write(stored.tobytes())
        places[index] += stored.nbytes


def _converted(target: Target, chunk: Blocks) -> list[Array]:
    kind = target.source.kind
    exact = EXACT.get(kind)
    arrays: Sequence[Array]
    if target.group is None:
        values = FLOATS[kind](chunk)
        arrays = (values - np.float32(target.less) if target.less else values,)
    elif exact is not None:
        arrays = exact.unpack(chunk.reshape(-1, exact.block_bytes))
    else:
        dtype = target.parts[1][1]
        groups = dequantize(kind, chunk).reshape(-1, target.group.size)
        arrays = quantize(groups, target.group.bits, lambda array: rounded(array, dtype))
    dtypes = [dtype for _, dtype, _ in target.parts]
    return [array if dtype == "U32" else DTYPES[dtype](array) for array, dtype in zip(arrays, dtypes, strict=True)]
