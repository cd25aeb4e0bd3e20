"""What an imported GGUF computes is what the original computes; the starter, imported by the real job, answers."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from opta_lmx.config_models import ModelsConfig
from opta_lmx.inference.worker.convert import Form, convert
from opta_lmx.manager.integrity import ModelsLock, Verdict
from opta_lmx.manager.model import ModelManager
from opta_lmx.manager.starter import STARTER_ID, StarterModel, starter_files
from opta_lmx.types import ModelFiles
from tests.gguf_files import Weights, byte_level_vocabulary, pack_q6_k, random_weights, write_gguf, write_llama


@pytest.fixture(scope="session")
def starter(tmp_path_factory: pytest.TempPathFactory) -> StarterModel:
    found = starter_files(ModelsConfig(models_directory=str(tmp_path_factory.mktemp("starter"))))
    assert found is not None
    return found


@pytest.fixture(scope="session")
def imported(starter: StarterModel) -> ModelFiles:
    """The starter, imported once for all tests by three callers at the same time."""
    models = ModelManager(ModelsConfig(models_directory=str(starter.target.parent)))

    async def ensure() -> list[ModelFiles]:
        return await asyncio.gather(*(models.ensure_local(STARTER_ID) for _ in range(3)))

    first, *others = asyncio.run(ensure())
    assert others == [first, first]
    assert models.find(STARTER_ID) == first
    return first


@pytest.fixture(scope="session")
def original(starter: StarterModel) -> gguf.GGUFReader:
    """The starter's file as the format's own package reads it."""
    return gguf.GGUFReader(starter.gguf)


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# -- the starter ---------------------------------------------------------------------------------------


def test_the_import_is_listed_verified_and_whole(imported: ModelFiles, starter: StarterModel) -> None:
    """An MLX directory with every file in models.lock, exact sizes, and nothing else in the models directory."""
    assert (imported.path, imported.format, imported.verified) == (starter.target, "mlx", True)
    assert (imported.context_length, imported.layers, imported.kv_heads, imported.head_dim) == (8192, 30, 3, 64)
    assert imported.weights_bytes < imported.size_bytes < 120_000_000
    assert names_in(starter.target.parent) == {STARTER_ID, "models.lock"}
    verdicts = ModelsLock(starter.target.parent).verify(STARTER_ID, starter.target, full=True)
    assert verdicts == dict.fromkeys(names_in(starter.target), Verdict.VERIFIED)


@pytest.mark.mlx
def test_the_starter_answers(imported: ModelFiles) -> None:
    """Greedy decoding of the chat template's prompt gives the sentence that the original gives."""
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(imported.path))[:2]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    assert tokenizer.eos_token_ids == {2}
    assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=12) == "The capital of France is Paris."


@pytest.mark.mlx
def test_its_logits_are_the_originals(imported: ModelFiles, original: gguf.GGUFReader) -> None:
    """A float32 model of the dequantised original has the same logits, within the rounding of sums.

    Weights are bit for bit equal and both sides compute in float32; only the order of additions differs.
    """
    import mlx.core as mx
    import mlx_lm

    weights = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in original.tensors}
    config = json.loads((imported.path / "config.json").read_text())
    oracle = dense_llama(config, {name: to_mlx(name, weight, 9, 3) for name, weight in weights.items()})
    model = mlx_lm.load(str(imported.path))[0]
    tokens = mx.array([[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198]])
    expected, found = np.array(oracle(tokens)[0]), np.array(model(tokens)[0])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)
    np.testing.assert_array_equal(found.argmax(axis=1), expected.argmax(axis=1))


# Written for this test; short, because a CPU needs a tenth of a second for every token of it.
PROSE = (
    "The ferry left the harbour a little after six, when the lamps along the quay were still burning. An old woman "
    "with a basket of bread sat near the window and watched the town grow small."
)


