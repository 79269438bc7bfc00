"""The models in a directory of an engine: list, pull, delete. Knows no engine.

Below the root, which is this user's only, a store of files has

    <name>.gguf                     a model; a file that was put there by hand is one, too
    <name>.json                     its record (index.py)
    .partial/                       interrupted pulls and their locks (layout.py)

and a store of folders

    <name>/, <owner>/<name>/        a model; a folder that was put there by hand is one, too
    .records/<name>.json            its record
    .partial/<name>.…               interrupted pulls and their locks (layout.py); in these names `=` stands for `/`

An engine owns one store, gives it an `inspect` that reads a model, and closes it in the end.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from engine_plugin import catalogue
from engine_plugin.download.events import Success
from engine_plugin.download.remote import FetchPolicy
from engine_plugin.download.source import without_secrets
from engine_plugin.errors import ModelNotFoundError, ModelUnusableError, PreconditionError, PullError
from engine_plugin.models.flights import PullFlights
from engine_plugin.models.hubs import hubs_of, refuse_offline
from engine_plugin.models.index import Index
from engine_plugin.models.info import (
    Inspection,
    ModelDescription,
    ModelInfo,
    Samples,
    StoredModel,
    bundled_samples,
    kind_of_type,
)
from engine_plugin.models.layout import FileLayout, FolderLayout, Staging
from engine_plugin.models.names import near_names, validate_model_name
from engine_plugin.models.remote_pull import pull_for
from engine_plugin.models.request import (
    COPY,
    FileSources,
    FolderSources,
    LocalSource,
    PullPlan,
    PullRequest,
    StoredSource,
    agreed,
    plan_pull,
    read_request,
)
from engine_plugin.redaction import redacted
from engine_plugin.system.files import in_thread, private_folder

if TYPE_CHECKING:
    import builtins
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
    from pathlib import Path

    from engine_plugin.download.events import PullEvent
    from engine_plugin.models.index import Record
    from engine_plugin.models.pull import Choose

__all__ = [
    "FetchPolicy",
    "Inspection",
    "ModelDescription",
    "ModelInfo",
    "ModelStore",
    "PullRequest",
    "Samples",
    "StoredModel",
    "bundled_samples",
]


class ModelStore:
    """The models below a root, and the samples of the package. Owned by an engine, used from one event loop."""

    def __init__(
        self,
        root: Path,
        *,
        inspect: Callable[[Path], Awaitable[Inspection]],
        suffix: str = ".gguf",
        choose: Choose | None = None,
        default_hub: str = "hf",
        samples: Samples | None = None,
        policy: FetchPolicy | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """No I/O. `inspect` reads a model at any path, and raises InvalidRequestError or PullError for other files.

        The models are files that end in `suffix`, or with `choose` folders: it returns the paths in one that the
        engine needs, and `default_hub` is the prefix of the hub that a reference without prefix means. `environ`
        (default: that of the process) has the addresses and tokens of the hubs, and may forbid pulls.
        """
        self.root = root
        self._samples = samples or Samples()
        self._policy = policy or FetchPolicy()
        self._environ = os.environ if environ is None else environ
        self._hubs = hubs_of(self._environ, self._policy)
        self._choose: Choose = choose or list
        self._sources = FileSources(suffix) if choose is None else FolderSources(self._hubs, default_hub)
        self._index = Index(FileLayout(root, suffix) if choose is None else FolderLayout(root), inspect)
        self._flights: PullFlights[PullPlan] = PullFlights(self._run)

    async def list(self) -> builtins.list[StoredModel]:
        """All models, sorted by name. A pulled model hides the sample of its name.

        A file that was put there by hand is inspected once, and skipped with a warning if it is not a model.
        """
        found = {record.name: self._index.info(record) for record in await self._index.all()}
        found |= {sample.name: sample for sample in self._samples.besides(found)}
        return [found[name] for name in sorted(found)]

    async def get(self, name: str) -> StoredModel:
        """A model by name or reference. By name it costs one stat once the model has been inspected.

        Raises ModelNotFoundError, and ModelUnusableError for files that are not a usable model.
        """
        if self._index.layout.is_name(name) and (record := await self._index.get(name)) is not None:
            return self._index.info(record)
        name = await self._meant(name)
        if self._index.layout.is_name(name):
            record = await self._index.get(name)
            if record is not None:
                return self._index.info(record)
            sample = self._samples.get(name)
            if sample is not None:
                return sample
            complaint = self._index.complaint(name)
            if complaint:
                raise ModelUnusableError(f"model: {self._index.path(name)} cannot be used: {complaint}")
        raise await self._not_found(name)

    async def delete(self, name: str) -> None:
        """Delete a model by name or reference, with its record and what an interrupted pull of it left.

        Raises ModelNotFoundError; PreconditionError for a sample and during a pull of the model; ModelInUseError
        where the system does not delete open files.
        """
        name = await self._meant(name)
        if not self._index.layout.is_name(name):
            raise await self._not_found(name)
        partial = Staging(self._index.partials, name)
        if name not in await in_thread(self._index.names) and not partial.leftovers():
            if not self._samples.name_of(name):
                raise await self._not_found(name)
            raise PreconditionError(f"model: {name} comes with the plugin's package and cannot be deleted.")

        def held() -> None:
            raise PreconditionError(f"model: {name} is being pulled now; cancel the pull, then delete.")

        await in_thread(private_folder, self._index.partials)
        async with partial.locked(held):
            await self._index.remove(name)
            await in_thread(partial.discard)

    def sample_for(self, kind: str) -> str:
        """The name of the first sample of a kind, or ""."""
        return self._samples.default_for(kind)

    async def defaults_for(self, kinds: Iterable[str]) -> dict[str, str]:
        """For each kind the name of the model that was pulled last, else of a sample, else ""."""
        latest = {kind: self.sample_for(kind) for kind in kinds}
        for record in sorted(await self._index.all(), key=lambda one: one.mtime_ns):
            if record.kind in latest and not self._holds_sample(record):
                latest[record.kind] = record.name
        return latest

    async def is_sample(self, name: str) -> bool:
        """Whether a name is that of a sample of the package, pulled or not."""
        record = await self._index.get(name) if self._index.layout.is_name(name) else None
        return bool(self._samples.name_of(name)) if record is None else self._holds_sample(record)

    def _holds_sample(self, record: Record) -> bool:
        """Whether a model of the store is a pulled sample, under any name."""
        return record.digest in self._samples.digests

    def pull(self, request: PullRequest) -> AsyncGenerator[PullEvent, None]:
        """Pull a model and yield the events; ends after Success or raises.

        Concurrent pulls of one model share one task; closing the iterator leaves it, and the last to leave cancels
        it, keeping what arrived. A model that is present by the name in the request needs no pull. Raises
        InvalidRequestError, ModelNotFoundError, AuthError, PreconditionError, ModelInUseError and PullError.
        """
        return self._flights.pull(lambda: self._planned(request), lambda done: self._refer(done.model, request))

    async def aclose(self) -> None:
        """Cancel running pulls and inspections. Interrupted pulls can be resumed."""
        await self._flights.aclose()
        await self._index.aclose()

    async def _refer(self, name: str, request: PullRequest) -> None:
        """Let the reference of a pull mean the model, since some hosts call it by that."""
        reference = without_secrets(request.model)
        if not request.source and reference != name:
            await self._index.refer(name, reference)

    async def _meant(self, name: str) -> str:
        """The name of the model for a name, a former name of a sample, or a reference; unknown ones are returned."""
        if not isinstance(name, str):
            return name
        if self._index.layout.is_name(name) and self._index.path(name).exists():
            return name
        return self._samples.name_of(name) or await self._index.referred(without_secrets(name)) or name

    async def _present(self, request: PullRequest) -> Success | None:
        """The answer to a pull of a name that is in the store: its source may be unknown."""
        name = request.model
        if request.source or not self._index.layout.is_name(name) or self._sources.is_path(name):
            return None
        kind = kind_of_type(request.model_type)
        _, _, digest = read_request(request)
        record = await self._index.get(name)
        if record is None:
            return None
        if digest and record.digest != f"sha256:{digest}":
            raise PullError(
                f"model: {name} is present with {record.digest}, expected sha256:{digest}. "
                "Give its source to replace it."
            )
        record = await self._index.set_kind(record, kind)
        return Success(name, record.size, record.digest)

    async def _planned(self, request: PullRequest) -> PullPlan | Success:
        present = await self._present(request)
        if present is not None:
            return present
        if request.source.startswith(COPY):
            return await self._plan_copy(request)
        names = await in_thread(self._index.names)
        plan = await in_thread(plan_pull, request, self._sources, self._samples, names)
        if "://" in plan.source.label:
            refuse_offline(self._environ, plan.source.label)
        return plan

    async def _plan_copy(self, request: PullRequest) -> PullPlan:
        """The plan for a copy of a present model, whose kind it has unless the request gives one."""
        kind = kind_of_type(request.model_type)
        text, where, digest = read_request(request)
        name = validate_model_name(request.model, owner=self._sources.folders)
        old = text.removeprefix(COPY)
        record = await self._index.get(old) if self._index.layout.is_name(old) else None
        model = self._samples.get(old) if record is None else record.info(self._index.path(old))
        if model is None:
            raise await self._not_found(old, where)
        source = LocalSource(model.path, model if model.bundled else None)
        if record is not None and record.digest:  # a link needs the digest
            source = StoredSource(model.path, record=record)
        digest = agreed(digest, model.digest.removeprefix("sha256:"))
        return PullPlan(name, source, digest, kind or model.kind, request.insecure)

    async def _run(self, plan: PullPlan, publish: Callable[[PullEvent], None]) -> Success:
        kind, reserved = pull_for(plan), self._samples.names
        return await kind(plan, self._index, self._policy, publish, reserved, self._choose, self._hubs).run()

    async def _not_found(self, name: object, where: str = "model") -> ModelNotFoundError:
        names = sorted({*await in_thread(self._index.names), *self._samples.names})
        shown = redacted(str(name))[:128]
        error = catalogue.model_missing(
            shown,
            near=near_names(shown, names),
            here=names,
            pull=self._sources.pullable(shown),
            sources=f"by {self._sources.brief}",
        )
        return error if where == "model" else ModelNotFoundError(f"{where}: {error}")
