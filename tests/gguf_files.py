"""Small GGUF files for tests, written with the ``gguf`` package, and the arrays they stand for.

The weights are random; ``TinyLlama`` keeps them as mlx-lm names and orders them, so that a test can compare an
import with what went in.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import TokenType
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

Weights: TypeAlias = dict[str, NDArray[np.float32]]

# hidden, layers, feed-forward, heads, key-value heads, head dimension
HIDDEN, LAYERS, WIDE, HEADS, KV_HEADS, HEAD_DIM = 64, 2, 96, 4, 2, 32

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@dataclass(slots=True)
class Vocabulary:
    """A tokenizer as a GGUF header holds it."""

    model: str
    tokens: list[str]
    kinds: list[TokenType]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    pre: str | None = None


def byte_level_vocabulary(pre: str | None = "smollm", words: Sequence[str] = (" the", "ing", " Paris")) -> Vocabulary:
    """Every byte, three control tokens, a user-defined one, and the pieces of a few words with their merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>", *alphabet]
    kinds = [TokenType.CONTROL] * 3 + [TokenType.USER_DEFINED] + [TokenType.NORMAL] * len(alphabet)
    merges: list[str] = []
    for word in words:
        pieces = word.replace(" ", "Ġ")
        for end in range(2, len(pieces) + 1):
            if pieces[:end] not in tokens:
                tokens.append(pieces[:end])
                kinds.append(TokenType.NORMAL)
                merges.append(f"{pieces[: end - 1]} {pieces[end - 1]}")
    return Vocabulary("gpt2", tokens, kinds, merges=merges, pre=pre)


def dimensions(vocabulary: Vocabulary) -> dict[str, Any]:
    """The keys of a header that fix the tensors' shapes, and those every llama file has."""
    return {
        "llama.block_count": LAYERS,
        "llama.context_length": 256,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": WIDE,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.key_length": HEAD_DIM,
        "llama.attention.value_length": HEAD_DIM,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.rope.freq_base": 10_000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": len(vocabulary.tokens),
    }


def random_weights(vocab_size: int, *, tied: bool = True, seed: int = 0) -> Weights:
    """A whole llama under mlx-lm's names."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        return rng.normal(0, 1 / math.sqrt(columns), (rows, columns)).astype(np.float32)

    def norm() -> NDArray[np.float32]:
        return rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(vocab_size, HIDDEN), "model.norm.weight": norm()}
    if not tied:
        weights["lm_head.weight"] = matrix(vocab_size, HIDDEN)
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate_proj": (WIDE, HIDDEN),
        "mlp.up_proj": (WIDE, HIDDEN),
        "mlp.down_proj": (HIDDEN, WIDE),
    }
    for layer in range(LAYERS):
        for name in _NAMES:
            weight = matrix(*shapes[name]) if name in shapes else norm()
            weights[f"model.layers.{layer}.{name}.weight"] = weight
    return weights


def gguf_name(name: str) -> str:
    """What GGUF calls a tensor of mlx-lm's llama."""
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if not name.startswith("model.layers."):
        base, _, leaf = name.rpartition(".")
        return f"{top[base]}.{leaf}"
    _, _, layer, module = name.split(".", 3)
    base, _, leaf = module.rpartition(".")
    return f"blk.{layer}.{_NAMES[base]}.{leaf}"