@pytest.mark.mlx
def test_eight_bits_keep_the_perplexity(imported: ModelFiles, original: gguf.GGUFReader, tmp_path: Path) -> None:
    """The starter with ten of its matrices in a type that MLX cannot hold: within one percent once imported.

    Held against a float32 model of the file's own dequantised values, on a text of this test; 45.03 became 45.18.
    """
    import mlx_lm

    replaced = {f"blk.{layer}.ffn_down.weight" for layer in range(0, 30, 3)}
    tensors, dense = [], []
    for tensor in original.tensors:
        stored, kind = tensor.data, tensor.tensor_type
        if tensor.name in replaced:
            stored, kind = pack_q6_k(gguf.quants.dequantize(stored, kind)), Kind.Q6_K
        tensors.append((tensor.name, stored, kind))
        dense.append(to_mlx(tensor.name, gguf.quants.dequantize(stored, kind), 9, 3))
    keys = {
        name: field.contents()
        for name, field in original.fields.items()
        if not name.startswith("GGUF.") and name != "general.architecture"
    }
    write_gguf(tmp_path / "m.gguf", keys, tensors)
    convert(tmp_path / "m.gguf", tmp_path / "out", Form("full"), progress=lambda done, total: None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["model.layers.0.mlp.down_proj"] == {"group_size": 64, "bits": 8}
    model, tokenizer = mlx_lm.load(str(tmp_path / "out"))[:2]
    ids = tokenizer.encode(PROSE)
    expected = perplexity(dense_llama(config, dict(dense)), ids)
    found = perplexity(model, ids)
    assert 20 < expected < 60
    assert found == pytest.approx(expected, rel=0.01)


def perplexity(model: Any, ids: list[int]) -> float:
    """Of every token after those before it."""
    import mlx.core as mx
    from mlx import nn

    logits = model(mx.array([ids[:-1]])).astype(mx.float32)
    loss = nn.losses.cross_entropy(logits, mx.array([ids[1:]]), reduction="mean")
    return float(np.exp(np.array(loss)))


MIXED_TEXTS = [
    "What is the capital of France?",
    "It's 12345 o'clock -- don't stop!\n\n  ok",
    "def f(x):\n\treturn x ** 2  # 3.14\n",
    "naïve café 你好世界 🙂👨‍👩‍👧 ½² ﷺ",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "   leading and trailing   ",
    "",
]


def test_its_token_ids_are_the_files(imported: ModelFiles, original: gguf.GGUFReader) -> None:
    """The ids are those of a tokenizer made from the same vocabulary by the library's own parts, and come back."""
    fields = original.fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    oracle = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges))
    oracle.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    oracle.decoder = decoders.ByteLevel()
    oracle.add_special_tokens([token for token in tokens if token.startswith("<|")])
    tokenizer = Tokenizer.from_file(str(imported.path / "tokenizer.json"))
    for text in MIXED_TEXTS:
        ids = tokenizer.encode(text).ids
        assert ids == oracle.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode("<|im_start|>user\nWhat is 42?<|im_end|>").ids == KNOWN_IDS
    assert [tokens[id] for id in KNOWN_IDS] == KNOWN_TOKENS


KNOWN_TOKENS = ["<|im_start|>", "user", "Ċ", "What", "Ġis", "Ġ", "4", "2", "?", "<|im_end|>"]
KNOWN_IDS = [1, 4093, 198, 1780, 314, 216, 36, 34, 47, 2]


# -- arithmetic ----------------------------------------------------------------------------------------


def to_mlx(name: str, weight: NDArray[Any], heads: int, kv_heads: int) -> tuple[str, NDArray[Any]]:
    """mlx-lm's name and row order of a tensor of a GGUF file, spelled out apart from the code under test."""
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    *layer, short, _ = name.split(".")
    prefix = f"model.layers.{layer[1]}." if layer else ""
    if short in ("attn_q", "attn_k"):
        pairs = weight.reshape(heads if short == "attn_q" else kv_heads, -1, 2, weight.shape[-1])
        weight = np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(weight.shape)
    return f"{prefix}{names[short]}.weight", weight


def dense_llama(config: Mapping[str, Any], weights: Mapping[str, Any]) -> Any:
    """mlx-lm's llama in float32 with these weights; values may be (name, array) pairs by their old names."""
    import mlx.core as mx
    from mlx_lm.models import llama

    model = llama.Model(llama.ModelArgs.from_dict(dict(config)))
    pairs = [value if isinstance(value, tuple) else (name, value) for name, value in weights.items()]
    model.load_weights([(name, mx.array(np.array(array, np.float32))) for name, array in pairs], strict=True)
    return model


