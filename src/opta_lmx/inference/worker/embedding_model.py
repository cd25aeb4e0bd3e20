"""The forward of BERT and RoBERTa encoders in MLX, with the tensor names that their authors publish.

BERT: Devlin et al. 2018, post-norm. RoBERTa differs in where its positions begin and in its classification head.
"""

from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from opta_lmx.types import JsonObject

# model_type -> the prefix of its tensors in checkpoints that have a head.
PREFIXES = {"bert": "bert.", "roberta": "roberta.", "xlm-roberta": "roberta."}

_ACTIVATIONS = {"gelu": nn.gelu, "gelu_new": nn.gelu_approx, "gelu_pytorch_tanh": nn.gelu_approx, "relu": nn.relu}

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


class _Embeddings(nn.Module):
    """Word, position and type of each token, summed and normalised."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(shape.vocab_size, shape.hidden)
        self.position_embeddings = nn.Embedding(shape.positions, shape.hidden)
        self.token_type_embeddings = nn.Embedding(shape.types, shape.hidden)
        self.LayerNorm = nn.LayerNorm(shape.hidden, eps=shape.epsilon)
        self._first_position = shape.first_position

    def __call__(self, ids: mx.array, types: mx.array) -> mx.array:
        positions = mx.arange(self._first_position, self._first_position + ids.shape[1])
        summed = self.word_embeddings(ids) + self.token_type_embeddings(types) + self.position_embeddings(positions)
        return self.LayerNorm(summed)


class _Heads(nn.Module):
    """Attention of every token to every token that is not padding."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.query = nn.Linear(shape.hidden, shape.hidden)
        self.key = nn.Linear(shape.hidden, shape.hidden)
        self.value = nn.Linear(shape.hidden, shape.hidden)
        self._heads = shape.heads

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        rows, length, width = x.shape
        per_head = (rows, length, self._heads, width // self._heads)
        query, key, value = (
            project(x).reshape(per_head).transpose(0, 2, 1, 3) for project in (self.query, self.key, self.value)
        )
        scale = (width // self._heads) ** -0.5
        mixed = mx.fast.scaled_dot_product_attention(query, key, value, scale=scale, mask=mask[:, None, None, :])
        return mixed.transpose(0, 2, 1, 3).reshape(rows, length, width)


class _Added(nn.Module):
    """A projection, added to what went into its block, and normalised."""

    def __init__(self, shape: EncoderShape, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, shape.hidden)
        self.LayerNorm = nn.LayerNorm(shape.hidden, eps=shape.epsilon)

    def __call__(self, x: mx.array, before: mx.array) -> mx.array:
        return self.LayerNorm(self.dense(x) + before)


class _Attention(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.self = _Heads(shape)
        self.output = _Added(shape, shape.hidden)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        return self.output(self.self(x, mask), x)


class _Intermediate(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.dense = nn.Linear(shape.hidden, shape.intermediate)
        self._activate = _ACTIVATIONS[shape.activation]

    def __call__(self, x: mx.array) -> mx.array:
        return self._activate(self.dense(x))


class _Layer(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.attention = _Attention(shape)
        self.intermediate = _Intermediate(shape)
        self.output = _Added(shape, shape.intermediate)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        attended = self.attention(x, mask)
        return self.output(self.intermediate(attended), attended)


class _Layers(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.layer = [_Layer(shape) for _ in range(shape.layers)]

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        for layer in self.layer:
            x = layer(x, mask)
        return x


class _Dense(nn.Module):
    """BERT's pooler: the first token, projected."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.dense = nn.Linear(shape.hidden, shape.hidden)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.tanh(self.dense(x))


class _RobertaHead(_Dense):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__(shape)
        self.out_proj = nn.Linear(shape.hidden, 1)

    def __call__(self, x: mx.array) -> mx.array:
        return self.out_proj(super().__call__(x))


class Encoder(nn.Module):
    """The layers, and the head of a cross-encoder where there is one."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.embeddings = _Embeddings(shape)
        self.encoder = _Layers(shape)
        if shape.head == "bert":
            self.pooler = _Dense(shape)
            self.classifier = nn.Linear(shape.hidden, 1)
        elif shape.head == "roberta":
            self.classifier = _RobertaHead(shape)
        self._head = shape.head

    def __call__(self, ids: mx.array, types: mx.array, mask: mx.array) -> mx.array:
        """The last hidden states (rows, length, hidden). ``mask`` is False for padding, which comes at the end."""
        return self.encoder(self.embeddings(ids, types), mask)

    def scores(self, ids: mx.array, types: mx.array, mask: mx.array) -> mx.array:
        """A cross-encoder's logit for each row."""
        first = self(ids, types, mask)[:, 0]
        return self.classifier(self.pooler(first) if self._head == "bert" else first)[:, 0]


def checkpoint_names(model: Any, prefix: str, weights: dict[str, mx.array]) -> list[tuple[str, mx.array]]:
    """The tensors of a checkpoint that ``model`` has, under the model's own names."""
    wanted = dict(tree_flatten(model.parameters()))
    named = []
    for name, weight in weights.items():
        own = name.removeprefix(prefix)
        for old, new in _OLD_NAMES.items():
            own = own.replace(old, new)
        if own in wanted:
            named.append((own, weight))
    return named
