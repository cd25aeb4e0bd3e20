"""The section ``models``: which models there are, what they are called, and how each is asked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field

from opta_lmx.config_fields import Section, Words

# The names of ``inference/output/formats.py``, and one for none of them; a test holds the two together.
ToolFormat: TypeAlias = Literal[
    "command", "deepseek_v3", "gemma", "glm47", "granite", "harmony", "hermes", "kimi", "llama", "minicpm", "minimax",
    "mistral", "nemotron", "pythonic", "qwen3_xml", "seed", "tool_calls", "none"
]  # fmt: skip
ReasoningFormat: TypeAlias = Literal["command", "gemma", "harmony", "mistral", "seed", "think", "none"]


class PresetSampling(Section):
    """Sampling a preset sets; a request's own values win."""

    temperature: float | None = Field(
        default=None, ge=0, le=2, description="Randomness; 0 always takes the likeliest token."
    )
    top_p: float | None = Field(default=None, gt=0, le=1, description="Share of the probability mass to sample from.")
    top_k: int | None = Field(default=None, ge=0, description="Number of likeliest tokens to sample from; 0 is all.")
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="Lowest probability, relative to the likeliest token."
    )
    frequency_penalty: float | None = Field(
        default=None, ge=-2, le=2, description="Penalty that grows with each repetition."
    )
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, description="Penalty for any token already used.")
    repetition_penalty: float | None = Field(
        default=None, gt=0, description="Divisor for tokens already seen; 1 is none."
    )
    max_tokens: int | None = Field(default=None, ge=1, description="Most tokens of an answer.")
    seed: int | None = Field(default=None, ge=0, description="Seed of the random choices.")
    stop: Words | None = Field(default=None, description="Texts that end an answer.")


class Preset(Section):
    """A name that stands for a model and how to ask it."""

    model: str = Field(description="Id or alias of the model.")
    system_prompt: str | None = Field(default=None, description="System message for conversations that bring none.")
    sampling: PresetSampling = Field(
        default=PresetSampling(), description="Sampling values for requests that bring none."
    )
    template_kwargs: Mapping[str, Any] = Field(default={}, description="Variables for the model's chat template.")
    context_length: int | None = Field(
        default=None, ge=1, description="Most tokens of prompt and answer; null: the model's."
    )
    tool_format: ToolFormat | None = Field(default=None, description="How tool calls are written; null: the model's.")
    reasoning_format: ReasoningFormat | None = Field(
        default=None, description="How reasoning is marked; null: the model's."
    )
    media: Literal["refuse", "note"] = Field(
        default="refuse", description="Images, audio and files: refused, or noted to the model as left out."
    )


class PerModel(Section):
    """What differs for one model id."""

    ttl_seconds: float | None = Field(
        default=None, gt=0, description="Idle seconds before unloading; null: models.ttl_seconds."
    )
    context_length: int | None = Field(
        default=None, ge=1, description="Most tokens of prompt and answer; null: the model's."
    )
    kv_bits: Literal[4, 8] | None = Field(
        default=None, description="Bits of a KV cache value, 4 or 8; null: not quantised."
    )
    tool_format: ToolFormat | None = Field(
        default=None, description="How the model writes tool calls; null: as its chat template shows."
    )
    reasoning_format: ReasoningFormat | None = Field(
        default=None, description="How the model marks reasoning; null: as its chat template shows."
    )
    pinned: bool = Field(default=False, description="Never evict this model and never let it expire.")


class ModelsConfig(Section):
    """Which models there are, what they are called, and how long they stay loaded."""

    models_directory: str = Field(default="~/.opta-lmx/models", description="Directory of the models on disk.")
    default_model: str = Field(
        default="smollm2-135m-instruct",
        description="Model id made ready for its first load at the start, and watched by /admin/health.",
    )
    starter: bool = Field(default=True, description="Offer the small model that comes with the installation.")
    auto_load: Words = Field(default=(), description="Model ids loaded when the server starts.")
    jit: bool = Field(default=True, description="Load a model when a request names it; false: only through /admin.")
    ttl_seconds: float | None = Field(
        default=3600, gt=0, description="Idle seconds before a model is unloaded; null: never."
    )
    spare_worker: bool = Field(default=True, description="Keep one worker process started ahead of the next load.")
    gguf_import_bits: Literal[4, 5, 6, 8] = Field(
        default=8,
        description="Bits of a value of a GGUF's tensors that are quantised again, 4, 5, 6 or 8: those of types that "
        "MLX cannot hold as they are.",
    )
    aliases: Mapping[str, str] = Field(default={}, description="Other names for models: name or glob to model id.")
    presets: Mapping[str, Preset] = Field(default={}, description="Names for a model with prompt and sampling.")
    per_model: Mapping[str, PerModel] = Field(default={}, description="Settings of single models, by model id.")

    @property
    def directory(self) -> Path:
        """``models_directory`` with ``~`` expanded."""
        return Path(self.models_directory).expanduser()
