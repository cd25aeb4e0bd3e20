"""Tiny BERT and RoBERTa directories with random weights, and their forward written again in numpy; no MLX."""

import json
import math
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

Kind: TypeAlias = Literal["bert", "xlm-roberta", "bert-cross", "xlm-roberta-cross"]
Numbers: TypeAlias = npt.NDArray[np.float32]

HIDDEN, HEADS, LAYERS, WIDE, POSITIONS = 32, 4, 2, 64, 48
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "boat", "sails", "home", "a", "ship", "bread", "is", "warm", "##s")
_EPSILON = 1e-5
_TYPES = {"bert": 2, "xlm-roberta": 1}


def build_tiny_encoder(directory: Path, kind: Kind = "bert", *, pooling: str = "mean_tokens", seed: int = 0) -> Path:
    """Writes a model with sentence-transformers' files into a new directory and returns it.

    Inputs of up to 40 tokens; vectors are normalised. A cross-encoder has a head of one score.
    """
    (directory / "1_Pooling").mkdir(parents=True)
    family = kind.removesuffix("-cross")
    is_cross = family != kind
    config = {
        "model_type": family,
        "architectures": [
            {"bert": "Bert", "xlm-roberta": "XLMRoberta"}[family]
            + ("ForSequenceClassification" if is_cross else "Model")
        ],
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "intermediate_size": WIDE,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": _TYPES[family],
        "vocab_size": len(WORDS),
        "layer_norm_eps": _EPSILON,
        "hidden_act": "gelu",
        "pad_token_id": 0,
    }
    _write(directory / "config.json", config)
    kinds = ["Transformer", "Pooling", "Normalize"]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": at, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    _write(directory / "modules.json", modules)
    _write(directory / "sentence_bert_config.json", {"max_seq_length": 40, "do_lower_case": False})
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    _write(directory / "1_Pooling" / "config.json", {f"pooling_mode_{mode}": mode == pooling for mode in modes})
    _write(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    _tokenizer().save(str(directory / "tokenizer.json"))
    prefix = {"bert": "bert.", "xlm-roberta": "roberta."}[family] if is_cross else ""
    save_file(_weights(family, prefix, seed, cross=is_cross), str(directory / "model.safetensors"))
    return directory


def _tokenizer() -> Tokenizer:
    """Word pieces that were trained to be cut at 8 tokens and padded to 16, as published files often say."""
    tokenizer = Tokenizer(models.WordPiece({word: id for id, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16)
    return tokenizer


def _weights(family: str, prefix: str, seed: int, *, cross: bool) -> dict[str, Numbers]:
    random = np.random.default_rng(seed)
    found: dict[str, Numbers] = {}

    def add(name: str, *shape: int, around: float = 0.0) -> None:
        found[name] = (around + random.normal(size=shape) * 0.3).astype(np.float32)

    def norm(name: str) -> None:
        add(f"{name}.weight", HIDDEN, around=1.0)
        add(f"{name}.bias", HIDDEN)

    def linear(name: str, rows: int, columns: int) -> None:
        add(f"{name}.weight", rows, columns)
        add(f"{name}.bias", rows)

    for name, rows in (("word", len(WORDS)), ("position", POSITIONS), ("token_type", _TYPES[family])):
        add(f"{prefix}embeddings.{name}_embeddings.weight", rows, HIDDEN)
    norm(f"{prefix}embeddings.LayerNorm")
    for layer in range(LAYERS):
        at = f"{prefix}encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            linear(f"{at}.attention.self.{part}", HIDDEN, HIDDEN)
        linear(f"{at}.attention.output.dense", HIDDEN, HIDDEN)
        norm(f"{at}.attention.output.LayerNorm")
        linear(f"{at}.intermediate.dense", WIDE, HIDDEN)
        linear(f"{at}.output.dense", HIDDEN, WIDE)
        norm(f"{at}.output.LayerNorm")
    # BERT has a pooler whether or not anybody uses it.
    if family == "bert":
        linear(f"{prefix}pooler.dense", HIDDEN, HIDDEN)
    if cross and family == "bert":
        linear("classifier", 1, HIDDEN)
    elif cross:
        linear("classifier.dense", HIDDEN, HIDDEN)
        linear("classifier.out_proj", 1, HIDDEN)
    return found


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


# -- the forward, one row at a time -------------------------------------------------------------------


class Reference:
    """A published encoder computed by numpy in float64, without batches, padding or masks."""

    def __init__(self, directory: Path) -> None:
        from safetensors.numpy import load_file

        self.config = json.loads((directory / "config.json").read_text())
        weights = load_file(str(directory / "model.safetensors"))
        self._weights = {name: weight.astype(np.float64) for name, weight in weights.items()}
        bert = self.config["model_type"] == "bert"
        self._prefix = next((p for p in ("bert.", "roberta.") if any(name.startswith(p) for name in weights)), "")
        self._first = 0 if bert else self.config["pad_token_id"] + 1

    def states(self, ids: list[int], types: list[int] | None = None) -> Numbers:
        """The last hidden states (length, hidden)."""
        tables = (self._get(f"embeddings.{name}_embeddings.weight") for name in ("word", "token_type", "position"))
        words, kinds, places = tables
        kind = np.minimum(types or [0] * len(ids), len(kinds) - 1)
        x = words[ids] + kinds[kind] + places[self._first : self._first + len(ids)]
        x = self._norm(x, "embeddings.LayerNorm")
        for layer in range(self.config["num_hidden_layers"]):
            at = f"encoder.layer.{layer}"
            attended = self._linear(self._attend(x, f"{at}.attention.self"), f"{at}.attention.output.dense")
            x = self._norm(attended + x, f"{at}.attention.output.LayerNorm")
            wide = self._linear(x, f"{at}.intermediate.dense")
            wide = wide * (1 + np.vectorize(math.erf)(wide / math.sqrt(2))) / 2
            x = self._norm(self._linear(wide, f"{at}.output.dense") + x, f"{at}.output.LayerNorm")
        states: Numbers = x
        return states

    def mean(self, ids: list[int]) -> Numbers:
        """The mean of the states, of length 1."""
        vector = self.states(ids).mean(axis=0)
        unit: Numbers = vector / np.linalg.norm(vector)
        return unit

    def score(self, ids: list[int], types: list[int]) -> float:
        """A cross-encoder's score of a pair."""
        first = self.states(ids, types)[:1]
        bert = self.config["model_type"] == "bert"
        dense, output = ("pooler.dense", "classifier") if bert else ("classifier.dense", "classifier.out_proj")
        logit = self._linear(np.tanh(self._linear(first, dense)), output)[0, 0]
        return float(1 / (1 + math.exp(-logit)))

    def _get(self, name: str) -> Any:
        found = self._weights.get(self._prefix + name)
        return self._weights[name] if found is None else found

    def _linear(self, x: Any, name: str) -> Any:
        return x @ self._get(f"{name}.weight").T + self._get(f"{name}.bias")

    def _norm(self, x: Any, name: str) -> Any:
        scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + self.config["layer_norm_eps"])
        return scaled * self._get(f"{name}.weight") + self._get(f"{name}.bias")

    def _attend(self, x: Any, name: str) -> Any:
        heads = self.config["num_attention_heads"]
        width = x.shape[1] // heads
        query, key, value = (
            self._linear(x, f"{name}.{part}").reshape(len(x), heads, width).transpose(1, 0, 2)
            for part in ("query", "key", "value")
        )
        weights = np.exp(query @ key.transpose(0, 2, 1) / math.sqrt(width))
        mixed = (weights / weights.sum(-1, keepdims=True)) @ value
        return mixed.transpose(1, 0, 2).reshape(x.shape)
