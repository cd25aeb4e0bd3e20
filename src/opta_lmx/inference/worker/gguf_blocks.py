"""Blocks of numbers: every tensor type of GGUF that can be imported, and the affine groups that MLX holds.

MLX's affine quantisation is value = scale * q + bias for each group of a row. Some block types of GGUF are just
that, and their bits are only moved: Q4_1, Q5_1, Q4_K and Q5_K store scale and bias; Q4_0 means d * (q - 8), so its
bias is -8d, and Q5_0 likewise has -16d; Q8_0 stores signed q, which becomes unsigned by adding 128, so its bias
is -128d. All other types are dequantised by the ``gguf`` package and quantised again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import gguf
import numpy as np
from numpy.typing import NDArray

Blocks: TypeAlias = NDArray[np.uint8]
Array: TypeAlias = NDArray[Any]

# Values that share a scale where bits are only moved.
EXACT_GROUP = 32

# Values that share a scale after a new quantisation, in the order of preference: mlx-lm's own default, and what
# narrower rows allow.
NEW_GROUPS = (64, 32)


def pack(values: Blocks, bits: int) -> Array:
    """(n, m) numbers below 2**bits as (n, m * bits / 32) uint32: value i of a row stands ``bits * i`` bits into it."""
    eights = values.reshape(-1, 8).astype(np.uint64) << (np.arange(8, dtype=np.uint64) * np.uint64(bits))
    words = np.bitwise_or.reduce(eights, axis=1).astype("<u8").view(np.uint8).reshape(-1, 8)
    return np.ascontiguousarray(words[:, :bits]).reshape(len(values), -1).view("<u4")


def quantize(values: Array, bits: int, store: Callable[[Array], Array]) -> tuple[Array, Array, Array]:
    """(n, group) float32 -> packed q, scale and bias, as ``mlx.core.quantize`` chooses them.

    ``store`` rounds to the type that scale and bias will be stored in; q is chosen for the rounded ones. Zero stays
    zero exactly, because the end of the range that is farther from it is a whole number of steps away.
    """
    low, high = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
    steps = np.float32(2**bits - 1)
    far_low = np.abs(low) > np.abs(high)
    edge = np.where(far_low, low, high)
    scale = np.maximum((high - low) / steps, np.float32(1e-7)) * np.where(far_low, np.float32(1), np.float32(-1))
    whole = np.rint(edge / scale)
    scale = store(np.where(whole == 0, scale, edge / np.where(whole == 0, 1, whole)))
    bias = store(np.where(whole == 0, 0, edge))
    q = np.clip(np.rint((values - bias) / np.where(scale == 0, 1, scale)), 0, steps)
    return pack(q.astype(np.uint8), bits), scale, bias


def _half(blocks: Blocks, at: int) -> Array:
    """The 16-bit float that stands ``at`` bytes into each block."""
    return blocks[:, at : at + 2].view("<f2").astype(np.float32)


def _nibbles(halves: Blocks) -> Blocks:
    """GGUF keeps value i of a group of 32 beside value i + 16 in one byte."""
    return np.concatenate([halves & 0x0F, halves >> 4], axis=1)


def _fifth_bits(high: Blocks) -> Blocks:
    """(n, 4) bytes -> (n, 32), the fifth bit of every value in its place."""
    return np.unpackbits(high, axis=1, bitorder="little") << np.uint8(4)


def unpack_q4_0(blocks: Blocks) -> tuple[Array, Array, Array]:
    """(n, 18) bytes -> packed (n, 4) uint32, scale d (n, 1), bias -8d (n, 1), the last two in float32."""
    scale = _half(blocks, 0)
    return pack(_nibbles(blocks[:, 2:]), 4), scale, scale * -8


def unpack_q4_1(blocks: Blocks) -> tuple[Array, Array, Array]:
    """(n, 20) bytes -> packed (n, 4) uint32, scale d (n, 1), bias m (n, 1)."""
    return pack(_nibbles(blocks[:, 4:]), 4), _half(blocks, 0), _half(blocks, 2)


def unpack_q5_0(blocks: Blocks) -> tuple[Array, Array, Array]:
    """(n, 22) bytes -> packed (n, 5) uint32, scale d (n, 1), bias -16d (n, 1)."""
    scale = _half(blocks, 0)
    return pack(_nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6]), 5), scale, scale * -16


def unpack_q5_1(blocks: Blocks) -> tuple[Array, Array, Array]:
    """(n, 24) bytes -> packed (n, 5) uint32, scale d (n, 1), bias m (n, 1)."""
    return pack(_nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8]), 5), _half(blocks, 0), _half(blocks, 2)


def unpack_q8_0(blocks: Blocks) -> tuple[Array, Array, Array]:
    """(n, 34) bytes -> packed (n, 8) uint32, scale d (n, 1), bias -128d (n, 1)."""
    scale = _half(blocks, 0)
    # Flipping the sign bit of a two's complement byte adds 128 to it.
    return np.ascontiguousarray(blocks[:, 2:] ^ 0x80).view("<u4"), scale, scale * -128


def unpack_q4_k(blocks: Blocks) -> tuple[Array, Array, Array]:
    """(n, 144) bytes, eight groups each -> packed (8n, 4) uint32, scale d * s (8n, 1), bias -dmin * m (8n, 1)."""
    scale, bias = _k_scales(blocks)
    return pack(_k_nibbles(blocks[:, 16:]), 4), scale, bias


def unpack_q5_k(blocks: Blocks) -> tuple[Array, Array, Array]:
    """(n, 176) bytes, eight groups each -> packed (8n, 5) uint32, scale d * s (8n, 1), bias -dmin * m (8n, 1)."""
    scale, bias = _k_scales(blocks)
    # Byte i holds the fifth bits of value i of all eight groups.
    high = np.unpackbits(blocks[:, 16:48, None], axis=2, bitorder="little").swapaxes(1, 2)
    return pack(_k_nibbles(blocks[:, 48:]) | high.reshape(-1, 32) << np.uint8(4), 5), scale, bias


def _k_nibbles(quarters: Blocks) -> Blocks:
    """(n, 128) bytes -> (8n, 32): each 32 bytes hold one group in their low halves and the next in their high ones."""
    pairs = quarters.reshape(-1, 4, 1, 32)
    return np.concatenate([pairs & 0x0F, pairs >> 4], axis=2).reshape(-1, 32)


def _k_scales(blocks: Blocks) -> tuple[Array, Array]:
    """The scale and bias of each of a block's eight groups, from two halves and sixteen numbers of six bits."""
    first, second, rest = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scales = np.concatenate([first & 0x3F, rest & 0x0F | first >> 2 & 0x30], axis=1)
    mins = np.concatenate([second & 0x3F, rest >> 4 | second >> 2 & 0x30], axis=1)
    scale, bias = _half(blocks, 0) * scales.astype(np.float32), _half(blocks, 2) * -mins.astype(np.float32)
    return scale.reshape(-1, 1), bias.reshape(-1, 1)


