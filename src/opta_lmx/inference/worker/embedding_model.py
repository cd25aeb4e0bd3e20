"""The forward of BERT and RoBERTa encoders in MLX, with the tensor names that their authors publish.

BERT: Devlin et al. 2018, post-norm. RoBERTa differs in where its positions begin and in its classification head.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from opta_lmx.types import JsonObject

# model_type -> the prefix of its tensors in checkpoints that have a head.
PREFIXES = {"bert": "bert.", "roberta": "roberta.", "xlm-roberta": "roberta."}


def _gelu(x: mx.array) -> mx.array:
    return x * (1 + mx.erf(x / math.sqrt(2))) / 2


def _gelu_tanh(x: mx.array) -> mx.array:
    return x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


_ACTIVATIONS: Mapping[str, Callable[[mx.array], mx.array]] = {
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": lambda x: mx.maximum(x, 0),
}

_EMBEDDINGS = ("word", "token_type", "position")
_ATTENTION = ("query", "key", "value")

# The two projections of a cross-encoder's head, with tanh between them.
_HEADS = {"bert": ("pooler.dense", "classifier"), "roberta": ("classifier.dense", "classifier.out_proj")}

# LayerNorm's names in checkpoints that came from TensorFlow.
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """What config.json says of an encoder. ``first_position`` is 0, RoBERTa's is past its padding token's id."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocab_size: int
    positions: int
    types: int
    epsilon: float
    activation: str
    first_position: int
    head: Literal["none", "bert", "roberta"]

    @property
    def longest(self) -> int:
        """Most tokens of one input."""
        return self.positions - self.first_position


def read_shape(config: JsonObject) -> EncoderShape:
    """The shape in a config.json; raises KeyError for what is missing, ValueError for what is not supported."""
    model_type = config["model_type"]
    if model_type not in PREFIXES:
        raise ValueError(f"encoders of type {model_type!r} are not supported")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"position embeddings of type {config['position_embedding_type']!r} are not supported")
    if config.get("hidden_act", "gelu") not in _ACTIVATIONS:
        raise ValueError(f"the activation {config['hidden_act']!r} is not supported")
    if config.get("quantization") is not None:
        raise ValueError("quantised encoders are not supported")
    is_bert = model_type == "bert"
    return EncoderShape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        intermediate=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        positions=config["max_position_embeddings"],
        types=config["type_vocab_size"],
        epsilon=config.get("layer_norm_eps", 1e-12),
        activation=config.get("hidden_act", "gelu"),
        first_position=0 if is_bert else config.get("pad_token_id", 1) + 1,
        head=("bert" if is_bert else "roberta") if _classifies(config) else "none",
    )


def _classifies(config: JsonObject) -> bool:
    return any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ())


class Encoder:
    """An encoder's tensors and its forward."""

    def __init__(self, shape: EncoderShape, weights: Mapping[str, mx.array], prefix: str = "") -> None:
        """``weights`` are a checkpoint's, those of other heads included; ``prefix`` may precede their names.

        Raises ValueError for a tensor that is missing or not of the shape that config.json gives it.
        """
        self._shape = shape
        self._weights = _named(shape, weights, prefix)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(weight.nbytes for weight in self._weights.values())

    def states(self, ids: mx.array, types: mx.array, mask: mx.array) -> mx.array:
        """The last hidden states (rows, length, hidden). ``mask`` is False for padding, which comes at the end."""
        x = self._embed(ids, types)
        for number in range(self._shape.layers):
            layer = f"encoder.layer.{number}"
            attended = self._linear(self._attend(x, mask, f"{layer}.attention.self"), f"{layer}.attention.output.dense")
            x = self._norm(attended + x, f"{layer}.attention.output.LayerNorm")
            widened = _ACTIVATIONS[self._shape.activation](self._linear(x, f"{layer}.intermediate.dense"))
            x = self._norm(self._linear(widened, f"{layer}.output.dense") + x, f"{layer}.output.LayerNorm")
        return x

    def scores(self, ids: mx.array, types: mx.array, mask: mx.array) -> mx.array:
        """A cross-encoder's logit for each row, which its head makes of the first token."""
        dense, output = _HEADS[self._shape.head]
        first = self.states(ids, types, mask)[:, 0]
        return self._linear(mx.tanh(self._linear(first, dense)), output)[:, 0]

    def _embed(self, ids: mx.array, types: mx.array) -> mx.array:
        words, kinds, places = (self._weights[f"embeddings.{name}_embeddings.weight"] for name in _EMBEDDINGS)
        begin = self._shape.first_position
        # RoBERTa has one type for both texts of a pair, whatever its tokenizer says.
        types = mx.minimum(types, self._shape.types - 1)
        return self._norm(words[ids] + kinds[types] + places[begin : begin + ids.shape[1]], "embeddings.LayerNorm")

    def _attend(self, x: mx.array, mask: mx.array, name: str) -> mx.array:
        """Every token looks at every token that is not padding."""
        rows, length, width = x.shape
        per_head = (rows, length, self._shape.heads, width // self._shape.heads)
        query, key, value = (
            self._linear(x, f"{name}.{part}").reshape(per_head).transpose(0, 2, 1, 3) for part in _ATTENTION
        )
        scale = per_head[-1] ** -0.5
        mixed = mx.fast.scaled_dot_product_attention(query, key, value, scale=scale, mask=mask[:, None, None, :])
        return mixed.transpose(0, 2, 1, 3).reshape(rows, length, width)

    def _linear(self, x: mx.array, name: str) -> mx.array:
        return mx.addmm(self._weights[f"{name}.bias"], x, self._weights[f"{name}.weight"].T)

    def _norm(self, x: mx.array, name: str) -> mx.array:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return mx.fast.layer_norm(x, weight, bias, self._shape.epsilon)


def _named(shape: EncoderShape, weights: Mapping[str, mx.array], prefix: str) -> dict[str, mx.array]:
    """The tensors the forward uses, under their names without prefix."""
    given = {}
    for name, weight in weights.items():
        own = name.removeprefix(prefix)
        for old, new in _OLD_NAMES.items():
            own = own.replace(old, new)
        given[own] = weight
    expected = _expected(shape)
    for name, dimensions in expected.items():
        if name not in given:
            raise ValueError(f"the tensor {name} is missing")
        if given[name].shape != dimensions:
            raise ValueError(f"the tensor {name} has the shape {given[name].shape}, not {dimensions}")
    return {name: given[name] for name in expected}


def _expected(shape: EncoderShape) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor the forward uses, by name."""
    hidden, wide = shape.hidden, shape.intermediate
    counts = (shape.vocab_size, shape.types, shape.positions)
    tables = {
        f"embeddings.{name}_embeddings.weight": (rows, hidden) for name, rows in zip(_EMBEDDINGS, counts, strict=True)
    }
    norms = ["embeddings.LayerNorm"]
    linears: dict[str, tuple[int, int]] = {}
    for number in range(shape.layers):
        layer = f"encoder.layer.{number}"
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
        linears |= {f"{layer}.attention.self.{part}": (hidden, hidden) for part in _ATTENTION}
        linears[f"{layer}.attention.output.dense"] = (hidden, hidden)
        linears[f"{layer}.intermediate.dense"] = (wide, hidden)
        linears[f"{layer}.output.dense"] = (hidden, wide)
    if shape.head in _HEADS:
        dense, output = _HEADS[shape.head]
        linears |= {dense: (hidden, hidden), output: (1, hidden)}
    expected: dict[str, tuple[int, ...]] = dict(tables)
    for name in norms:
        expected |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    for name, (rows, columns) in linears.items():
        expected |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return expected
