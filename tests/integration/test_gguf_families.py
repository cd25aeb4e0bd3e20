"""Every family and every type of a GGUF file computes, once imported, what mlx-lm computes from the same numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from opta_lmx.inference.worker import gguf_blocks
from opta_lmx.inference.worker.convert import Form, convert
from opta_lmx.inference.worker.gguf_config import ImportRefused
from opta_lmx.inference.worker.gguf_families import FAMILIES
from opta_lmx.manager.catalog import describe, list_directory
from opta_lmx.manager.gguf import inspect
from opta_lmx.manager.gguf_size import ImportForm
from opta_lmx.manager.memory import LoadNeed, load_need
from tests.gguf_files import Vocabulary, byte_level_vocabulary

pytestmark = pytest.mark.mlx

# Long enough to leave gemma3's window of 16 tokens.
TEXT = (
    "In the winter the boats stay in the harbour. Then people sit together in the kitchen, mend what was broken, "
    "and tell stories about storms, whales and distant countries; the wind comes from the north."
)
# Columns that blocks of 256 values divide.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return byte_level_vocabulary()


def tokens(vocabulary: Vocabulary) -> list[int]:
    """The text, a byte a token."""
    return [vocabulary.tokens.index(character.replace(" ", "\u0120")) for character in TEXT]


def logits(model: Any, ids: list[int]) -> Any:
    import mlx.core as mx

    return np.array(model(mx.array([ids])).astype(mx.float32))[0]


def perplexity(scores: Any, ids: list[int]) -> float:
    """Of every token after those before it."""
    scores = scores[:-1].astype(np.float64)
    shifted = scores - scores.max(axis=1, keepdims=True)
    likelihoods = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return float(np.exp(-likelihoods[np.arange(len(ids) - 1), ids[1:]].mean()))


def difference(found: Any, expected: Any) -> float:
    """Root mean square of the difference, as a share of what was expected."""
    return float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))


def imported(source: Path, form: Form) -> Any:
    """The model that mlx-lm loads from the import."""
    from mlx_lm.utils import load_model

    inspect(source)
    convert(source, source.parent / "out", form, progress=lambda done, total: None)
    return load_model(source.parent / "out")[0]


def cases() -> tuple[str, ...]:
    """Named here, because the module that describes them imports MLX."""
    return (
        *("llama", "mixtral", "smollm3", "granite", "qwen2", "qwen2-tied", "qwen3", "qwen3moe"),
        *("gemma", "gemma2", "gemma3", "phi3", "phi3-long"),
    )


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q5_0])
def test_logits_are_the_originals(name: str, kind: Kind, tmp_path: Path, vocabulary: Vocabulary) -> None:
    """Tensors, names, orders, norms, rotary embedding and every number of config.json are right for each family.

    The import's weights are bit for bit those of the file, and both sides compute in float32.
    """
    from tests.gguf_families import CASES, original, write_case

    case = CASES[name]
    held = write_case(tmp_path / "m.gguf", case, vocabulary, kind)
    ids = tokens(vocabulary)
    expected = logits(original(case.whole_config(len(vocabulary.tokens)), held), ids)
    np.testing.assert_allclose(logits(imported(tmp_path / "m.gguf", Form("full")), ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("full", [True, False])
def test_the_need_is_known_before_the_import(name: str, full: bool, tmp_path: Path, vocabulary: Vocabulary) -> None:
    """Weights, KV and tokenizer of each family, experts and rotary factors included, are those of its import."""
    from tests.gguf_families import CASES, write_case

    source, out = tmp_path / "model" / "m.gguf", tmp_path / "out"
    source.parent.mkdir()
    write_case(source, CASES[name], vocabulary, Kind.IQ4_NL)
    form = ImportForm(6, full)

    def need(directory: Path) -> LoadNeed:
        return load_need(describe("m", directory, list_directory(directory, directory.resolve()), form), None, 0.1)

    before = need(source.parent)
    convert(source, out, Form("full" if full else "half", 6), progress=lambda done, total: None)
    assert before == need(out)


def test_every_family_has_a_case() -> None:
    """None can be added without a model that is compared with mlx-lm's."""
    from tests.gguf_families import CASES

    assert tuple(CASES) == cases()
    assert {case.architecture for case in CASES.values()} == FAMILIES.keys()


