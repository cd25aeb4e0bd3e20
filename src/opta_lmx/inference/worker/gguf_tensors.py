"""A GGUF file's tensors as one safetensors file in MLX's layout, exactly and a few megabytes at a time.

Nothing is quantised again. Blocks of Q4_0, Q4_1 and Q8_0 already are what MLX calls affine groups of 32
(value = scale * q + bias), so their bits are only moved: Q4_1 stores scale d and bias m; Q4_0 means
d * (q - 8), so its bias is -8d; Q8_0 stores signed q, which becomes unsigned by adding 128, so its bias is -128d.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from opta_lmx.inference.worker.gguf_config import Dimensions, ImportRefused, JsonObject

GROUP_SIZE = 32

# Bytes of a tensor that are converted at once.
CHUNK_BYTES = 16 * 1024 * 1024

Blocks: TypeAlias = NDArray[np.uint8]
Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Source:
    """One tensor of the file; ``shape`` counts values, rows first.

    ``rows`` is (rows, bytes of a row); a vector of floats is rows of one value.
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
class Architecture:
    """How one family's tensors are called in GGUF and in mlx-lm.

    ``interleaved`` names the projections whose rows stand in pairs for rotary embedding, as llama.cpp wants
    them; mlx-lm wants each head's first values before its second. ``biased`` groups the projections that have a
    bias all together or not at all.
    """

    top: Mapping[str, str]
    block: Mapping[str, str]
    interleaved: frozenset[str]
    biased: tuple[frozenset[str], ...]


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        top={"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
        block={
            "attn_norm": "input_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        },
        interleaved=frozenset({"attn_q", "attn_k"}),
        biased=(
            frozenset({"attn_q", "attn_k", "attn_v", "attn_output"}),
            frozenset({"ffn_gate", "ffn_up", "ffn_down"}),
        ),
    )
}


def unpack_q4_0(blocks: Blocks) -> tuple[Array, Array, Array]:
    """(n, 18) bytes -> packed (n, 4) uint32, scale d (n, 1), bias -8d (n, 1), the last two in float32."""
    scale = blocks[:, :2].view("<f2").astype(np.float32)
    return _pack_nibbles(blocks[:, 2:]), scale, scale * -8


def unpack_q4_1(blocks: Blocks) -> tuple[Array, Array, Array]:
    """(n, 20) bytes -> packed (n, 4) uint32, scale d (n, 1), bias m (n, 1)."""
    scale, bias = (blocks[:, at : at + 2].view("<f2").astype(np.float32) for at in (0, 2))
    return _pack_nibbles(blocks[:, 4:]), scale, bias


def unpack_q8_0(blocks: Blocks) -> tuple[Array, Array, Array]:
    """(n, 34) bytes -> packed (n, 8) uint32, scale d (n, 1), bias -128d (n, 1)."""
    scale = blocks[:, :2].view("<f2").astype(np.float32)
    # Flipping the sign bit of a two's complement byte adds 128 to it.
    return (blocks[:, 2:] ^ 0x80).view("<u4"), scale, scale * -128


def _pack_nibbles(halves: Blocks) -> Array:
    """GGUF keeps value i of a block beside value i + 16 in one byte; MLX keeps it beside value i + 1."""
    values = np.concatenate([halves & 0x0F, halves >> 4], axis=1)
    packed: Blocks = values[:, 0::2] | values[:, 1::2] << 4
    return packed.view("<u4")


@dataclass(frozen=True, slots=True)
class Quantized:
    """A block type that MLX can hold: bits of a value, bytes of a block, and how to move them."""

    bits: int
    block_bytes: int
    unpack: Callable[[Blocks], tuple[Array, Array, Array]]


QUANTIZED: Mapping[str, Quantized] = {
    "Q4_0": Quantized(4, 18, unpack_q4_0),
    "Q4_1": Quantized(4, 20, unpack_q4_1),
    "Q8_0": Quantized(8, 34, unpack_q8_0),
}


