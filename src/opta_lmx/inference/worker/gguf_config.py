"""A GGUF file's metadata with checked types, and the config.json that a llama-family model needs from it."""

import math
from collections.abc import Mapping, Sequence
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
    """The sizes that fix every tensor's shape, under the names of config.json."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def of(cls, metadata: Metadata, architecture: str, vocab_size: int) -> "Dimensions":
        """Raises ImportRefused for what mlx-lm's llama cannot express: per-layer sizes, partly rotated heads."""
        hidden = metadata.count(f"{architecture}.embedding_length")
        heads = metadata.count(f"{architecture}.attention.head_count")
        head_dim = metadata.count(f"{architecture}.attention.key_length", default=max(hidden // heads, 1))
        kv_heads = metadata.count(f"{architecture}.attention.head_count_kv", default=heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            size = metadata.count(f"{architecture}.{key}", default=head_dim)
            if size != head_dim:
                raise ImportRefused(f"{key} is {size} but a head has {head_dim} values")
        if heads % kv_heads or head_dim % 2:
            raise ImportRefused(f"{heads} heads of {head_dim} values cannot share {kv_heads} key-value heads")
        return cls(
            hidden_size=hidden,
            num_hidden_layers=metadata.count(f"{architecture}.block_count"),
            intermediate_size=metadata.count(f"{architecture}.feed_forward_length"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=vocab_size,
        )


def model_config(
    metadata: Metadata, architecture: str, dimensions: Dimensions, rope_factors: Sequence[float] | None
) -> JsonObject:
    """config.json without its quantization table and token ids.

    ``rope_factors`` are the divisors of the rotary frequencies (the tensor rope_freqs.weight), one for each pair
    of values in a head.
    """
    context = metadata.count(f"{architecture}.context_length")
    config: JsonObject = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": metadata.real(f"{architecture}.attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.real(f"{architecture}.rope.freq_base", default=10_000.0),
    }
    for name in Dimensions.__slots__:
        config[name] = getattr(dimensions, name)
    scaling = _rope_scaling(metadata, architecture, context, rope_factors)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config


def _rope_scaling(
    metadata: Metadata, architecture: str, context: int, factors: Sequence[float] | None
) -> JsonObject | None:
    kind = metadata.text(f"{architecture}.rope.scaling.type", default="none")
    if factors is not None:
        # mlx-lm's longrope multiplies each rotary period by its factor, which is what the factors in the file mean;
        # an original length equal to the context keeps it from scaling the queries and keys as well.
        return {
            "rope_type": "longrope",
            "long_factor": list(factors),
            "short_factor": list(factors),
            "original_max_position_embeddings": context,
        }
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": metadata.real(f"{architecture}.rope.scaling.factor")}
    raise ImportRefused(f"rotary scaling of type {kind!r} is not supported, only none, linear and frequency factors")
