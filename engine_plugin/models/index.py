"""The index of a store: a record for each model, and the inspection of models that were put there by hand.

A record is a JSON file. It is valid while the size and the modification time of its model stay the same.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import (
    EnginePluginError,
    InvalidRequestError,
    ModelInUseError,
    PreconditionError,
    PullError,
    UnavailableError,
)
from engine_plugin.models.info import KINDS, ModelDescription, StoredModel, details_from_json
from engine_plugin.system.files import in_thread, private_folder, read_json, write_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
    from pathlib import Path

    from engine_plugin.models.info import Inspection
    from engine_plugin.models.layout import Extent, Layout

__all__ = ["Index", "Record"]

log = logging.getLogger(__name__)

_DIGEST_PATIENCE = 5.0
"""Seconds that a listing waits for the digest of a file that was put there by hand; later it is listed without."""
_MOST_REFERENCES = 64
"""References of one model that are kept; the oldest are dropped."""


def _texts(value: object) -> tuple[str, ...]:
    """The strings of a list; () for other values."""
    return tuple(text for text in value if isinstance(text, str)) if isinstance(value, list) else ()


@dataclass(frozen=True, slots=True)
class Record:
    """The metadata of a model. `source` and `validator` (such as the ETag) are "" for one that was put there by hand.

    `kind_given` says that a request chose the kind, which inspections then keep. `references` are the references
    (`hf:owner/name`, a path) of the pulls of this model, without secrets.
    """

    name: str
    kind: str
    size: int
    mtime_ns: int
    digest: str
    source: str = ""
    validator: str = ""
    pulled_at: str = ""
    kind_given: bool = False
    references: tuple[str, ...] = ()
    details: ModelDescription = field(default_factory=ModelDescription)

    def describes(self, extent: Extent) -> bool:
        """Whether the record is valid for a model of this extent."""
        return (self.size, self.mtime_ns) == (extent.size, extent.mtime_ns)

    @classmethod
    def from_json(cls, name: str, value: Mapping[str, Any] | None) -> Record | None:
        """Read what `asdict` gave; None for anything else, so that the model is inspected anew."""
        if value is None:
            return None
        try:
            record = cls(
                name=name,
                kind=str(value["kind"]),
                size=int(value["size"]),
                mtime_ns=int(value["mtime_ns"]),
                digest=str(value["digest"]),
                source=str(value.get("source", "")),
                validator=str(value.get("validator", "")),
                pulled_at=str(value.get("pulled_at", "")),
                kind_given=value.get("kind_given") is True,
                references=_texts(value.get("references")),
                details=details_from_json(value["details"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError):
            return None
        return record if record.kind in KINDS and record.digest.startswith("sha256:") else None

    def info(self, path: Path) -> StoredModel:
        """The model at `path`, as the store lists it."""
        return StoredModel(
            name=self.name,
            path=path,
            kind=self.kind,
            size=self.size,
            digest=self.digest,
            modified_at=datetime.fromtimestamp(self.mtime_ns / 1e9, UTC),
            bundled=False,
            details=self.details,
            references=self.references,
        )


def _start(tasks: dict[str, asyncio.Task[None]], name: str, work: Coroutine[Any, Any, None]) -> None:
    """Start a task for a model, which leaves `tasks` when it ends."""
    task = tasks[name] = asyncio.create_task(work, name=f"read {name}")
    task.add_done_callback(lambda _: tasks.pop(name, None))


class Index:
    """The models below a root, with their records. Owned by a store, used from one event loop."""

    def __init__(self, layout: Layout, inspect: Callable[[Path], Awaitable[Inspection]]) -> None:
        self.layout = layout
        self.root = layout.root
        self.partials = layout.partials
        self.inspect = inspect
        self._known: dict[str, Record] = {}
        self._infos: dict[str, tuple[Record, StoredModel]] = {}
        self._unusable: dict[str, tuple[Extent | None, str]] = {}
        self._inspecting: dict[str, asyncio.Task[None]] = {}
        self._hashing: dict[str, asyncio.Task[None]] = {}
        self._changing: dict[str, asyncio.Event] = {}
        self._referring = asyncio.Lock()
        self._closed = False

    def path(self, name: str) -> Path:
        """The path of a model, present or not."""
        return self.layout.path(name)

    def info(self, record: Record) -> StoredModel:
        """The model of a record, as the store lists it; the same object until its record changes."""
        known = self._infos.get(record.name)
        if known is None or known[0] is not record:
            known = self._infos[record.name] = (record, record.info(self.path(record.name)))
        return known[1]

    def names(self) -> list[str]:
        """The names of all models, sorted. Blocks."""
        found = sorted(self.layout.found())
        for name in found:
            if not self.layout.is_name(name):
                what = "folder" if self.layout.folders else "file"
                self._skip(name, None, f"its name is not a valid model name; rename the {what}")
        return [name for name in found if self.layout.is_name(name)]

    def complaint(self, name: str) -> str:
        """Why `get` found no usable model by that name; "" where it did not."""
        return self._unusable[name][1] if name in self._unusable else ""

    async def get(self, name: str) -> Record | None:
        """The record of a model, None if there is none. A new or changed model is inspected."""
        while (change := self._changing.get(name)) is not None:
            await change.wait()  # without its record a model looks like one that was put there by hand
        extent = self.layout.extent(name)
        if extent is None:
            self._unusable.pop(name, None)
            return None
        known = self._known.get(name)
        if known is not None and known.describes(extent):
            return known
        if name not in await in_thread(self.names):
            return None  # a case-insensitive file system found another name's file
        record = await in_thread(self._saved, name)
        if record is not None and record.describes(extent):
            self._remember(record)
            return record
        return await self._shared_inspection(name)

    async def all(self) -> list[Record]:
        """The record of each usable model, sorted by name."""
        records = [await self.get(name) for name in await in_thread(self.names)]
        return [record for record in records if record is not None]

    async def put(self, part: Path, record: Record) -> Record:
        """Move a complete, synced model into its place and write its record. Raises OSError and PreconditionError."""
        async with self._change(record.name, "replaced"):
            record = await in_thread(self._put, part, record)
            self._remember(record)
        return record

    async def set_kind(self, record: Record, kind: str) -> Record:
        """Set the kind that a request gave ("" for none). Raises OSError."""
        if kind in {"", record.kind}:
            return record
        return await self._changed(replace(record, kind=kind, kind_given=True))

    async def refer(self, name: str, reference: str) -> None:
        """Let a reference mean this model and no other. Raises OSError."""
        async with self._referring:
            for record in await in_thread(self._records):
                rest = tuple(known for known in record.references if known != reference)
                if record.name == name:
                    await self._changed(replace(record, references=(*rest, reference)[-_MOST_REFERENCES:]))
                elif rest != record.references:
                    await self._changed(replace(record, references=rest))

    async def referred(self, reference: str) -> str:
        """The name of the model that a reference means, or ""."""
        records = await in_thread(self._records)
        return next((record.name for record in records if reference in record.references), "")

    async def remove(self, name: str) -> None:
        """Delete a model and its record. Raises OSError and PreconditionError."""
        async with self._change(name, "deleted"):
            await in_thread(self.layout.remove, name)

    async def aclose(self) -> None:
        """Cancel running inspections and digests."""
        self._closed = True
        for name in {*self._inspecting, *self._hashing}:
            await self._stop_tasks(name)

    def _records(self) -> list[Record]:
        """The records on disk and in memory, without any inspection. Blocks."""
        found = (self._known.get(name) or self._saved(name) for name in self.names())
        return [record for record in found if record is not None]

    def _saved(self, name: str) -> Record | None:
        """The record on disk, valid or not. Blocks."""
        return Record.from_json(name, read_json(self.layout.record(name)))

    async def _changed(self, record: Record) -> Record:
        """Write a changed record."""
        await in_thread(self._write, record)
        self._remember(record)
        return record

    def _remember(self, record: Record) -> None:
        self._known[record.name] = record
        self._unusable.pop(record.name, None)

    def _put(self, part: Path, record: Record) -> Record:
        self.layout.put(part, record.name)
        extent = self.layout.extent(record.name)
        if extent is None:
            raise FileNotFoundError(errno.ENOENT, "the model vanished", str(self.path(record.name)))
        record = replace(record, mtime_ns=extent.mtime_ns)
        self._write(record)
        return record

    def _write(self, record: Record) -> None:
        path = self.layout.record(record.name)
        private_folder(self.partials)
        private_folder(path.parent)
        write_json(path, asdict(record), self.partials)

    def _skip(self, name: str, extent: Extent | None, why: str) -> None:
        """Mark a model as unusable, and log it once."""
        if name not in self._unusable:
            log.warning("%s is skipped: %s", self.path(name), why)
        self._unusable[name] = (extent, why)

    # Inspection: callers share one inspection of a model, which a cancelled caller does not stop.

    async def _shared_inspection(self, name: str) -> Record | None:
        if name not in self._inspecting:
            _start(self._inspecting, name, self._inspect_file(name))
        task = self._inspecting[name]
        await asyncio.wait({task})  # not `shield`: a cancelled inspection must not cancel its callers
        if task.cancelled():
            if self._closed:
                raise UnavailableError(f"model: the plugin is stopping; {name} was not read.")
            return await self.get(name)
        task.result()
        hashing = self._hashing.get(name)
        if hashing is not None:
            await asyncio.wait({hashing}, timeout=_DIGEST_PATIENCE)
        return self._known.get(name)

    async def _inspect_file(self, name: str) -> None:
        self._known.pop(name, None)
        extent = self.layout.extent(name)
        if extent is None or (name in self._unusable and self._unusable[name][0] == extent):
            return
        old = await in_thread(self._saved, name)
        if old is not None and old.size != extent.size:
            old = None  # the record of another model
        try:
            found = await self.inspect(self.path(name))
        except (EnginePluginError, OSError) as error:
            unchanging = isinstance(error, InvalidRequestError | PullError)
            self._skip(name, extent if unchanging else None, str(error))
            return
        record = Record(
            name=name,
            kind=old.kind if old and old.kind_given else found.kind,
            size=extent.size,
            mtime_ns=extent.mtime_ns,
            digest="",
            kind_given=bool(old and old.kind_given),
            references=old.references if old else (),
            details=found.details,
        )
        self._remember(record)
        _start(self._hashing, name, self._hash_file(record))

    async def _hash_file(self, record: Record) -> None:
        """Add the digest to a record, unless the model changed meanwhile, as during a copy."""
        try:
            digest = await self.layout.digest(record.name)
            extent = self.layout.extent(record.name)
            if extent is None or not record.describes(extent):
                return
            record = replace(record, digest=digest)
            self._remember(record)
            await in_thread(self._write, record)
        except OSError as error:
            log.debug("no record is written for %s: %s", self.path(record.name), error)

    @asynccontextmanager
    async def _change(self, name: str, what: str) -> AsyncIterator[None]:
        """Change a model and its record; `get` waits meanwhile. The caller holds the lock of the name.

        Raises PreconditionError for a refusal: on Windows the file is open, elsewhere permissions are missing.
        """
        change = self._changing[name] = asyncio.Event()
        try:
            await self._stop_tasks(name)
            self._known.pop(name, None)
            self._unusable.pop(name, None)
            yield
        except PermissionError as error:
            refused = f"{self.path(name)} cannot be {what} ({error.strerror})"
            if os.name == "nt":
                raise ModelInUseError(f"{refused}: unload the model first.") from error
            raise PreconditionError(f"{refused}: correct its folder's permissions.") from error
        finally:
            del self._changing[name]
            change.set()

    async def _stop_tasks(self, name: str) -> None:
        tasks = {task for task in (self._inspecting.get(name), self._hashing.get(name)) if task is not None}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
