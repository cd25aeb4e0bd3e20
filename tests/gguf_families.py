"""Tiny models of every family as GGUF files, written the way llama.cpp's converter writes them.

Importing this module imports MLX: only tests marked ``mlx`` may. Names come from the ``gguf`` package's own map of
Hugging Face's names, so nothing here repeats the tables of the code under test.
"""

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES
from gguf import GGMLQuantizationType as Kind
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from tests.gguf_files import Vocabulary, Weights, random_blocks, to_pairs, tokenizer_keys, write_gguf

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
LONG = [1.0 + 0.5 * i for i in range(4)]
SHORT = [1.0 + 0.1 * i for i in range(4)]


@dataclass(frozen=True)
class Case:
    """A model of mlx-lm, and what its GGUF file has beside the common keys.

    ``config`` differs from the common sizes; ``keys`` follow the architecture's prefix; ``interleaved`` and
    ``plus_one`` are what the converter does to the rows of queries and keys, and to norms.
    """

    architecture: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    interleaved: bool = False
    plus_one: bool = False
    extra: Mapping[str, list[float]] = field(default_factory=dict)

    def whole_config(self, vocab_size: int) -> dict[str, Any]:
        """config.json of the original."""
        return {**_SIZES, **self.config, "model_type": self.model_type, "vocab_size": vocab_size}


