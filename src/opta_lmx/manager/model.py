"""The owner of the models on disk: which there are, and loadable files for each.

Ids come from the listing of the models directory and from nowhere else. A GGUF is listed under its own id and
imported when it is first needed, the starter to ``<models_directory>/<id>``, every other one to
``<models_directory>/.imported/<id>``; the files of an import are hashed into models.lock. One that was downloaded is
held against its own record before it is imported.
"""

import difflib
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import anyio
from anyio import to_thread

from opta_lmx.config_models import ModelsConfig
from opta_lmx.errors import Conflict, IntegrityMismatch, LoadFailed, ModelNotFound
from opta_lmx.manager.catalog import Listing, describe, describe_gguf, list_directory
from opta_lmx.manager.gguf import GgufError
from opta_lmx.manager.gguf_size import ImportForm
from opta_lmx.manager.importing import IMPORT_VERSION, STAGING_SUFFIX, GgufImporter, ImportProgress, discard
from opta_lmx.manager.integrity import FileCheck, ModelsLock
from opta_lmx.manager.starter import ENCODER_ID, StarterModel, encoder_directory, starter_files
from opta_lmx.monitoring.logging import get_logger
from opta_lmx.types import ModelFiles

_log = get_logger(__name__)

_IMPORTED = ".imported"
_INCOMPLETE = ".incomplete"


@dataclass(frozen=True, slots=True)
class _Origin:
    """The GGUF behind an id. ``revision`` changes when an import of it would give other files.

    ``key`` is the import's in models.lock; the id's own is that of the file, which may have been downloaded.
    """

    gguf: Path
    target: Path
    revision: str
    key: str


