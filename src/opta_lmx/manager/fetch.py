"""The download job: a repository's files into ``<target>.incomplete``, checked and recorded, in a process of its own.

    python -m opta_lmx.manager.fetch

Run by ``download.py``, spoken to as ``hub.py`` says. Standard input is the parent's lifeline: at its end the job ends.
Bytes are hashed while others arrive, read back from the disk (``file_hash.py``). A file grows as
``.parts/<hash>/<path>``, so that what is there belongs to this content of the file and to no other, and moves to its
place when its hash is right.
"""

import errno
import fcntl
import os
import select
import shutil
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import msgspec
from huggingface_hub import HfApi, ModelInfo, get_session, hf_hub_url
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from opta_lmx.errors import Conflict, DiskFull, DownloadError, HubUnreachable, IntegrityMismatch, LmxError
from opta_lmx.manager.file_hash import FileHash
from opta_lmx.manager.hub import (
    INCOMPLETE_SUFFIX,
    Failed,
    HubFile,
    Order,
    Plan,
    Progress,
    Recorded,
    Report,
    choose_files,
)
from opta_lmx.manager.hub_errors import Retries, Trouble, judge, mapped
from opta_lmx.manager.integrity import FileRecord, ModelsLock

_PARTS: Final = ".parts"

# Seconds between two lines of progress: a bar moves smoothly, and the server hardly notices.
_TICK_SECONDS: Final = 0.2


class Fetch:
    """One repository's download. Its threads each own a file; the main thread alone speaks to the parent."""

    def __init__(self, order: Order, say: Callable[[Report], None]) -> None:
        self._order = order
        self._say = say
        self._root = Path(order.root)
        self._target = self._root / order.repo_id
        self._home = self._target.with_name(self._target.name + INCOMPLETE_SUFFIX)
        self._headers = build_hf_headers(token=order.token or False) | {"accept-encoding": "identity"}
        self._commit = ""
        self._bytes: dict[str, int] = {}
        self._verified: list[str] = []
        self._records: dict[str, FileRecord] = {}
        self._failure: LmxError | None = None
        self._allowed = 0
        self._woken, self._waker = os.pipe()
        threading.Thread(target=self._listen, daemon=True).start()

    def plan(self) -> Plan:
        """Asks the hub. Raises InvalidRequest, ModelNotFound, HubUnreachable, DownloadError."""
        info, order = self._ask(), self._order
        if not info.sha:
            raise DownloadError(f"The hub names no commit for {order.repo_id!r}.")
        self._commit = info.sha
        listed = [_hub_file(sibling) for sibling in info.siblings or ()]
        files = choose_files(order.repo_id, listed, order.patterns)
        if info.gated:
            self._knock(files[0])
        return Plan(info.sha, files, {file.path: size for file in files if (size := self._present(file))})

    def _ask(self) -> ModelInfo:
        order, retries = self._order, Retries(self._order)
        api = HfApi(endpoint=order.endpoint, token=order.token or False)
        seconds = order.patience.silence_seconds
        while True:
            try:
                with mapped(order):
                    return api.model_info(order.repo_id, revision=order.revision, timeout=seconds, files_metadata=True)
            except Trouble as trouble:
                retries.pause(trouble)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise HubUnreachable(f"What answers at {order.endpoint} is no model hub.") from error

    def _knock(self, file: HubFile) -> None:
        """A gated repository is listed for everybody. Raises InvalidRequest if its files are not for us."""
        seconds = self._order.patience.silence_seconds
        # Trouble of any other kind is met again, and waited for, with the file itself.
        with suppress(Trouble), mapped(self._order):
            response = get_session().head(
                self._url(file), headers=self._headers, timeout=seconds, follow_redirects=False
            )
            if response.status_code in (401, 403):
                raise judge(response, self._order)

    def run(self, files: tuple[HubFile, ...]) -> None:
        """Downloads each file when the parent lets it; returns once all are whole, on disk and recorded.

        Raises the first failure of any file, and OSError.
        """
        if self._target.exists():
            raise Conflict(f"{self._order.repo_id!r} is on disk already.")
        self._home.mkdir(parents=True, exist_ok=True)
        with self._alone():
            begun = 0
            while len(self._verified) < len(files):
                self._wait()
                for file in files[begun : self._allowed]:
                    threading.Thread(target=self._work, args=(file,), daemon=True).start()
                    begun += 1
                self._say(Progress(dict(self._bytes), tuple(self._verified)))
                if self._failure is not None:
                    raise self._failure
            self._discard_others({file.path for file in files})
            self._record(files)

    def _record(self, files: tuple[HubFile, ...]) -> None:
        """Writes the files' record. Raises IntegrityMismatch if the disk gives other bytes than it was given."""
        repo_id, lock = self._order.repo_id, ModelsLock(self._root)
        lock.record(repo_id, self._home, repo_id, self._commit, self._records, self._order.patterns)
        record = lock.find(repo_id)
        for file in files:
            # One that was touched since it was checked has been hashed again.
            expected = self._records[file.path].sha256
            found = record.files[file.path].sha256 if record is not None else "no record"
            if found != expected:
                (self._home / file.path).unlink()
                raise IntegrityMismatch(file.path, expected, found)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process writes to the directory meanwhile."""
        descriptor = os.open(self._home, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise Conflict(f"Another process downloads {self._order.repo_id!r}.") from None
        finally:
            os.close(descriptor)

    def _listen(self) -> None:
        """Counts the files that may begin; the end of the parent is the end of the process."""
        while words := os.read(0, 4096):
            self._allowed += words.count(b"\n")
            os.write(self._waker, b"\n")
        os._exit(1)

    def _wait(self) -> None:
        """Returns after a tick, a file's end or a word of the parent."""
        ready, _, _ = select.select([self._woken], [], [], _TICK_SECONDS)
        if ready:
            os.read(self._woken, 4096)

    def _work(self, file: HubFile) -> None:
        try:
            self._fetch(file)
        except LmxError as error:
            self._failure = error
        except OSError as error:
            self._failure = _disk_error(error, file.size, self._root)
        else:
            self._verified.append(file.path)
        finally:
            os.write(self._waker, b"\n")

    def _part(self, file: HubFile) -> Path:
        return self._home / _PARTS / file.digest / file.path

    def _present(self, file: HubFile) -> int:
        """Bytes of it that an earlier attempt has left; not yet known to be right."""
        for path in (self._home / file.path, self._part(file)):
            with suppress(OSError):
                if (size := path.stat().st_size) <= file.size:
                    return size
        return 0

    def _fetch(self, file: HubFile) -> None:
        """Makes the file whole. Raises IntegrityMismatch, and then no byte of it is left."""
        place, part = self._home / file.path, self._part(file)
        part.parent.mkdir(parents=True, exist_ok=True)
        if place.is_file():
            # Checked once, but by another process, and perhaps against another revision.
            self._bytes[file.path] = place.stat().st_size
            found, record = FileHash(file, place).finish()
            if found == file.digest and record.size == file.size:
                self._records[file.path] = record
                return
            place.unlink()
        with part.open("ab", buffering=0) as output:
            found, record = self._fill(file, part, output).finish()
        if found != file.digest:
            part.unlink()
            self._bytes.pop(file.path, None)
            raise IntegrityMismatch(file.path, file.digest, found)
        place.parent.mkdir(parents=True, exist_ok=True)
        part.replace(place)
        self._records[file.path] = record

    def _fill(self, file: HubFile, part: Path, output: Any) -> FileHash:
        """Reads on from where the part ends until the file has its size; gives what hashes all its bytes."""
        retries = Retries(self._order)
        if output.tell() > file.size:
            output.truncate(0)
        growing = FileHash(file, part)
        furthest = self._bytes[file.path] = part.stat().st_size
        while (at := part.stat().st_size) < file.size:
            try:
                with mapped(self._order), self._open(file, at) as response:
                    if response.status_code in (200, 416) and at:
                        # It sends the whole file, or has fewer bytes than are here: begin again.
                        growing.discard()
                        output.truncate(0)
                        growing, at = FileHash(file, part), 0
                    if response.status_code == 416:
                        raise Trouble("it refuses to go on with the file")
                    if response.status_code not in (200, 206):
                        raise judge(response, self._order)
                    for chunk in response.iter_raw():
                        at += len(chunk)
                        if at > file.size:
                            part.unlink()
                            raise IntegrityMismatch(file.path, f"{file.size} bytes", "more")
                        output.write(chunk)
                        growing.grown(at)
                        self._bytes[file.path] = at
                        # Bytes that were here before and had to be thrown away are no progress.
                        if at > furthest:
                            furthest = at
                            retries.progressed()
                if at < file.size:
                    raise Trouble("the connection ended early")
            except Trouble as trouble:
                retries.pause(trouble)
        return growing

    def _open(self, file: HubFile, at: int) -> Any:
        headers = self._headers | ({"range": f"bytes={at}-"} if at else {})
        return get_session().stream(
            "GET", self._url(file), headers=headers, timeout=self._order.patience.silence_seconds
        )

    def _url(self, file: HubFile) -> str:
        return hf_hub_url(self._order.repo_id, file.path, revision=self._commit, endpoint=self._order.endpoint)

    def _discard_others(self, wanted: set[str]) -> None:
        """Removes what earlier attempts, at other revisions or with other patterns, have left."""
        for folder, folders, names in os.walk(self._home, topdown=False):
            for name in names:
                path = Path(folder, name)
                if path.relative_to(self._home).as_posix() not in wanted:
                    path.unlink()
            for name in folders:
                with suppress(OSError):
                    Path(folder, name).rmdir()


