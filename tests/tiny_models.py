"""Tiny MLX model directories with random weights and a tokenizer of their own, for tests that need a real model.

Importing this module imports MLX: only tests marked ``mlx`` may. Nothing is downloaded and nothing else is read.
The weights are scaled up so that the outputs are sensitive: another prompt token moves every logit, so "the same
text" is a strong statement. What the models say has no meaning.
"""

import importlib
import json
from pathlib import Path
from typing import Any, Literal, TypeAlias

import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

Family: TypeAlias = Literal["llama", "qwen3", "gemma3_text", "qwen3_next", "mamba2"]

END_OF_TEXT, TURN_START, TURN_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Enough different words that a byte-level BPE of 512 entries finds all its merges here.
_TRAINING_TEXT = """\
The harbour town wakes before the sun. Fishermen carry their nets along the quay, and the bakery on the corner fills
the narrow street with the smell of warm bread. Children run past the old lighthouse on their way to school; their
teacher, who has lived here all her life, knows every one of them by name. In winter the wind comes from the north
and the boats stay in the harbour. Then people sit together in the kitchen, mend what was broken, and tell stories
about storms, whales and distant countries. What is the capital of France? The capital of France is Paris. How many
days are there in a week? There are seven days in a week, and twelve months in a year. Water boils at one hundred
degrees; ice melts at zero. def area(width, height): return width * height. for number in range(10): print(number)
A model reads a prompt, thinks about every token and writes its answer one token after another. When the answer is
finished it says so, and the next question may come. system user assistant You are a helpful assistant.
"""

# Every family: two layers of 64, so that a step costs well under a millisecond.
_SHARED: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}

# What a family adds, and the factor on its matrices that makes its outputs sensitive without overflow.
_FAMILIES: dict[Family, tuple[dict[str, Any], float]] = {
    "llama": ({}, 3.0),
    "qwen3": ({}, 3.0),
    # One sliding-window layer (64 tokens) and one full layer.
    "gemma3_text": (
        {
            "query_pre_attn_scalar": 16,
            "rope_local_base_freq": 10000.0,
            "sliding_window": 64,
            "sliding_window_pattern": 2,
        },
        3.0,
    ),
    # One linear-attention layer and one full layer, dense.
    "qwen3_next": (
        {
            "full_attention_interval": 2,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_conv_kernel_dim": 4,
            "partial_rotary_factor": 0.5,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [0, 1],
            "num_experts": 0,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
        2.0,
    ),
    "mamba2": (
        {
            "num_heads": 4,
            "head_dim": 32,
            "state_size": 16,
            "conv_kernel": 4,
            "n_groups": 1,
            "use_bias": False,
            "use_conv_bias": True,
            "layer_norm_epsilon": 1e-5,
            "time_step_limit": [0.0, 1e9],
            "time_step_rank": "auto",
        },
        2.0,
    ),
}

# A state-space layer forgets a token by exp(-softplus(step) * A) a token, A = 1 in the slowest head. As initialised (1)
# a token is gone after ten more; at -4 half of it is left after forty, so that outputs depend on the whole prompt.
_STATE_STEP = -4.0


def build_tiny_model(
    directory: Path, family: Family, *, vocab_size: int = 512, seed: int = 0, head_dim: int | None = None
) -> Path:
    """Writes config.json, model.safetensors and the tokenizer's files into a new directory and returns it.

    The weights are float32 and depend only on the family, the size and the seed. ``vocab_size`` is the model's; the
    tokenizer has up to 512 entries, so a model with more may say tokens that have no text. ``head_dim`` None leaves
    the family's.
    """
    directory.mkdir(parents=True)
    tokenizer = _train_tokenizer(min(vocab_size, 512))
    own, scale = _FAMILIES[family]
    config = {
        "model_type": family,
        **_SHARED,
        **own,
        **({} if head_dim is None else {"head_dim": head_dim}),
        "vocab_size": vocab_size,
        "bos_token_id": tokenizer.token_to_id(TURN_START),
        "eos_token_id": tokenizer.token_to_id(TURN_END),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    mx.save_safetensors(str(directory / "model.safetensors"), _weights(config, scale, seed), {"format": "mlx"})
    _save_tokenizer(tokenizer, directory)
    return directory


def build_sized_model(directory: Path, hidden: int, layers: int, *, bits: int | None = None, shards: int = 1) -> Path:
    """Writes a llama of ``layers`` times 16 ``hidden`` squared random weights, and returns the new directory.

    float16, or quantised to ``bits`` (4, 8), in as many files. For questions of size; its words mean nothing.
    """
    from mlx_lm.utils import quantize_model

    directory.mkdir(parents=True)
    tokenizer = _train_tokenizer(512)
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "head_dim": 64}
    size = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    names = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": tokenizer.token_to_id(TURN_END)}
    config: dict[str, Any] = {"model_type": "llama", **_SHARED, **heads, **size, **names}
    architecture = importlib.import_module("mlx_lm.models.llama")
    mx.random.seed(0)
    model = architecture.Model(architecture.ModelArgs.from_dict(config))
    model.set_dtype(mx.float16)
    if bits is not None:
        model, config = quantize_model(model, config, 64, bits)
    named = sorted(dict(tree_flatten(model.parameters())).items())
    for shard in range(shards):
        name = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mx.save_safetensors(str(directory / name), dict(named[shard::shards]), {"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(config))
    _save_tokenizer(tokenizer, directory)
    return directory


def _weights(config: dict[str, Any], scale: float, seed: int) -> dict[str, mx.array]:
    architecture = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(seed)
    model = architecture.Model(architecture.ModelArgs.from_dict(config))
    weights = dict(tree_flatten(model.parameters()))
    for name, weight in weights.items():
        if weight.ndim > 1:
            weights[name] = weight * scale
        elif name.endswith("dt_bias"):
            weights[name] = mx.full(weight.shape, _STATE_STEP)
    return weights


def _train_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE: every text has tokens and every text comes back from them exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINING_TEXT.splitlines(keepends=True), trainer)
    return tokenizer


def _save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "additional_special_tokens": [TURN_START, TURN_END],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