class ModelManager:
    """Lists what was on disk at the last ``refresh``; the constructor makes the first."""

    def __init__(self, config: ModelsConfig) -> None:
        self._root = config.directory
        self._starter = starter_files(config)
        self._encoder = encoder_directory(config)
        self._form = ImportForm(config.gguf_import_bits)
        self._importer = GgufImporter(self._form)
        self._lock = ModelsLock(self._root)
        self._hashing: defaultdict[str, anyio.Lock] = defaultdict(anyio.Lock)
        self._models: dict[str, ModelFiles] = {}
        self._origins: dict[str, _Origin] = {}
        # By path: what it looked like when it was described, and the description.
        self._described: dict[Path, tuple[object, ModelFiles]] = {}
        self.refresh()

    def list_available(self) -> tuple[ModelFiles, ...]:
        """Every model on disk by id, those that cannot be loaded included."""
        return tuple(self._models.values())

    def find(self, model_id: str) -> ModelFiles | None:
        """The model of exactly this id."""
        return self._models.get(model_id)

    def refresh(self) -> None:
        """Looks at the disk again; reads only what has changed. A bad model gets a problem and never raises."""
        models: dict[str, ModelFiles] = {}
        origins: dict[str, _Origin] = {}
        for model_id, directory, listing in self._directories():
            with suppress(FileNotFoundError):
                files = self._describe(model_id, directory, listing)
                if files.format == "gguf":
                    origins[model_id] = self._origin(model_id, directory, listing)
                verified = self._is_verified(model_id, directory, origins.get(model_id))
                models[model_id] = replace(files, verified=verified)
        if self._starter is not None:
            with suppress(OSError, IntegrityMismatch):
                self._add_starter(self._starter, models, origins)
        if self._encoder is not None and ENCODER_ID not in models:
            with suppress(OSError):
                # Its files may be links into an installer's cache, wherever that is.
                listing = list_directory(self._encoder, Path(self._encoder.anchor))
                models[ENCODER_ID] = self._describe(ENCODER_ID, self._encoder, listing)
        self._models = dict(sorted(models.items()))
        self._origins = origins
        self._discard_left_overs()

    def imports(self) -> dict[str, ImportProgress]:
        """The imports that run, by model id, and how far each is."""
        found = ((model_id, self._importer.progress(origin.target)) for model_id, origin in self._origins.items())
        return {model_id: progress for model_id, progress in found if progress is not None}

    def close(self) -> None:
        """Ends imports and the hashing of files, and begins no other: whoever waits for them gets Draining."""
        self._importer.close()
        self._lock.close()

    def delete(self, model_id: str) -> int:
        """Removes a model with its imported form and its record; returns the bytes freed.

        Raises ModelNotFound, Conflict for the starter in its wheel and while its import runs, OSError if a file cannot
        be removed.
        """
        files = self.find(model_id)
        if files is None:
            raise self._not_found(model_id)
        if model_id in self.imports():
            raise Conflict(f"{model_id!r} is being imported; wait until its load has ended.")
        if not files.path.is_relative_to(self._root):
            raise Conflict(f"{model_id!r} is part of the installation; models.starter: false takes it off the list.")
        freed = 0
        for directory in (files.path, self._root / _IMPORTED / model_id):
            if directory.is_symlink():
                directory.unlink()
            elif directory.is_dir():
                freed += sum(path.lstat().st_size for path in directory.rglob("*") if not path.is_dir())
                shutil.rmtree(directory)
                if directory.parent != self._root and not any(directory.parent.iterdir()):
                    directory.parent.rmdir()
        for key in (model_id, _import_key(model_id)):
            self._lock.forget(key)
        _log.info("model_deleted", model=model_id, freed_bytes=freed)
        self.refresh()
        return freed

    async def ensure_local(self, model_id: str, admit: Callable[[ModelFiles], None] = lambda files: None) -> ModelFiles:
        """Files that a worker can load, checked against models.lock; imports a GGUF first.

        ``admit`` is asked before an import, with what its header tells, and may raise: minutes of work and gigabytes
        of disk are not spent on what cannot be loaded. Raises ModelNotFound; LoadFailed with the model's problem or
        its import's; IntegrityMismatch. Looks at sizes and times only where nothing was touched since the last hash,
        so it may be asked for every request.
        """
        files = self._usable(model_id)
        origin = self._origins.get(model_id)
        if origin is None:
            return await self._checked(model_id, files)
        if not self._is_imported(origin):
            admit(files)
            if self._is_recorded(model_id, origin):
                await self._checked(model_id, files)
        return await self._checked(origin.key, await self._imported(model_id, origin))

    def look_up(self, model_id: str) -> ModelFiles:
        """What a load would use, as far as it is on disk already: a GGUF's imported form where there is one.

        Raises ModelNotFound; LoadFailed with the model's problem; IntegrityMismatch if models.lock cannot be read.
        """
        files = self._usable(model_id)
        origin = self._origins.get(model_id)
        if origin is not None and self._is_imported(origin):
            with suppress(FileNotFoundError):
                return self._describe(model_id, origin.target, list_directory(origin.target, self._root.resolve()))
        return files

    async def verify(self, model_id: str) -> list[FileCheck]:
        """Hashes every file and holds it against models.lock; empty for a model without a record.

        Of a GGUF these are its own, if they were recorded by its download, and those of its import.

        Raises ModelNotFound; IntegrityMismatch if models.lock cannot be read.
        """
        files = self.find(model_id)
        if files is None:
            raise self._not_found(model_id)
        origin = self._origins.get(model_id)
        checks: list[FileCheck] = []
        if origin is None or self._is_recorded(model_id, origin):
            checks += await to_thread.run_sync(self._lock.check, model_id, files.path)
        if origin is not None:
            checks += await to_thread.run_sync(self._lock.check, origin.key, origin.target)
        return checks

    def _usable(self, model_id: str) -> ModelFiles:
        files = self.find(model_id)
        if files is None:
            raise self._not_found(model_id)
        if files.problem is not None:
            raise LoadFailed(model_id, files.problem)
        return files

    async def _checked(self, key: str, files: ModelFiles) -> ModelFiles:
        """The files, held against the record of that key, if there is one."""
        if self._lock.find(key) is None:
            return files
        if not self._lock.is_unchanged(key, files.path):
            async with self._hashing[key]:  # of many callers one hashes; the others find it done
                try:
                    await to_thread.run_sync(self._lock.verify, key, files.path)
                except OSError as error:
                    raise LoadFailed(files.id, f"its files cannot be read ({error.strerror})") from error
        return replace(files, verified=True)

    def _is_recorded(self, model_id: str, origin: _Origin) -> bool:
        """True if models.lock knows the GGUF itself."""
        record = self._lock.find(model_id)
        return record is not None and origin.gguf.name in record.files

    def _is_imported(self, origin: _Origin) -> bool:
        record = self._lock.find(origin.key)
        return record is not None and record.revision == origin.revision and origin.target.is_dir()

    async def _imported(self, model_id: str, origin: _Origin) -> ModelFiles:
        try:
            if not self._is_imported(origin):
                await self._importer.import_gguf(origin.gguf, origin.target, lambda: self._record(origin))
                self.refresh()
            files = self._describe(model_id, origin.target, list_directory(origin.target, self._root.resolve()))
        except GgufError as error:
            raise LoadFailed(model_id, f"{origin.gguf.name}: {error.reason}") from error
        except OSError as error:
            raise LoadFailed(model_id, f"its import failed ({error.strerror})") from error
        if files.problem is not None:
            raise LoadFailed(model_id, files.problem)
        return files

    def _record(self, origin: _Origin) -> None:
        self._lock.record(origin.key, origin.target, origin.gguf.name, origin.revision)

    def _origin(self, model_id: str, directory: Path, listing: Listing) -> _Origin:
        name = listing.ggufs[0]
        status = listing.files[name]
        source = f"{status.st_size}-{status.st_mtime_ns} bits-{self._form.bits}"
        key = _import_key(model_id)
        return _Origin(directory / name, self._root / key, _revision(source), key)

    def _directories(self) -> Iterator[tuple[str, Path, Listing]]:
        """``name`` or ``publisher/name`` with its directory, for everything that is or was meant to be a model."""
        root = self._root.resolve()
        for name in _folders(self._root, root):
            listing = _list(self._root / name, root)
            if listing is not None and listing.looks_like_model:
                yield name, self._root / name, listing
                continue
            for inner in _folders(self._root / name, root):
                below = _list(self._root / name / inner, root)
                if below is not None and (below.files or below.outside):
                    yield f"{name}/{inner}", self._root / name / inner, below

    def _describe(self, model_id: str, directory: Path, listing: Listing) -> ModelFiles:
        known = self._described.get(directory)
        if known is not None and known[0] == listing.fingerprint:
            return known[1]
        files = describe(model_id, directory, listing, self._form)
        self._described[directory] = (listing.fingerprint, files)
        return files

    def _is_verified(self, model_id: str, directory: Path, origin: _Origin | None) -> bool:
        try:
            if origin is not None and self._is_imported(origin):
                return self._lock.is_unchanged(origin.key, origin.target)
            return self._lock.is_unchanged(model_id, directory)
        except (IntegrityMismatch, OSError):
            return False

    def _add_starter(self, starter: StarterModel, models: dict[str, ModelFiles], origins: dict[str, _Origin]) -> None:
        """Lists the wheel's file until its import is there; a directory of that id that is not our import stays."""
        revision = _revision(starter.revision)
        if starter.id in models:
            record = self._lock.find(starter.id)
            if record is None or record.source != starter.gguf.name or record.revision == revision:
                return
        known = self._described.get(starter.gguf)
        if known is None:
            known = self._described[starter.gguf] = (None, describe_gguf(starter.id, starter.gguf, self._form))
        models[starter.id] = known[1]
        origins[starter.id] = _Origin(starter.gguf, starter.target, revision, starter.id)

    def _discard_left_overs(self) -> None:
        """Removes what imports that were killed have left; those that run hold a lock on theirs."""
        for left_over in (
            *self._root.glob("*" + STAGING_SUFFIX),
            *(self._root / _IMPORTED).rglob("*" + STAGING_SUFFIX),
        ):
            discard(left_over)

    def _not_found(self, model_id: str) -> ModelNotFound:
        return ModelNotFound(model_id, difflib.get_close_matches(model_id, self._models, n=3))


def _import_key(model_id: str) -> str:
    """Where the import of a GGUF lies below the models directory, and what models.lock calls it."""
    return f"{_IMPORTED}/{model_id}"


def _revision(source: str) -> str:
    return f"{source} import-{IMPORT_VERSION}"


def _list(directory: Path, root: Path) -> Listing | None:
    try:
        return list_directory(directory, root)
    except OSError:
        return None


def _folders(directory: Path, root: Path) -> tuple[str, ...]:
    listing = _list(directory, root)
    return tuple(name for name in listing.folders if not name.endswith(_INCOMPLETE)) if listing else ()
