"""The encoder backend: vectors for texts, and how relevant documents are to a query. One forward a step."""

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer

from opta_lmx.errors import InvalidRequest, UnsupportedParameter
from opta_lmx.inference.protocol import Embed, Embedded, Failed, Generate, Load, Rank, Ranked
from opta_lmx.inference.worker.backend import Prepared, PreparedInputs, StepResult
from opta_lmx.inference.worker.embedding_config import normalised, pool, read_sentence_config
from opta_lmx.inference.worker.embedding_inputs import InputReader, Row, batches
from opta_lmx.inference.worker.embedding_model import PREFIXES, Encoder, EncoderShape, read_shape
from opta_lmx.inference.worker.limits import MemoryLimits
from opta_lmx.inference.worker.load_errors import named_load_errors
from opta_lmx.types import ModelFacts, TextPrompt

Vectors = npt.NDArray[np.float32]

_NOT_FINITE = "the model's output is not a number"


@dataclass(slots=True)
class _Job:
    """One request: what is still to compute, and what has been; ``results`` is in the order of the rows."""

    request: PreparedInputs
    left: deque[list[int]]
    results: Vectors | None = None


class EmbeddingBackend:
    """One encoder. Requests are served one after the other, each in batches of rows of like length."""

    def __init__(self) -> None:
        self._jobs: deque[_Job] = deque()
        self._cancelled: list[int] = []

    def load(self, frame: Load) -> ModelFacts:
        """Load weights and tokenizer; raises LoadFailed with what is wrong with the files."""
        directory = Path(frame.path)
        MemoryLimits(frame.options)
        with named_load_errors(frame.model_id):
            config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            self._shape = shape = read_shape(config)
            self._sentence = read_sentence_config(directory)
            self._model = _load_model(directory, shape, PREFIXES[config["model_type"]])
            tokenizer: Any = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
        longest = min(
            length for length in (shape.longest, self._sentence.longest, frame.options.context_length) if length
        )
        self._reader = InputReader(
            tokenizer.backend_tokenizer, shape.vocab_size, longest, lowercase=self._sentence.lowercase
        )
        self._model_id = frame.model_id
        return ModelFacts(
            model_type=config["model_type"],
            context_length=longest,
            vocab_size=shape.vocab_size,
            weights_bytes=self._model.nbytes,
            kv_bytes_per_token=0,
            has_chat_template=False,
        )

    def prepare(self, frame: Generate) -> Prepared:
        """Raises UnsupportedParameter: an encoder writes no text."""
        raise UnsupportedParameter(
            f"The model {self._model_id!r} makes embeddings and cannot write text. Use POST /v1/embeddings.",
            param="model",
        )

    def prepare_inputs(self, frame: Embed | Rank) -> PreparedInputs:
        """Tokenise and check a request; raises RequestRejected naming the field."""
        if isinstance(frame, Rank):
            if self._shape.head != "none":
                return PreparedInputs(frame, tuple(self._reader.pairs(frame.query, frame.documents)))
            return PreparedInputs(frame, self._query_and_documents(frame))
        if self._shape.head != "none":
            raise UnsupportedParameter(
                f"The model {self._model_id!r} scores pairs of texts and makes no embeddings. Use POST /v1/rerank.",
                param="model",
            )
        size = self._shape.hidden
        if frame.dimensions is not None and frame.dimensions > size:
            raise InvalidRequest(
                f"Invalid 'dimensions': this model's vectors have {size}, but {frame.dimensions} were asked for.",
                param="dimensions",
                code="invalid_value",
            )
        return PreparedInputs(frame, tuple(self._reader.inputs(frame.inputs, "input")))

    def add(self, request: Prepared) -> None:
        """Never called: ``prepare`` lets nothing through."""
        raise AssertionError(request)

    def add_inputs(self, request: PreparedInputs) -> None:
        """Put a request in line."""
        self._jobs.append(_Job(request, deque(batches([len(row.ids) for row in request.rows]))))

    def cancel(self, id: int) -> None:
        """Let a request leave at the next step, if it has not been answered."""
        if any(job.request.frame.id == id for job in self._jobs):
            self._cancelled.append(id)

    def grant_kv(self, granted_bytes: int) -> None:
        """Never asked for: an encoder keeps no cache."""

    def has_work(self) -> bool:
        """True while a request is in line."""
        return bool(self._jobs)

    def step(self) -> StepResult:
        """One batch of the first request; its answer with the last one."""
        failed = self._leave()
        if not self._jobs:
            return StepResult(failed=failed)
        job = self._jobs[0]
        try:
            self._compute(job)
        except RuntimeError as error:  # MLX raises no other, out of memory above all
            self._jobs.popleft()
            return StepResult(failed=[*failed, Failed(job.request.frame.id, str(error))])
        if job.left:
            return StepResult(failed=failed)
        self._jobs.popleft()
        answer = self._answer(job)
        if isinstance(answer, Failed):
            return StepResult(failed=[*failed, answer])
        return StepResult(failed=failed, answers=[answer])

    def running(self) -> tuple[int, int]:
        """Requests that are computed and requests in line."""
        return min(len(self._jobs), 1), max(len(self._jobs) - 1, 0)

    def rest(self) -> None:
        """Give back the buffers MLX keeps for reuse."""
        mx.clear_cache()

    def memory(self) -> tuple[int, int]:
        """Bytes live in MLX; there is no cache."""
        return mx.get_active_memory(), 0

    def _query_and_documents(self, frame: Rank) -> tuple[Row, ...]:
        [query] = self._reader.inputs([TextPrompt(frame.query)], "query")
        documents = self._reader.inputs([TextPrompt(text) for text in frame.documents], "documents")
        return (query, *documents)

    def _leave(self) -> list[Failed]:
        leaving, self._cancelled = set(self._cancelled), []
        self._jobs = deque(job for job in self._jobs if job.request.frame.id not in leaving)
        return [Failed(id, "cancelled") for id in sorted(leaving)]

    def _compute(self, job: _Job) -> None:
        places = job.left.popleft()
        rows = [job.request.rows[place] for place in places]
        ids, types, mask = _padded(rows)
        if self._shape.head != "none":
            made = mx.sigmoid(self._model.scores(ids, types, mask).astype(mx.float32))[:, None]
        else:
            made = pool(self._model.states(ids, types, mask), mask, self._sentence)
        part = np.array(made)
        if job.results is None:
            job.results = np.empty((len(job.request.rows), part.shape[1]), np.float32)
        job.results[places] = part

    def _answer(self, job: _Job) -> Embedded | Ranked | Failed:
        frame, results = job.request.frame, job.results
        assert results is not None
        if not np.isfinite(results).all():
            return Failed(frame.id, _NOT_FINITE)
        tokens = sum(len(row.ids) for row in job.request.rows)
        if isinstance(frame, Rank):
            scores = results[:, 0] if self._shape.head != "none" else _cosines(results)
            return Ranked(frame.id, scores.tolist(), tokens)
        if frame.dimensions is not None and frame.dimensions < results.shape[1]:
            results = np.array(normalised(mx.array(results[:, : frame.dimensions])))
        return Embedded(frame.id, results.astype("<f4").tobytes(), results.shape[1], tokens)


def _load_model(directory: Path, shape: EncoderShape, prefix: str) -> Encoder:
    weights: dict[str, mx.array] = {}
    for file in sorted(directory.glob("model*.safetensors")):
        weights |= mx.load(str(file))  # type: ignore[arg-type]  # safetensors hold named arrays
    model = Encoder(shape, weights, prefix)
    mx.eval(weights)
    return model


def _padded(rows: list[Row]) -> tuple[mx.array, mx.array, mx.array]:
    """Ids, types and mask (rows, longest); padding is token 0, which nothing looks at."""
    longest = max(len(row.ids) for row in rows)
    ids = np.zeros((len(rows), longest), np.int32)
    types = np.zeros_like(ids)
    mask = np.zeros(ids.shape, np.bool_)
    for at, row in enumerate(rows):
        ids[at, : len(row.ids)] = row.ids
        types[at, : len(row.ids)] = row.types
        mask[at, : len(row.ids)] = True
    return mx.array(ids), mx.array(types), mx.array(mask)


def _cosines(vectors: Vectors) -> Vectors:
    """The first vector's cosine with each of the others."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosines: Vectors = np.clip(unit[1:] @ unit[0], -1.0, 1.0)
    return cosines
