"""Models made here, with random weights: ``python -m tests.load.bench.models NAME DIRECTORY``.

Run in a process of its own, since it imports MLX. Both are llamas in float32 with a byte-level BPE of their own. They
say nothing but whole words with a space in front, because the embeddings of all other tokens are zero and tied to the
output: so no answer ends early, texts can be compared without regard to how a server treats half a character, and an
answer that comes back in a chat's next turn is the same tokens again, as a trained model's is but for rare cases.
"""

import json
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.load.bench.workload import WORDS

_VOCABULARY: Final = 4096
_PAD, _START, _END = _SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# On the initial matrices, so that every logit depends on the whole prompt and equal texts are a strong statement.
_SCALE: Final = 3.0

_SYLLABLES: Final = [a + b for a, b in product("bdfgklmnprstvz", "aeiou")]


@dataclass(frozen=True, slots=True)
class Shape:
    """What makes a step cost what it costs."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int


# On two cores of a 2020s server CPU: about 0.6 ms and 3 ms a step at batch 1.
SHAPES: Final = {
    "nano": Shape(layers=2, hidden=64, intermediate=128, heads=4, kv_heads=2),
    "micro": Shape(layers=6, hidden=256, intermediate=704, heads=8, kv_heads=4),
}


def build(shape: Shape, directory: Path) -> None:
    """Writes config.json, model.safetensors and the tokenizer's files into a new directory."""
    directory.mkdir(parents=True)
    tokenizer = _train_tokenizer()
    config: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-5,
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": 8192,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.token_to_id(_START),
        "eos_token_id": tokenizer.token_to_id(_END),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    mx.save_safetensors(str(directory / "model.safetensors"), _weights(config, tokenizer), {"format": "mlx"})
    _save_tokenizer(tokenizer, directory)


def _weights(config: dict[str, Any], tokenizer: Tokenizer) -> dict[str, mx.array]:
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name, weight in weights.items():
        if weight.ndim > 1:
            weights[name] = weight * _SCALE
    sayable = [_is_word(tokenizer, token) for token in range(_VOCABULARY)]
    weights["model.embed_tokens.weight"] *= mx.array(sayable)[:, None]
    return weights


def _is_word(tokenizer: Tokenizer, token: int) -> bool:
    """True for a space, spelled "Ġ" in byte-level BPE, and letters that are read as this one token."""
    name = tokenizer.id_to_token(token) or ""
    word = name.removeprefix("Ġ")
    return word != name and word.isascii() and word.isalpha() and tokenizer.encode(f" {word}").ids == [token]


def _train_tokenizer() -> Tokenizer:
    """A byte-level BPE of exactly ``_VOCABULARY`` entries that has each of ``WORDS`` as one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    random = Random(0)
    invented = ["".join(random.choices(_SYLLABLES, k=random.randint(2, 4))) for _ in range(4000)]
    # Often enough that all their merges come before those of the invented words, which fill the rest.
    real = [*WORDS, "system", "user", "assistant"] * 200
    tokenizer.train_from_iterator([f" {word}" for word in (*real, *invented, *invented)], trainer)
    if tokenizer.get_vocab_size() != _VOCABULARY:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} entries, not {_VOCABULARY}")
    return tokenizer


def _save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": _END,
        "pad_token": _PAD,
        "unk_token": None,
        "additional_special_tokens": [_START, _END],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "chat_template": _CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


if __name__ == "__main__":
    build(SHAPES[sys.argv[1]], Path(sys.argv[2]))