def to_pairs(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Query or key rows as llama.cpp keeps them: row i of a head's first half beside row i of its second."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(rows.shape)


# Where a block keeps its 16-bit scales.
_SCALES_AT: Mapping[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ1_S": (0,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}


def random_blocks(kind: Kind, rows: int, columns: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Rows of random blocks of any type, whose values have the spread of a new layer's: 1 / sqrt(columns)."""
    size, width = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * columns // size, width), dtype=np.uint8)
    _set_scales(kind, blocks, 1.0)
    spread = float(gguf.quants.dequantize(blocks, kind).std())
    _set_scales(kind, blocks, 1 / (spread * math.sqrt(columns)))
    return blocks.reshape(rows, -1)


def _set_scales(kind: Kind, blocks: NDArray[np.uint8], scale: float) -> None:
    half = np.array([scale], "<f2").view(np.uint8)
    for at in _SCALES_AT.get(kind.name, ()):
        blocks[:, at : at + 2] = half
    if kind is Kind.IQ1_M:
        # Its scale is spread over the highest four bits of four 16-bit numbers.
        bits = int(half.view("<u2")[0])
        for index, at in enumerate((49, 51, 53, 55)):
            blocks[:, at] = blocks[:, at] & 0x0F | (bits >> 4 * index & 0x0F) << 4
    if kind is Kind.MXFP4:
        blocks[:, 0] = 127 + round(math.log2(scale))


def pack_q6_k(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Rows of values as Q6_K, simply: the scale of each 16 is what their largest needs."""
    groups = values.reshape(-1, 16, 16)
    wanted = np.abs(groups).max(axis=2) / 31
    whole = (wanted.max(axis=1, keepdims=True) / 127).astype("<f2")
    scales = np.rint(wanted / np.maximum(whole.astype(np.float32), 1e-12)).clip(1, 127).astype(np.int8)
    steps = (whole.astype(np.float32) * scales)[..., None]
    q = (np.rint(groups / np.maximum(steps, 1e-12)).clip(-32, 31) + 32).astype(np.uint8)
    low = (q & 0x0F).reshape(-1, 2, 2, 64)
    high = (q >> 4).reshape(-1, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    parts = [
        (low[:, :, 0] | low[:, :, 1] << 4).reshape(len(q), -1),
        np.bitwise_or.reduce(high, axis=2).reshape(len(q), -1),
        scales.view(np.uint8),
        whole.view(np.uint8).reshape(len(q), 2),
    ]
    return np.concatenate(parts, axis=1).reshape(len(values), -1)


def write_llama(
    path: Path,
    weights: Weights,
    vocabulary: Vocabulary,
    kinds: Kind | Mapping[str, Kind] = Kind.F32,
    changes: Mapping[str, Any] | None = None,
    factors: NDArray[np.float32] | None = None,
) -> Weights:
    """Writes the model and returns its weights as the file's types hold them, dequantised by ``gguf.quants``.

    ``kinds`` is the type of the matrices, all alike or by mlx-lm's names; vectors stay F32. ``changes`` sets keys,
    or takes them out (None). ``factors`` becomes rope_freqs.weight.
    """
    held: Weights = {}
    tensors: list[tuple[str, NDArray[Any], Kind]] = []
    for name, weight in weights.items():
        kind = Kind.F32 if weight.ndim == 1 else kinds if isinstance(kinds, Kind) else kinds.get(name, Kind.F32)
        held[name] = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind).reshape(weight.shape)
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else 0
        stored = to_pairs(weight, heads) if heads else weight
        tensors.append((gguf_name(name), gguf.quants.quantize(stored, kind), kind))
    if factors is not None:
        tensors.append(("rope_freqs.weight", factors, Kind.F32))
    keys = {**dimensions(vocabulary), **tokenizer_keys(vocabulary), **(changes or {})}
    write_gguf(path, {name: value for name, value in keys.items() if value is not None}, tensors)
    return held


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model that is written by ``write_random_llama``: its heads have 64 values, two share one key."""

    hidden: int
    feed_forward: int
    layers: int


def write_random_llama(path: Path, vocabulary: Vocabulary, kind: Kind, sizes: Sizes) -> None:
    """Writes a llama of any size whose matrices all have the type; each layer has the same, to be quick.

    It has rotary factors, which an import puts into config.json.
    """
    rng = np.random.default_rng(0)
    hidden, wide, keys_wide = sizes.hidden, sizes.feed_forward, sizes.hidden // 2
    keys = dimensions(vocabulary) | tokenizer_keys(vocabulary)
    keys |= {f"llama.attention.{half}_length": 64 for half in ("key", "value")} | {"llama.rope.dimension_count": 64}
    keys |= {"llama.attention.head_count": hidden // 64, "llama.attention.head_count_kv": hidden // 128}
    keys |= {
        "llama.block_count": sizes.layers,
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": wide,
    }

    def matrix(rows: int, columns: int) -> NDArray[Any]:
        if gguf.GGML_QUANT_SIZES[kind][0] > 1:
            return random_blocks(kind, rows, columns, rng)
        values: NDArray[Any] = gguf.quants.quantize(rng.normal(0, 0.1, (rows, columns)).astype(np.float32), kind)
        return values

    layer = {
        "attn_q": matrix(hidden, hidden),
        "attn_k": matrix(keys_wide, hidden),
        "attn_v": matrix(keys_wide, hidden),
        "attn_output": matrix(hidden, hidden),
        "ffn_gate": matrix(wide, hidden),
        "ffn_up": matrix(wide, hidden),
        "ffn_down": matrix(hidden, wide),
    }
    norm = np.ones(hidden, np.float32)
    tensors: list[tuple[str, NDArray[Any], Kind]] = [
        ("token_embd.weight", matrix(len(vocabulary.tokens), hidden), kind),
        ("output_norm.weight", norm, Kind.F32),
        ("rope_freqs.weight", np.linspace(1, 2, 32, dtype=np.float32), Kind.F32),
    ]
    for index in range(sizes.layers):
        tensors += [(f"blk.{index}.{name}.weight", weight, kind) for name, weight in layer.items()]
        tensors += [(f"blk.{index}.{name}_norm.weight", norm, Kind.F32) for name in ("attn", "ffn")]
    write_gguf(path, {name: value for name, value in keys.items() if value is not None}, tensors)


def tokenizer_keys(vocabulary: Vocabulary) -> dict[str, Any]:
    """The header's tokenizer.ggml keys."""
    return {
        "tokenizer.ggml.model": vocabulary.model,
        "tokenizer.ggml.pre": vocabulary.pre,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in vocabulary.kinds],
        "tokenizer.ggml.merges": vocabulary.merges or None,
        "tokenizer.ggml.scores": vocabulary.scores or None,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }


def write_gguf(
    path: Path,
    keys: Mapping[str, Any],
    tensors: Sequence[tuple[str, NDArray[Any], Kind]],
    architecture: str = "llama",
) -> None:
    """Writes any file: integers as u32, floats as f32, lists by their first item."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        _add(writer, key, value)
    for name, data, kind in tensors:
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