def _from_bf16(raw: Blocks) -> Array:
    widened: Array = raw.view("<u2").astype(np.uint32) << 16
    return widened.view(np.float32)


FLOATS: Mapping[str, Callable[[Blocks], Array]] = {
    "F32": lambda raw: raw.view("<f4"),
    "F16": lambda raw: raw.view("<f2").astype(np.float32),
    "BF16": _from_bf16,
}


def _to_bf16(values: Array) -> Array:
    """Rounded to nearest, ties to even, as uint16."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


# safetensors' names of the types that weights may be stored in, and how float32 becomes each.
DTYPES: Mapping[str, Callable[[Array], Array]] = {
    "F32": lambda values: values.astype("<f4"),
    "F16": lambda values: values.astype("<f2"),
    "BF16": _to_bf16,
}
_WIDTH = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4}


def half_dtype(sources: Sequence[Source]) -> str:
    """The type that keeps the file's matrices as they are; scales are F16 in every block type."""
    kinds = {source.kind for source in sources if len(source.shape) > 1}
    if kinds == {"F32"}:
        return "F32"
    return "BF16" if kinds <= {"F32", "BF16"} else "F16"


@dataclass(frozen=True, slots=True)
class Target:
    """Where one source tensor goes. ``order`` gives its rows' new order, None where it stays.

    ``parts`` are the safetensors entries: one for a float tensor; weight, scales and biases for a quantised one.
    """

    source: Source
    module: str
    order: NDArray[np.intp] | None
    parts: tuple[tuple[str, str, tuple[int, ...]], ...]


def plan(sources: Sequence[Source], architecture: Architecture, dimensions: Dimensions, dtype: str) -> list[Target]:
    """Names, shapes and row orders of every tensor; raises ImportRefused for a missing, strange or misshapen one."""
    if dimensions.num_hidden_layers > len(sources):
        raise ImportRefused(f"it claims {dimensions.num_hidden_layers:,} layers but has {len(sources):,} tensors")
    names = dict(_names(architecture, dimensions.num_hidden_layers))
    targets = []
    for source in sources:
        base, _, leaf = source.name.rpartition(".")
        short = base.rpartition(".")[2]
        has_place = leaf == "weight" or (leaf == "bias" and any(short in group for group in architecture.biased))
        if base not in names or not has_place:
            raise ImportRefused(f"the tensor {source.name!r} has no place in this architecture")
        expected = _shape(short, dimensions)[: 1 if leaf == "bias" else None]
        if source.shape != expected:
            raise ImportRefused(f"the tensor {source.name!r} has the shape {source.shape}, not {expected}")
        heads = dimensions.num_attention_heads if short == "attn_q" else dimensions.num_key_value_heads
        order = half_order(heads, dimensions.head_dim) if short in architecture.interleaved else None
        targets.append(Target(source, names[base], order, _parts(source, f"{names[base]}.{leaf}", dtype)))
    missing = sorted(_required(names, sources, architecture) - {source.name for source in sources})
    if missing:
        raise ImportRefused(f"the tensor {missing[0]!r} is missing")
    return targets


def _required(names: Mapping[str, str], sources: Sequence[Source], architecture: Architecture) -> set[str]:
    """Every weight (models without an output matrix use the embedding for it), and biases by groups."""
    with_bias = {source.name.split(".")[-2] for source in sources if source.name.endswith(".bias")}
    biased = set().union(*(group for group in architecture.biased if group & with_bias))
    weights = {f"{base}.weight" for base in names if base != "output"}
    return weights | {f"{base}.bias" for base in names if base.rpartition(".")[2] in biased}


def _names(architecture: Architecture, layers: int) -> Iterator[tuple[str, str]]:
    yield from architecture.top.items()
    for layer in range(layers):
        for short, module in architecture.block.items():
            yield f"blk.{layer}.{short}", f"model.layers.{layer}.{module}"


