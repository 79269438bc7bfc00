"""A store of models that are folders, with the face of ModelStore. Knows no engine.

What lies where below the root is told in tree.py. A model comes from the package, a folder on this machine, or a
repository on a hub, whose id is then its name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin.download.source import without_secrets
from engine_plugin.errors import InvalidRequestError, ModelNotFoundError
from engine_plugin.models.folderpull import FolderPull
from engine_plugin.models.huggingface import HuggingFace
from engine_plugin.models.info import kind_of_type
from engine_plugin.models.modelscope import ModelScope
from engine_plugin.models.names import near_names, validate_repository_name
from engine_plugin.models.request import LocalSource, PullPlan, agreed, local_path, read_request
from engine_plugin.models.staging import Staging
from engine_plugin.models.store import FetchPolicy, ModelStore
from engine_plugin.models.tree import FolderLayout
from engine_plugin.redaction import redacted

if TYPE_CHECKING:
    import builtins
    from collections.abc import Awaitable, Callable, Mapping

    from engine_plugin.download.events import PullEvent
    from engine_plugin.models.folderpull import Choose
    from engine_plugin.models.info import Inspection
    from engine_plugin.models.pull import Leftovers, Pull
    from engine_plugin.models.repository import Hub, RepositorySource
    from engine_plugin.models.request import PullRequest
    from engine_plugin.models.samples import Samples

__all__ = ["FolderStore", "hubs_of", "plan_folder_pull"]

_HUB_SOURCE = re.compile(r"(hf|ms):(?!//)([^@]*)(?:@(.*))?")


def hubs_of(environ: Mapping[str, str], policy: FetchPolicy) -> dict[str, Hub]:
    """The hubs that models can be pulled from, by how sources name them."""
    return {hub.key: hub for hub in (HuggingFace(environ, policy), ModelScope(environ, policy))}


class FolderStore(ModelStore):
    """The model folders below one root and the samples of the package. Used from one event loop."""

    def __init__(
        self,
        root: Path,
        *,
        inspect: Callable[[Path], Awaitable[Inspection]],
        choose: Choose,
        samples: Samples | None = None,
        policy: FetchPolicy | None = None,
        environ: Mapping[str, str] | None = None,
        default_hub: str = "hf",
    ) -> None:
        """No I/O. `inspect` reads a folder, `choose` takes of the paths in one those that the engine needs; both
        raise PullError for no model. `environ` (default: the process's) has the hubs' addresses and tokens.
        """
        policy = policy or FetchPolicy()
        self._layout = FolderLayout(root)
        super().__init__(root, inspect=inspect, samples=samples, policy=policy, layout=self._layout, environ=environ)
        self._choose = choose
        self._hubs = hubs_of(self._environ, policy)
        self._default_hub = default_hub

    def _is_bare(self, name: str) -> bool:
        return self._layout.is_name(name)

    def _validate_name(self, name: object) -> str:
        return validate_repository_name(name)

    def _pullable(self, name: str) -> str:
        """A model of a hub is called as its repository, or as the reference that a pull of it takes."""
        named = _HUB_SOURCE.fullmatch(name)
        repository = named[2] if named else name.partition("@")[0]
        return name if "/" in repository and self._layout.is_name(repository) else ""

    def _plan(self, request: PullRequest, present: builtins.list[str]) -> PullPlan:
        return plan_folder_pull(request, self._samples, self._hubs, self._default_hub, present)

    def _pull(self, plan: PullPlan, publish: Callable[[PullEvent], None]) -> Pull:
        return FolderPull(
            plan,
            self._shelf,
            self._inspect,
            self._policy,
            publish,
            self._sample_names(),
            layout=self._layout,
            hubs=self._hubs,
            choose=self._choose,
        )

    def _sources(self) -> str:
        return "by owner/name on a hub, the URL of its page there, or the path of a folder"

    def _leftovers(self, name: str) -> Leftovers:
        return Staging(self._shelf.partials, name)


def plan_folder_pull(
    request: PullRequest, samples: Samples | None, hubs: Mapping[str, Hub], default_hub: str, present: list[str]
) -> PullPlan:
    """What a request means. Stats a local folder: call it in a thread.

    `present` are the store's names, only for the message of ModelNotFoundError. Raises InvalidRequestError too.
    """
    kind = kind_of_type(request.model_type)
    text, where, digest = read_request(request)
    source: LocalSource | RepositorySource
    sample = samples.get(text) if samples else None
    if sample is not None:
        source, name = LocalSource(sample.path, sample), sample.name
        digest = agreed(digest, sample.sha256)
        kind = kind or sample.kind
    elif _is_path(text):
        source = _local(local_path(text, where), where)
        name = source.path.name
    else:
        found = _repository(text, request, hubs, default_hub, where)
        if found is None:
            near = near_names(text, [*present, *(samples.names if samples else ())])
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise ModelNotFoundError(f"{where}: {redacted(text)[:128]!r} is not known here.{hint} {_forms(samples)}")
        source, name = found, found.repository
    return PullPlan(_name(name, request), source, digest, kind, request.insecure)


def _name(found: str, request: PullRequest) -> str:
    if request.source:
        return validate_repository_name(request.model)
    try:
        return validate_repository_name(found)
    except InvalidRequestError as error:
        raise InvalidRequestError.retold(
            error,
            f"{error} The source gives none; give a name in `model` and "
            f"{without_secrets(request.model)!r} in `source`.",
        ) from None


def _forms(samples: Samples | None) -> str:
    listed = f"a sample ({', '.join(samples.names)}), " if samples and samples.names else ""
    return (
        f"A pull takes {listed}owner/name on the default hub, hf:owner/name or ms:owner/name (with @revision), the "
        "URL of a model's page on Hugging Face or ModelScope, or the path or file:// URL of a folder (./name for a "
        "relative one)."
    )


def _is_path(text: str) -> bool:
    """A relative path must say so: `a/b` is a repository."""
    if text.lower().startswith("file://"):
        return True
    if "://" in text:
        return False
    return text in {".", "..", "~"} or text.startswith(("./", "../", "~/", ".\\", "..\\")) or Path(text).is_absolute()


def _local(path: Path, where: str) -> LocalSource:
    try:
        path = path.expanduser().resolve()
        if path.is_dir():
            return LocalSource(path)
        found = path.exists()
    except (OSError, RuntimeError, ValueError):
        found = False
    if found:
        raise InvalidRequestError.at(where, f"{str(path)!r} is a file; a model is the folder with all its files.")
    raise ModelNotFoundError(f"{where}: there is no folder {str(path)!r}.")


def _repository(
    text: str, request: PullRequest, hubs: Mapping[str, Hub], default_hub: str, where: str
) -> RepositorySource | None:
    """The repository that a source names; None when it has the form of none."""
    named = _HUB_SOURCE.fullmatch(text)
    if named:
        hub, repository, revision = hubs[named[1]], named[2], named[3] or ""
    elif "://" in text:
        hub, repository, revision = _page(text, hubs, where)
    elif text.count("/") == 1:
        repository, _, revision = text.partition("@")
        hub = hubs[default_hub]
    else:
        return None
    return hub.source(repository, revision, request.password, where, insecure=request.insecure)


def _page(url: str, hubs: Mapping[str, Hub], where: str) -> tuple[Hub, str, str]:
    for hub in hubs.values():
        try:
            page = hub.page(url) if url.lower().startswith(("http://", "https://")) else None
        except ValueError:
            page = None
        if page is not None:
            return hub, *page
    known = " or ".join(hub.title for hub in hubs.values())
    raise InvalidRequestError.at(
        where,
        f"{without_secrets(url)!r} is no model's page on {known}; a model of this engine is a folder of "
        "files, not one file.",
    )
