"""What a GGUF file holds, read from its header with no tensor in memory.

The importer (``inference/worker/convert.py``) trusts the files it is given; this is the room that decides which
those are. Every count and length is checked against the file and against a limit before anything is read or
allocated for it, so a hostile file costs at most about a second and some tens of megabytes.
"""

import io
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from opta_lmx.manager.gguf_size import GgufTensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)

# What the importer has a name map for, and the tokenizers it can rebuild. Mistral's and Mixtral's files are llama's.
ARCHITECTURES = (
    "llama", "qwen2", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "phi3", "smollm3", "granite",
)  # fmt: skip
EXPERT_ARCHITECTURES = ("llama", "qwen3moe")
TOKENIZERS = ("gpt2", "llama")
PRE_TOKENIZERS = (
    "default", "gpt-2", "phi-2", "smollm", "starcoder", "refact", "llama-bpe", "llama-v3", "llama3", "pixtral",
    "dbrx", "qwen2", "deepseek-r1-qwen", "tekken", "gpt-4o", "deepseek-coder",
)  # fmt: skip

# Tensor type numbers of the format: name, values in a block, bytes of a block. Floats first, then what MLX can hold
# as it is, then what is dequantised and quantised again.
TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 14: ("Q6_K", 256, 210),
    19: ("IQ1_S", 256, 50), 29: ("IQ1_M", 256, 56), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    22: ("IQ2_S", 256, 82), 18: ("IQ3_XXS", 256, 98), 21: ("IQ3_S", 256, 110), 20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip

# Types that exist but cannot be imported; named so that the refusal can name them.
_OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip

# The largest published vocabularies have about 260,000 tokens and 510,000 merges; the largest models have some
# thousands of tensors and a hundred keys, with names under 64 bytes. Each limit leaves room for several times that.
MAX_ARRAY_ITEMS = 4_000_000
MAX_KEYS = 4_096
MAX_TENSORS = 50_000
MAX_NAME_BYTES = 256
MAX_AXES = 4

_STRING, _ARRAY = 8, 9
# Value type numbers of the format: struct code (little-endian).
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

# The strings that are looked at; every other one is stepped over unread.
_TEXT_KEYS = frozenset({"general.architecture", "general.name", "tokenizer.ggml.model", "tokenizer.ggml.pre"})
_MAX_TEXT_BYTES = 4_096

# How much is read at once; strings in arrays are stepped over inside it.
_WINDOW_BYTES = 1024 * 1024

# Has a row for each entry of the vocabulary.
_EMBEDDING = "token_embd.weight"

Scalar: TypeAlias = str | int | float | bool