@dataclass(frozen=True, slots=True)
class Quantized:
    """A block type that MLX can hold: bits of a value, bytes of a block, and how to move them."""

    bits: int
    block_bytes: int
    unpack: Callable[[Blocks], tuple[Array, Array, Array]]


EXACT: Mapping[str, Quantized] = {
    "Q4_0": Quantized(4, 18, unpack_q4_0),
    "Q4_1": Quantized(4, 20, unpack_q4_1),
    "Q5_0": Quantized(5, 22, unpack_q5_0),
    "Q5_1": Quantized(5, 24, unpack_q5_1),
    "Q8_0": Quantized(8, 34, unpack_q8_0),
    "Q4_K": Quantized(4, 144, unpack_q4_k),
    "Q5_K": Quantized(5, 176, unpack_q5_k),
}

# Those that are dequantised: groups of 16, code books, ternary and floating-point blocks.
DEQUANTIZED = frozenset(
    {"Q2_K", "Q3_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"}
    | {"IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4"}
)


def dequantize(kind: str, rows: Blocks) -> Array:
    """(n, bytes of a row) -> float32, one row of values for each."""
    values: Array = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    return values


def from_bf16(raw: Blocks) -> Array:
    """Bytes, two for each value, as float32."""
    widened: Array = raw.view("<u2").astype(np.uint32) << 16
    return widened.view(np.float32)


FLOATS: Mapping[str, Callable[[Blocks], Array]] = {
    "F32": lambda raw: raw.view("<f4"),
    "F16": lambda raw: raw.view("<f2").astype(np.float32),
    "BF16": from_bf16,
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


def rounded(values: Array, dtype: str) -> Array:
    """The float32 values that storing these as ``dtype`` would keep."""
    stored = np.ascontiguousarray(DTYPES[dtype](values))
    return from_bf16(stored.view(np.uint8)).reshape(values.shape) if dtype == "BF16" else stored.astype(np.float32)
