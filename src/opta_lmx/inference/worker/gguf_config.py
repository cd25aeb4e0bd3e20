"""A GGUF file's metadata with checked types, and the config.json that mlx-lm's class needs from it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

JsonObject: TypeAlias = dict[str, Any]


class ImportRefused(Exception):
    """The file holds something that cannot be carried over exactly; the message names it, without a path."""


class Metadata:
    """Typed access to the keys of a GGUF header. Every method raises ImportRefused for a value of another type.

    ``fields`` are those of ``gguf.GGUFReader``: objects with ``contents()``.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def _value(self, key: str) -> Any:
        field = self._fields.get(key)
        if field is None:
            raise ImportRefused(f"the key {key!r} is missing")
        try:
            return field.contents()
        except UnicodeDecodeError as error:
            raise ImportRefused(f"the key {key!r} holds text that is not UTF-8") from error

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of at least one; ``default`` where the key is missing."""
        if default is not None and key not in self:
            return default
        value = self._value(key)
        if not isinstance(value, int) or value < 1:
            raise ImportRefused(f"the key {key!r} is {str(value)[:40]!r}, which is not a whole number above zero")
        return value

    def is_zero(self, key: str) -> bool:
        """True for a number that is zero, and for a key that is missing."""
        return key not in self or self._value(key) == 0

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number above zero; ``default`` where the key is missing."""
        if default is not None and key not in self:
            return default
        value = self._value(key)
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ImportRefused(f"the key {key!r} is {str(value)[:40]!r}, which is not a number above zero")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false; ``default`` where the key is missing."""
        if key not in self:
            return default
        value = self._value(key)
        if not isinstance(value, bool):
            raise ImportRefused(f"the key {key!r} is {str(value)[:40]!r}, which is neither true nor false")
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        """A string; ``default`` where the key is missing."""
        if key not in self:
            return default
        value = self._value(key)
        if not isinstance(value, str):
            raise ImportRefused(f"the key {key!r} is not a text")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        return self._list(key, str)

    def integers(self, key: str) -> list[int]:
        """A list of whole numbers."""
        return self._list(key, int)

    def reals(self, key: str) -> list[float]:
        """A list of fractional numbers."""
        return self._list(key, float)

    def token(self, key: str, vocabulary: Sequence[str]) -> int | None:
        """A token id, None where the key is missing; ImportRefused for an id outside the vocabulary."""
        if key not in self:
            return None
        value = self._value(key)
        if not isinstance(value, int) or not 0 <= value < len(vocabulary):
            raise ImportRefused(f"the key {key!r} is {str(value)[:40]!r}, which is not a token of the vocabulary")
        return value

    def _list(self, key: str, kind: type[Any]) -> list[Any]:
        value = self._value(key)
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise ImportRefused(f"the key {key!r} is not a list of {kind.__name__}")
        return value


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The sizes that fix every tensor's shape, most under the names of config.json.

    ``expert_size`` is the width of one expert's projections. ``rotary_dim`` is how many values of a head are rotated.
    """

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    experts: int = 0
    expert_size: int = 0
    rotary_dim: int = 0

    @classmethod
    def of(cls, metadata: Metadata, architecture: str, vocab_size: int) -> "Dimensions":
        """Raises ImportRefused for what mlx-lm's classes cannot express: per-layer sizes, values of another width."""
        hidden = metadata.count(f"{architecture}.embedding_length")
        heads = metadata.count(f"{architecture}.attention.head_count")
        head_dim = metadata.count(f"{architecture}.attention.key_length", default=max(hidden // heads, 1))
        kv_heads = metadata.count(f"{architecture}.attention.head_count_kv", default=heads)
        values = metadata.count(f"{architecture}.attention.value_length", default=head_dim)
        if values != head_dim:
            raise ImportRefused(f"attention.value_length is {values} but a head has {head_dim} values")
        rotary = metadata.count(f"{architecture}.rope.dimension_count", default=head_dim)
        if rotary % 2 or rotary > head_dim or (rotary != head_dim and architecture != "phi3"):
            raise ImportRefused(f"rope.dimension_count is {rotary} but a head has {head_dim} values")
        if heads % kv_heads or head_dim % 2:
            raise ImportRefused(f"{heads} heads of {head_dim} values cannot share {kv_heads} key-value heads")
        experts = expert_count(metadata, architecture)
        wide = metadata.count(f"{architecture}.feed_forward_length", default=1 if experts else None)
        return cls(
            hidden_size=hidden,
            num_hidden_layers=metadata.count(f"{architecture}.block_count"),
            intermediate_size=wide,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=vocab_size,
            experts=experts,
            expert_size=metadata.count(f"{architecture}.expert_feed_forward_length", default=wide),
            rotary_dim=rotary,
        )


def expert_count(metadata: Metadata, architecture: str) -> int:
    """How many experts a layer has; 0 for a dense model, which may say so or not."""
    key = f"{architecture}.expert_count"
    return 0 if metadata.is_zero(key) else metadata.count(key)


@dataclass(frozen=True, slots=True)
class RopeFactors:
    """Divisors of the rotary frequencies, one for each pair of rotated values.

    ``every`` holds at every length (rope_freqs.weight), ``long`` and ``short`` beyond and up to the original
    context (rope_factors_long.weight, rope_factors_short.weight).
    """

    every: Sequence[float] | None = None
    long: Sequence[float] | None = None
    short: Sequence[float] | None = None


def model_config(
    metadata: Metadata, architecture: str, model_type: str, dimensions: Dimensions, factors: RopeFactors
) -> JsonObject:
    """config.json without its quantization table, token ids and what only the tensors tell."""
    context = metadata.count(f"{architecture}.context_length")
    config: JsonObject = {
        "model_type": model_type,
        "max_position_embeddings": context,
        "rms_norm_eps": metadata.real(f"{architecture}.attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.real(f"{architecture}.rope.freq_base", default=10_000.0),
    }
    for name in _CONFIG_SIZES:
        config[name] = getattr(dimensions, name)
    scaling = _rope_scaling(metadata, architecture, context, factors)
    if scaling is not None and model_type not in _SCALES_ROPE:
        raise ImportRefused(f"rotary scaling is not supported for models of the type {model_type}")
    if scaling is not None:
        config["rope_scaling"] = scaling
    own = _OWN.get(model_type)
    return config if own is None else config | own(metadata, architecture, dimensions, factors)


_CONFIG_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)

# The classes of mlx-lm that take a rope_scaling and do with it what the header means.
_SCALES_ROPE = frozenset({"llama", "smollm3", "granite", "qwen2", "qwen3", "gemma3_text", "phi3"})


def _rope_scaling(metadata: Metadata, architecture: str, context: int, factors: RopeFactors) -> JsonObject | None:
    kind = metadata.text(f"{architecture}.rope.scaling.type", default="none")
    if factors.long is not None:
        return _long_rope(metadata, architecture, context, factors)
    if factors.every is not None:
        # mlx-lm's longrope multiplies each rotary period by its factor, which is what the factors in the file mean;
        # an original length equal to the context keeps it from scaling the queries and keys as well.
        return {
            "rope_type": "longrope",
            "long_factor": list(factors.every),
            "short_factor": list(factors.every),
            "original_max_position_embeddings": context,
        }
    if kind == "none":
        return None
    if kind == "linear":
        # mlx-lm's phi3 reads the one name, its other classes both.
        return {"type": "linear", "rope_type": "linear", "factor": metadata.real(f"{architecture}.rope.scaling.factor")}
    raise ImportRefused(f"rotary scaling of type {kind!r} is not supported, only none, linear and frequency factors")


def _long_rope(metadata: Metadata, architecture: str, context: int, factors: RopeFactors) -> JsonObject:
    """phi3's two sets of factors. mlx-lm uses the long ones at every length, and derives the scale of queries."""
    if factors.short is None or factors.long is None:
        raise ImportRefused("it has only one of the two sets of rotary factors")
    original = metadata.count(f"{architecture}.rope.scaling.original_context_length")
    factor = context / original
    derived = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    stated = metadata.real(f"{architecture}.rope.scaling.attn_factor", default=derived)
    if abs(stated - derived) > 1e-3:
        raise ImportRefused(f"rope.scaling.attn_factor is {stated:.4f}, but only {derived:.4f} is supported here")
    return {
        "type": "longrope",
        "rope_type": "longrope",
        "long_factor": list(factors.long),
        "short_factor": list(factors.short),
        "original_max_position_embeddings": original,
    }


def _granite(metadata: Metadata, architecture: str, dimensions: Dimensions, factors: RopeFactors) -> JsonObject:
    scale = dimensions.head_dim**-0.5
    return {
        "attention_multiplier": metadata.real(f"{architecture}.attention.scale", default=scale),
        "embedding_multiplier": metadata.real(f"{architecture}.embedding_scale", default=1.0),
        "residual_multiplier": metadata.real(f"{architecture}.residual_scale", default=1.0),
        "logits_scaling": metadata.real(f"{architecture}.logit_scale", default=1.0),
    }


def _experts(metadata: Metadata, architecture: str, dimensions: Dimensions, factors: RopeFactors) -> JsonObject:
    used = metadata.count(f"{architecture}.expert_used_count")
    if used > dimensions.experts:
        raise ImportRefused(f"a token uses {used:,} experts of {dimensions.experts:,}")
    return {
        "num_experts_per_tok": used,
        # mixtral's name, and qwen3_moe's.
        "num_local_experts": dimensions.experts,
        "num_experts": dimensions.experts,
        "moe_intermediate_size": dimensions.expert_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }


def _gemma_scale(dimensions: Dimensions, largest: int) -> int:
    """What queries are divided by the root of: no header says. Only the largest model of each series differs."""
    if dimensions.num_hidden_layers == largest:
        return dimensions.hidden_size // dimensions.num_attention_heads
    return dimensions.head_dim


def _gemma2(metadata: Metadata, architecture: str, dimensions: Dimensions, factors: RopeFactors) -> JsonObject:
    return {
        "query_pre_attn_scalar": _gemma_scale(dimensions, largest=46),
        "attn_logit_softcapping": metadata.real(f"{architecture}.attn_logit_softcapping", default=50.0),
        "final_logit_softcapping": metadata.real(f"{architecture}.final_logit_softcapping", default=30.0),
    }


def _gemma3(metadata: Metadata, architecture: str, dimensions: Dimensions, factors: RopeFactors) -> JsonObject:
    if f"{architecture}.final_logit_softcapping" in metadata:
        raise ImportRefused("its logits are capped, which mlx-lm's gemma3 does not do")
    return {
        "query_pre_attn_scalar": _gemma_scale(dimensions, largest=62),
        "sliding_window": metadata.count(f"{architecture}.attention.sliding_window"),
        # Every header of the series means six: five layers with a window, then one without.
        "sliding_window_pattern": metadata.count(f"{architecture}.attention.sliding_window_pattern", default=6),
        "rope_local_base_freq": metadata.real(f"{architecture}.rope.freq_base_swa", default=10_000.0),
    }


def _phi3(metadata: Metadata, architecture: str, dimensions: Dimensions, factors: RopeFactors) -> JsonObject:
    partial = dimensions.rotary_dim / dimensions.head_dim
    if int(dimensions.head_dim * partial) != dimensions.rotary_dim:
        raise ImportRefused(f"{dimensions.rotary_dim} of {dimensions.head_dim} values are rotated, which has no share")
    config: JsonObject = {"partial_rotary_factor": partial}
    if factors.long is not None:
        config["original_max_position_embeddings"] = metadata.count(
            f"{architecture}.rope.scaling.original_context_length"
        )
    return config


_OWN: Mapping[str, Callable[[Metadata, str, Dimensions, RopeFactors], JsonObject]] = {
    "granite": _granite,
    "mixtral": _experts,
    "qwen3_moe": _experts,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
}