def _hub_file(sibling: Any) -> HubFile:
    lfs: Mapping[str, Any] = sibling.lfs or {}
    size = sibling.size if sibling.size is not None else -1
    return HubFile(str(sibling.rfilename), size, lfs.get("sha256"), sibling.blob_id)


def _disk_error(error: OSError, need_bytes: int, root: Path) -> LmxError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(need_bytes, shutil.disk_usage(root).free)
    return DownloadError(f"The files cannot be written ({error.strerror}).")


def _crash(failed: threading.ExceptHookArgs) -> None:
    """A bug in a thread ends the process; the parent tells of it."""
    traceback.print_exception(failed.exc_value)
    os._exit(1)


def main() -> None:
    """Follows the order on standard input; every outcome is a line on standard output."""
    threading.excepthook = _crash
    # Whatever a library prints must not come between the reports.
    reports = os.dup(1)
    os.dup2(2, 1)

    def say(report: Report) -> None:
        line = msgspec.json.encode(report) + b"\n"
        while line:
            line = line[os.write(reports, line) :]

    # Unbuffered, byte by byte: what follows the order belongs to the listener.
    line = bytearray()
    while (byte := os.read(0, 1)) not in (b"\n", b""):
        line += byte
    order = msgspec.json.decode(bytes(line), type=Order)
    fetch = Fetch(order, say)
    try:
        plan = fetch.plan()
        say(plan)
        fetch.run(plan.files)
        say(Recorded())
    except LmxError as error:
        say(Failed.of(error))
    except OSError as error:
        say(Failed.of(_disk_error(error, 0, Path(order.root))))
    # Threads that still download must not hold the process.
    os._exit(0)


if __name__ == "__main__":
    main()