def _shape(short: str, d: Dimensions) -> tuple[int, ...]:
    queries, keys = d.num_attention_heads * d.head_dim, d.num_key_value_heads * d.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (d.vocab_size, d.hidden_size),
        "output": (d.vocab_size, d.hidden_size),
        "attn_q": (queries, d.hidden_size),
        "attn_k": (keys, d.hidden_size),
        "attn_v": (keys, d.hidden_size),
        "attn_output": (d.hidden_size, queries),
        "ffn_gate": (d.intermediate_size, d.hidden_size),
        "ffn_up": (d.intermediate_size, d.hidden_size),
        "ffn_down": (d.hidden_size, d.intermediate_size),
    }
    return shapes.get(short, (d.hidden_size,))


def half_order(heads: int, head_dim: int) -> NDArray[np.intp]:
    """Row numbers that turn pairs (0, 1), (2, 3), ... of each head into its even rows followed by its odd ones."""
    pairs = np.arange(heads * head_dim, dtype=np.intp).reshape(heads, head_dim // 2, 2)
    return pairs.swapaxes(1, 2).reshape(-1)


def _parts(source: Source, name: str, dtype: str) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    quantized = QUANTIZED.get(source.kind)
    if quantized is None:
        if source.kind not in FLOATS:
            raise ImportRefused(f"the tensor {source.name!r} has the type {source.kind}, which is not supported")
        return ((name, dtype, source.shape),)
    if not name.endswith(".weight") or len(source.shape) != 2 or source.shape[1] % GROUP_SIZE:
        raise ImportRefused(f"the tensor {source.name!r} cannot be of the type {source.kind}")
    rows, columns = source.shape
    base = name.removesuffix(".weight")
    groups = (rows, columns // GROUP_SIZE)
    return (
        (name, "U32", (rows, columns * quantized.bits // 32)),
        (f"{base}.scales", dtype, groups),
        (f"{base}.biases", dtype, groups),
    )


def quantization_table(targets: Sequence[Target]) -> JsonObject | None:
    """config.json's ``quantization``: the commonest width (by values), and each module that has another."""
    widths = {t.module: QUANTIZED[t.source.kind].bits for t in targets if t.source.kind in QUANTIZED}
    if not widths:
        return None
    values: Counter[int] = Counter()
    for target in targets:
        if target.module in widths:
            values[widths[target.module]] += math.prod(target.source.shape)
    common = values.most_common(1)[0][0]
    table: JsonObject = {"group_size": GROUP_SIZE, "bits": common}
    for module, bits in widths.items():
        if bits != common:
            table[module] = {"group_size": GROUP_SIZE, "bits": bits}
    return table


def write(
    path: Path, targets: Sequence[Target], progress: Callable[[int], None], chunk_bytes: int = CHUNK_BYTES
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
    done = 0
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
        for target in targets:
            places = [8 + len(text) + offsets[name] for name, _, _ in target.parts]
            for chunk in _chunks(target, chunk_bytes):
                _write_chunk(file, target, chunk, places)
                done += chunk.nbytes
                progress(done)


def _chunks(target: Target, chunk_bytes: int) -> Iterator[Blocks]:
    rows = target.source.rows
    step = max(chunk_bytes // rows.shape[1], 1)
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
        finite = _from_bf16(stored.view(np.uint8)) if dtype == "BF16" else stored
        if not np.isfinite(finite).all():
            raise ImportRefused(f"the tensor {target.source.name!r} holds values that are no finite {dtype} numbers")
        file.seek(places[index])
        file.write(stored.tobytes())
        places[index] += stored.nbytes


def _converted(target: Target, chunk: Blocks) -> list[Array]:
    kind = target.source.kind
    quantized = QUANTIZED.get(kind)
    if quantized is None:
        arrays: Sequence[Array] = (FLOATS[kind](chunk),)
    else:
        arrays = quantized.unpack(chunk.reshape(-1, quantized.block_bytes))
    dtypes = [dtype for _, dtype, _ in target.parts]
    return [array if dtype == "U32" else DTYPES[dtype](array) for array, dtype in zip(arrays, dtypes, strict=True)]