@pytest.mark.parametrize("kind", sorted(gguf_blocks.EXACT.keys() | gguf_blocks.DEQUANTIZED))
def test_every_type_says_what_its_values_say(kind: str, tmp_path: Path, vocabulary: Vocabulary) -> None:
    """Types that MLX can hold give equal logits; eight bits for the others change the perplexity by less than 1 %."""
    from tests.gguf_families import Case, original, write_case

    case = Case("llama", "llama", {**WIDE, "head_dim": 64}, interleaved=True)
    held = write_case(tmp_path / "m.gguf", case, vocabulary, Kind[kind])
    ids = tokens(vocabulary)
    expected = logits(original(case.whole_config(len(vocabulary.tokens)), held), ids)
    found = logits(imported(tmp_path / "m.gguf", Form("full")), ids)
    assert perplexity(found, ids) == pytest.approx(perplexity(expected, ids), rel=0.01)
    # Random blocks have scales of any size side by side, which one step for 64 values cannot follow.
    assert difference(found, expected) < (1e-5 if kind in gguf_blocks.EXACT else 0.1)


@pytest.mark.parametrize("name", ["qwen2", "qwen3moe", "gemma3", "phi3-long"])
def test_perplexity_stays_within_one_percent(name: str, tmp_path: Path, vocabulary: Vocabulary) -> None:
    """For other families, too: their matrices in a code book's type, imported with eight bits."""
    from tests.gguf_families import CASES, original, write_case

    case = CASES[name]
    held = write_case(tmp_path / "m.gguf", case, vocabulary, Kind.IQ4_NL)
    ids = tokens(vocabulary)
    expected = perplexity(logits(original(case.whole_config(len(vocabulary.tokens)), held), ids), ids)
    found = perplexity(logits(imported(tmp_path / "m.gguf", Form("full")), ids), ids)
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_bits_are_those_asked_for(bits: int, tmp_path: Path, vocabulary: Vocabulary) -> None:
    """More bits come closer to the original; config.json says how many there are."""
    from tests.gguf_families import Case, original, write_case

    case = Case("llama", "llama", {**WIDE, "head_dim": 64}, interleaved=True)
    held = write_case(tmp_path / "m.gguf", case, vocabulary, Kind.Q6_K)
    ids = tokens(vocabulary)
    expected = logits(original(case.whole_config(len(vocabulary.tokens)), held), ids)
    found = logits(imported(tmp_path / "m.gguf", Form("full", bits)), ids)
    table = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert table == {"group_size": 64, "bits": bits}
    # At eight bits 0.02 was seen; every bit less doubles the step.
    assert difference(found, expected) < 0.03 * 2 ** (8 - bits)


def test_wide_activations_become_bfloat16(tmp_path: Path, vocabulary: Vocabulary) -> None:
    """Gemma's activations pass the largest float16, so its 16-bit form is the other one, and stays close."""
    from tests.gguf_families import CASES, original, write_case

    case = CASES["gemma2"]
    held = write_case(tmp_path / "m.gguf", case, vocabulary, Kind.Q8_0)
    ids = tokens(vocabulary)
    expected = logits(original(case.whole_config(len(vocabulary.tokens)), held), ids)
    found = logits(imported(tmp_path / "m.gguf", Form("half")), ids)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert perplexity(found, ids) == pytest.approx(perplexity(expected, ids), rel=0.02)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("qwen2", {"qwen2.attention.key_length": 32}, "its heads have 32 values"),
        ("qwen2", {"qwen2.rope.scaling.type": "yarn"}, "rotary scaling of type 'yarn'"),
        (
            "gemma2",
            {"gemma2.rope.scaling.type": "linear", "gemma2.rope.scaling.factor": 2.0},
            "models of the type gemma2",
        ),
        ("gemma3", {"gemma3.attention.sliding_window": None}, "'gemma3.attention.sliding_window' is missing"),
        ("gemma3", {"gemma3.final_logit_softcapping": 30.0}, "its logits are capped"),
        ("mixtral", {"llama.expert_used_count": 5}, "uses 5 experts of 4"),
        ("mixtral", {"llama.expert_count": 8}, r"has the shape \(4, 64\), not \(8, 64\)"),
        ("llama", {"llama.expert_count": 8, "llama.expert_used_count": 2}, "its heads have 32 values"),
        ("phi3-long", {"phi3.rope.scaling.attn_factor": 1.5}, "attn_factor is 1.5000"),
        ("phi3-long", {"phi3.rope.dimension_count": 16}, "the rotary factors have the shape"),
        ("qwen3", {"qwen3.rope.dimension_count": 16}, "rope.dimension_count is 16"),
    ],
)
def test_what_a_family_cannot_express_is_refused(
    name: str, changes: dict[str, Any], reason: str, tmp_path: Path, vocabulary: Vocabulary
) -> None:
    """The job names it and leaves nothing behind."""
    from tests.gguf_families import CASES, write_case

    write_case(tmp_path / "m.gguf", CASES[name], vocabulary, changes=changes)
    with pytest.raises(ImportRefused, match=reason):
        convert(tmp_path / "m.gguf", tmp_path / "out", Form("full"), progress=lambda done, total: None)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