CASES: Mapping[str, Case] = {
    "llama": Case("llama", "llama", {"head_dim": 32}, {"attention.key_length": 32}, interleaved=True),
    "mixtral": Case("llama", "mixtral", _EXPERTS, {"expert_count": 4, "expert_used_count": 2}, interleaved=True),
    # The fourth layer does not rotate.
    "smollm3": Case("smollm3", "smollm3", {"num_hidden_layers": 5, "tie_word_embeddings": True}, interleaved=True),
    "granite": Case(
        "granite",
        "granite",
        {
            "attention_multiplier": 0.125,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.25,
            "logits_scaling": 4.0,
            "attention_bias": False,
            "mlp_bias": False,
        },
        {"attention.scale": 0.125, "embedding_scale": 12.0, "residual_scale": 0.25, "logit_scale": 4.0},
        interleaved=True,
    ),
    "qwen2": Case("qwen2", "qwen2", {"rope_theta": 1e6}),
    "qwen2-tied": Case("qwen2", "qwen2", {"tie_word_embeddings": True}),
    "qwen3": Case("qwen3", "qwen3", {"head_dim": 32}, {"attention.key_length": 32, "attention.value_length": 32}),
    "qwen3moe": Case(
        "qwen3moe",
        "qwen3_moe",
        _EXPERTS,
        {
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 32,
            "attention.key_length": 16,
        },
    ),
    "gemma": Case(
        "gemma",
        "gemma",
        {"head_dim": 32, "tie_word_embeddings": True},
        {"attention.key_length": 32, "attention.value_length": 32},
        plus_one=True,
    ),
    "gemma2": Case(
        "gemma2",
        "gemma2",
        {
            "head_dim": 32,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
        {
            "attention.key_length": 32,
            "attention.value_length": 32,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
            "attention.sliding_window": 4096,
        },
        plus_one=True,
    ),
    # Five layers with a window of 16 tokens, one without, one with: the texts are longer than the window.
    "gemma3": Case(
        "gemma3",
        "gemma3_text",
        {
            "head_dim": 32,
            "num_hidden_layers": 7,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "rope_theta": 1e6,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            "attention.key_length": 32,
            "attention.value_length": 32,
            "attention.sliding_window": 16,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        plus_one=True,
    ),
    "phi3": Case("phi3", "phi3"),
    # As Phi-4-mini: half of a head is rotated, by two sets of factors, and the output matrix is the embedding.
    "phi3-long": Case(
        "phi3",
        "phi3",
        {
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "longrope", "long_factor": LONG, "short_factor": SHORT},
            "tie_word_embeddings": True,
        },
        {
            "rope.dimension_count": 8,
            "rope.scaling.original_context_length": 64,
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(4) / math.log(64)),
        },
        extra={"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT},
    ),
}


def original(config: Mapping[str, Any], weights: Mapping[str, NDArray[np.float32]] | None = None) -> Any:
    """mlx-lm's own model in float32, with these weights or its initial ones."""
    architecture = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = architecture.Model(architecture.ModelArgs.from_dict(dict(config)))
    if weights is not None:
        arrays = {name: mx.array(weight) for name, weight in weights.items()}
        model.load_weights(list((model.sanitize(arrays) if hasattr(model, "sanitize") else arrays).items()))
    return model


def random_parameters(case: Case, vocab_size: int, seed: int = 0) -> Weights:
    """Values for every parameter of the model, of a size that keeps activations near one."""
    config = case.whole_config(vocab_size)
    rng = np.random.default_rng(seed)
    weights: Weights = {}
    parameters: dict[str, Any] = dict(tree_flatten(original(config).parameters()))
    for name, value in parameters.items():
        if name.startswith("lm_head") and config["tie_word_embeddings"]:
            continue
        if name.endswith("norm.weight"):
            weights[name] = rng.uniform(0.5, 1.5, value.shape).astype(np.float32) - np.float32(case.plus_one)
        else:
            weights[name] = rng.normal(0, 1 / math.sqrt(value.shape[-1]), value.shape).astype(np.float32)
    return weights


def write_case(
    path: Path, case: Case, vocabulary: Vocabulary, kind: Kind = Kind.F32, changes: Mapping[str, Any] | None = None
) -> Weights:
    """Writes the model and returns its parameters as the file holds them. ``changes`` sets or takes out keys."""
    config = case.whole_config(len(vocabulary.tokens))
    weights = random_parameters(case, len(vocabulary.tokens))
    held: Weights = {}
    tensors: list[tuple[str, NDArray[Any], Kind]] = []
    for name, weight in weights.items():
        own = kind if weight.ndim > 1 and not name.endswith("gate.weight") else Kind.F32
        stored = encode(weight, own)
        held[name] = gguf.quants.dequantize(stored, own).reshape(weight.shape)
        if name.endswith("norm.weight"):
            stored = weight + np.float32(case.plus_one)
        if case.interleaved and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            stored = to_pairs(stored, heads)
        tensors.append((gguf_name(case, config, name), stored, own))
    tensors += [(name, np.array(values, np.float32), Kind.F32) for name, values in case.extra.items()]
    keys = {**header(case, config), **tokenizer_keys(vocabulary), **(changes or {})}
    write_gguf(path, {key: value for key, value in keys.items() if value is not None}, tensors, case.architecture)
    return held


def encode(weight: NDArray[np.float32], kind: Kind) -> NDArray[Any]:
    """The values as blocks; random ones of the same shape for a type that the package cannot make."""
    try:
        encoded: NDArray[Any] = gguf.quants.quantize(weight, kind)
    except NotImplementedError:
        rows = math.prod(weight.shape[:-1])
        blocks = random_blocks(kind, rows, weight.shape[-1], np.random.default_rng(rows))
        encoded = blocks.reshape(*weight.shape[:-1], -1)
    return encoded


def header(case: Case, config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that the converter writes for the model itself."""
    keys = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
        **case.keys,
    }
    return {f"{case.architecture}.{key}": value for key, value in keys.items()}


# mlx-lm's names of a layer's experts, by what Hugging Face calls the merged ones.
_MERGED = {
    "mlp.switch_mlp.": "mlp.experts.",
    "block_sparse_moe.switch_mlp.gate_proj": "block_sparse_moe.experts.w1",
    "block_sparse_moe.switch_mlp.down_proj": "block_sparse_moe.experts.w2",
    "block_sparse_moe.switch_mlp.up_proj": "block_sparse_moe.experts.w3",
}


def gguf_name(case: Case, config: Mapping[str, Any], name: str) -> str:
    """What the package calls a parameter."""
    kind = next(kind for kind in MODEL_ARCH if MODEL_ARCH_NAMES[kind] == case.architecture)
    for ours, theirs in _MERGED.items():
        name = name.replace(ours, theirs)
    found: str | None = gguf.get_tensor_name_map(kind, config["num_hidden_layers"]).get_name(name, (".weight", ".bias"))
    assert found is not None, name
    return found