def with_biases(weights: Weights) -> Weights:
    rng = np.random.default_rng(5)
    rows = {name: len(weight) for name, weight in weights.items() if "self_attn" in name}
    biases = {name.replace("weight", "bias"): rng.normal(0, 1, n).astype(np.float32) for name, n in rows.items()}
    return weights | biases


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def llama3_factors() -> NDArray[np.float32]:
    """What llama.cpp's converter writes to rope_freqs.weight for LLAMA3 at the tiny model's head size."""
    frequencies = 1 / 10_000.0 ** (np.arange(0, 32, 2) / 32)
    wavelengths = 2 * np.pi / frequencies
    smooth = (64 / wavelengths - 1.0) / (4.0 - 1.0)
    medium = 1 / ((1 - smooth) / 8.0 + smooth)
    factors = np.where(wavelengths < 64 / 4.0, 1.0, np.where(wavelengths > 64 / 1.0, 8.0, medium))
    return factors.astype(np.float32)


# Name: the type of the matrices, keys of the header, keys of the oracle's config.
VARIANTS: dict[str, tuple[Kind, dict[str, Any], dict[str, Any]]] = {
    **{kind.name: (kind, {}, {}) for kind in (Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q8_0)},
    "untied": (Kind.Q8_0, {}, {"tie_word_embeddings": False}),
    "biases": (Kind.Q4_0, {}, {"attention_bias": True}),
    "linear": (
        Kind.F16,
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "llama3": (Kind.Q4_1, {}, {"rope_scaling": LLAMA3}),
}


@pytest.mark.mlx
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_the_originals(variant: str, tmp_path: Path) -> None:
    """Every type and every variant of the architecture computes what mlx-lm computes from the original weights.

    Both sides compute in float32 from equal numbers; the tolerance is for another order of additions.
    """
    import mlx.core as mx
    from mlx_lm.utils import load_model

    kind, changes, config = VARIANTS[variant]
    vocabulary = byte_level_vocabulary()
    weights = random_weights(len(vocabulary.tokens), tied=variant != "untied")
    weights = with_biases(weights) if variant == "biases" else weights
    factors = llama3_factors() if variant == "llama3" else None
    dense = write_llama(tmp_path / "m.gguf", weights, vocabulary, kind, changes, factors)
    convert(tmp_path / "m.gguf", tmp_path / "out", Form("full"), progress=lambda done, total: None)
    model, found_config = load_model(tmp_path / "out")
    oracle = dense_llama({**TINY, "vocab_size": len(vocabulary.tokens), **config}, dense)
    tokens = mx.array([np.random.default_rng(1).integers(4, len(vocabulary.tokens), 100).tolist()])
    expected, found = np.array(oracle(tokens)), np.array(model(tokens))
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    assert found_config["eos_token_id"] == [2]


@pytest.mark.mlx
def test_half_precision_computes_nearly_the_same(tmp_path: Path) -> None:
    """The form for Metal, 16-bit floats throughout, stays near the float32 model; logits reach 5.

    MLX computes 8-bit values in float16, where scale * q is rounded to 11 bits before the bias is added.
    """
    import mlx.core as mx
    from mlx_lm.utils import load_model

    vocabulary = byte_level_vocabulary()
    dense = write_llama(tmp_path / "m.gguf", random_weights(len(vocabulary.tokens)), vocabulary, Kind.Q8_0)
    convert(tmp_path / "m.gguf", tmp_path / "out", Form("half"), progress=lambda done, total: None)
    model = load_model(tmp_path / "out")[0]
    tokens = mx.array([[5, 80, 17, 9, 200, 31]])
    found = model(tokens)
    assert found.dtype == mx.float16
    oracle = dense_llama({**TINY, "vocab_size": len(vocabulary.tokens)}, dense)
    np.testing.assert_allclose(np.array(found.astype(mx.float32)), np.array(oracle(tokens)), atol=5e-2, rtol=0)


TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}


@pytest.mark.mlx
@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0])
def test_mlx_dequantises_what_gguf_does(kind: Kind, tmp_path: Path) -> None:
    """mx.dequantize of every imported matrix equals gguf.quants bit for bit in float32."""
    import mlx.core as mx

    vocabulary = byte_level_vocabulary()
    dense = write_llama(tmp_path / "m.gguf", random_weights(len(vocabulary.tokens)), vocabulary, kind)
    convert(tmp_path / "m.gguf", tmp_path / "out", Form("full"), progress=lambda done, total: None)
    weights: Any = mx.load(str(tmp_path / "out" / "model.safetensors"))
    for name, expected in dense.items():
        if expected.ndim == 2:
            scales, biases = (weights[name.replace("weight", part)] for part in ("scales", "biases"))
            bits = 8 if kind is Kind.Q8_0 else 4
            found = mx.dequantize(weights[name], scales, biases, group_size=32, bits=bits)
            assert found.dtype == mx.float32
            np.testing.assert_array_equal(np.array(found), expected)