class GgufError(Exception):
    """The file cannot be imported; ``reason`` is one clause a user can act on, without a path."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class GgufFacts:
    """``tensor_bytes`` maps type names to bytes; lengths are tokens; None where the file does not say."""

    architecture: str
    name: str | None
    context_length: int | None
    layers: int | None
    kv_heads: int | None
    head_dim: int | None
    tokenizer: str
    vocab_size: int | None
    tensors: tuple[GgufTensor, ...]
    tensor_bytes: Mapping[str, int]

    @property
    def quantization(self) -> str:
        """The type that most of the bytes have, such as Q4_1."""
        return max(self.tensor_bytes, key=lambda name: self.tensor_bytes[name])


def inspect(path: Path) -> GgufFacts:
    """Reads and checks the header. Raises GgufError with the reason, OSError if the file cannot be read."""
    with path.open("rb", buffering=0) as file:
        window = _Window(file, os.fstat(file.fileno()).st_size)
        if window.take(4) != MAGIC:
            raise GgufError("it is not a GGUF file: it does not start with the letters GGUF")
        version = window.number("I")
        if version not in VERSIONS:
            order = " (big-endian)" if version & 0xFFFF == 0 else ""
            raise GgufError(f"GGUF version {version}{order} is not supported, only versions 2 and 3")
        tensor_count = _bounded(window.number("Q"), MAX_TENSORS, "tensors")
        key_count = _bounded(window.number("Q"), MAX_KEYS, "keys")
        values = _read_values(window, key_count)
        _check_importable(values)
        tensors, sizes = _read_tensors(window, tensor_count, values)
    return _facts(values, tensors, sizes)


class _Window:
    """A sliding view of the file that refuses to pass its end."""

    def __init__(self, file: io.FileIO, size: int) -> None:
        self._file = file
        self.size = size
        self._buffer = b""
        self._base = 0
        self._at = 0

    @property
    def position(self) -> int:
        return self._base + self._at

    def _require(self, count: int) -> None:
        if self.position + count > self.size:
            raise GgufError(f"it is truncated: its header continues past its end at byte {self.size:,}")

    def _fill(self, count: int) -> None:
        """Moves the window to the present position and makes at least ``count`` bytes stand in it."""
        self._require(count)
        self._base, self._at = self.position, 0
        self._file.seek(self._base)
        self._buffer = self._file.read(max(count, _WINDOW_BYTES))
        if len(self._buffer) < count:
            raise GgufError("it changed while it was being read")

    def take(self, count: int) -> bytes:
        if self._at + count > len(self._buffer):
            self._fill(count)
        start, self._at = self._at, self._at + count
        return self._buffer[start : self._at]

    def skip(self, count: int) -> None:
        self._require(count)
        self._at += count

    def scalar(self, code: str) -> int | float | bool:
        form = struct.Struct("<" + code)
        value: int | float | bool
        (value,) = form.unpack(self.take(form.size))
        return value

    def number(self, code: str) -> int:
        return int(self.scalar(code))

    def text(self, limit: int) -> str:
        length = _bounded(self.number("Q"), limit, "bytes in one string")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise GgufError("it holds text that is not UTF-8") from error

    def skip_texts(self, count: int) -> None:
        """Steps over ``count`` strings; written for speed, a vocabulary has hundreds of thousands."""
        read_length = struct.Struct("<Q").unpack_from
        buffer, at = self._buffer, self._at
        for _ in range(count):
            if at + 8 > len(buffer):
                self._at = at
                self._fill(8)
                buffer, at = self._buffer, 0
            (length,) = read_length(buffer, at)
            at += 8
            if at + length > len(buffer):
                self._at = at
                self.skip(length)
                self._fill(0)
                buffer, at = self._buffer, 0
            else:
                at += length
        self._at = at


def _bounded(value: int, limit: int, what: str) -> int:
    if value > limit:
        raise GgufError(f"its header claims {value:,} {what}, over the limit of {limit:,}")
    return value


def _read_values(window: _Window, count: int) -> dict[str, Scalar]:
    """The numbers and the few strings of interest by key; everything else is stepped over."""
    values: dict[str, Scalar] = {}
    seen: set[str] = set()
    items_left = MAX_ARRAY_ITEMS
    for _ in range(count):
        key = window.text(MAX_NAME_BYTES)
        if key in seen:
            raise GgufError(f"its header has the key {key!r} twice")
        seen.add(key)
        kind = window.number("I")
        if kind == _ARRAY:
            items_left -= _skip_array(window, items_left)
        elif kind == _STRING and key in _TEXT_KEYS:
            values[key] = window.text(_MAX_TEXT_BYTES)
        elif kind == _STRING:
            window.skip(window.number("Q"))
        else:
            values[key] = window.scalar(_scalar_code(kind))
    return values


def _skip_array(window: _Window, items_left: int) -> int:
    kind = window.number("I")
    length = _bounded(window.number("Q"), items_left, "list items")
    if kind == _STRING:
        window.skip_texts(length)
    else:
        window.skip(length * struct.calcsize("<" + _scalar_code(kind)))
    return length


def _scalar_code(kind: int) -> str:
    code = _SCALARS.get(kind)
    if code is None:
        raise GgufError(f"its header has a value of the unknown kind {kind}")
    return code


def _check_importable(values: Mapping[str, Scalar]) -> None:
    """Refuses by metadata alone, so that the reason is the most general one."""
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str):
        raise GgufError("its header names no architecture")
    if architecture not in ARCHITECTURES:
        raise GgufError(f"the architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    if values.get("split.count", 0) not in (0, 1):
        raise GgufError("it is one part of a model that was split over several files")
    if values.get(f"{architecture}.expert_count", 0) != 0 and architecture not in EXPERT_ARCHITECTURES:
        supported = ", ".join(EXPERT_ARCHITECTURES)
        raise GgufError(f"mixture-of-experts models of {architecture!r} are not supported; supported: {supported}")
    tokenizer = values.get("tokenizer.ggml.model")
    if tokenizer not in TOKENIZERS:
        raise GgufError(f"the tokenizer kind {tokenizer!r} is not supported; supported: {', '.join(TOKENIZERS)}")
    splitter = values.get("tokenizer.ggml.pre", "default")
    if tokenizer == "gpt2" and splitter not in PRE_TOKENIZERS:
        raise GgufError(f"the pre-tokenizer {splitter!r} is not supported; supported: {', '.join(PRE_TOKENIZERS)}")


def _read_tensors(
    window: _Window, count: int, values: Mapping[str, Scalar]
) -> tuple[tuple[GgufTensor, ...], dict[str, int]]:
    """The tensors, and their bytes by type name; every extent is checked against the file."""
    if not count:
        raise GgufError("it holds no tensors")
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise GgufError(f"its alignment {alignment!r} is not a power of two")
    tensors: list[GgufTensor] = []
    sizes: dict[str, int] = {}
    names: set[str] = set()
    extents: list[tuple[int, int, str]] = []
    for _ in range(count):
        name = window.text(MAX_NAME_BYTES)
        if name in names:
            raise GgufError(f"its header has the tensor {name!r} twice")
        names.add(name)
        shape = [window.number("Q") for _ in range(_bounded(window.number("I"), MAX_AXES, "axes of a tensor"))]
        kind, size = _tensor_bytes(name, window.number("I"), shape)
        extents.append((window.number("Q"), size, name))
        tensors.append(GgufTensor(name, kind, tuple(shape)))
        sizes[kind] = sizes.get(kind, 0) + size
    data_start = -(-window.position // alignment) * alignment
    for offset, size, name in extents:
        if offset % alignment:
            raise GgufError(f"the tensor {name!r} is not aligned to {alignment} bytes")
        if data_start + offset + size > window.size:
            missing = data_start + offset + size - window.size
            raise GgufError(f"it is truncated: {missing:,} bytes of the tensor {name!r} are missing")
    if sum(sizes.values()) > window.size - data_start:
        raise GgufError("its tensors overlap")
    return tuple(tensors), sizes


def _tensor_bytes(name: str, kind: int, shape: list[int]) -> tuple[str, int]:
    if kind not in TENSOR_TYPES:
        supported = ", ".join(label for label, _, _ in TENSOR_TYPES.values())
        label = _OTHER_TYPES.get(kind, f"number {kind}")
        raise GgufError(f"the tensor {name!r} has the type {label}, which is not supported; supported: {supported}")
    label, block, block_bytes = TENSOR_TYPES[kind]
    if not shape or 0 in shape or shape[0] % block:
        raise GgufError(f"the tensor {name!r} of type {label} has the impossible shape {shape}")
    return label, math.prod(shape) // block * block_bytes


def _facts(values: Mapping[str, Scalar], tensors: tuple[GgufTensor, ...], sizes: Mapping[str, int]) -> GgufFacts:
    architecture = str(values["general.architecture"])
    name = values.get("general.name")

    def number(key: str) -> int | None:
        value = values.get(f"{architecture}.{key}")
        return value if isinstance(value, int) and value > 0 else None

    heads, width = number("attention.head_count"), number("embedding_length")
    return GgufFacts(
        architecture=architecture,
        name=name if isinstance(name, str) else None,
        context_length=number("context_length"),
        layers=number("block_count"),
        kv_heads=number("attention.head_count_kv") or heads,
        head_dim=number("attention.key_length") or (width // heads if width and heads else None),
        tokenizer=str(values["tokenizer.ggml.model"]),
        vocab_size=next((tensor.shape[-1] for tensor in tensors if tensor.name == _EMBEDDING), None),
        tensors=tensors,
        tensor_bytes=dict(sizes),
    )
