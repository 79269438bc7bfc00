"""A service's default model, set in the text of a plugin.yaml or plugin.json: every other byte stays as it is.

`surgery` makes the new text. It is read again and compared with what it should say before it takes the file's place,
so that a file in an unforeseen style is refused and not spoilt.
"""

from __future__ import annotations

import json
import os
import shlex
import stat
import sys
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from engine_plugin.errors import PreconditionError, ServiceNotFoundError
from engine_plugin.manifest.document import INVALID, read_document
from engine_plugin.manifest.load import load_manifest
from engine_plugin.manifest.surgery import DEFAULT, LIST, Surgeon, UnforeseenError, plain_or_quoted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine_plugin.manifest.model import ServiceSpec

__all__ = ["set_default_models"]

_BOM = "\ufeff"


def set_default_models(path: Path, models: Mapping[str, str]) -> tuple[str, ...]:
    """Make each model the default of its service in a manifest, and return the services that were changed by that.

    A list of `support_models` that lacks the model gets it; an empty one stays. The file is replaced as a whole or
    not at all, keeps its permissions, and a link to it stays a link. Blocks. Called by `models use`.

    Raises ManifestError when the file is wrong already, ServiceNotFoundError for one that it does not declare, and
    PreconditionError, saying what to write by hand, when the file cannot be written or changed.
    """
    declared = load_manifest(path).services
    for service in models:
        if service not in declared:
            raise ServiceNotFoundError(f"{path} declares no service {service!r}; it has: {', '.join(declared)}")
    changed = tuple(name for name, model in models.items() if not _says(declared[name], model))
    try:
        _rewrite(Path(os.path.realpath(path)), models)
    except OSError as error:
        _refuse(path, models, error.strerror or str(error))
    except (UnforeseenError, yaml.YAMLError, ValueError):
        _refuse(path, models, "it is written in a way that this command does not change safely")
    return changed


def _says(spec: ServiceSpec, model: str) -> bool:
    return spec.default_model == model and (not spec.support_models or model in spec.support_models)


def _refuse(path: Path, models: Mapping[str, str], why: str) -> NoReturn:
    wanted = ", ".join(f"{DEFAULT}: {plain_or_quoted(model)} for {service}" for service, model in models.items())
    raise PreconditionError(f"{path} was not changed: {why}. Write it there yourself: {wanted}.") from None


def _way(file: Path, status: os.stat_result) -> str:
    """How who may not write a file comes to do so."""
    if sys.platform != "win32" and os.geteuid() not in (0, status.st_uid):
        return "it belongs to another user"
    return f"allow it: chmod u+w {shlex.quote(str(file))}"


def _rewrite(file: Path, models: Mapping[str, str]) -> None:
    """Change the real file. Raises OSError, UnforeseenError, yaml.YAMLError."""
    before = file.read_bytes()
    bom, text = "", before.decode()
    if text.startswith(_BOM):
        bom, text = _BOM, text[1:]
    data = _data_of(file)
    new = Surgeon(text, as_json=file.suffix == ".json").operate(data, models)
    if new == text:
        return
    status = file.stat()
    if not status.st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH) or not os.access(file, os.W_OK):
        raise PermissionError(None, f"it may not be written ({_way(file, status)})")  # a rename would pass over that
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=file.suffix, dir=file.parent)
    draft = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write((bom + new).encode())
            stream.flush()
            os.fsync(stream.fileno())
        if _canonical(_data_of(draft)) != _canonical(_expected(data, models)):
            raise UnforeseenError
        _take_over(status, draft)
        if file.read_bytes() != before:
            raise OSError(None, "somebody else has changed it at the same time; run the command again")
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def _take_over(status: os.stat_result, draft: Path) -> None:
    """Give the draft the mode and the owner of the file that it replaces."""
    if sys.platform != "win32":
        if (status.st_uid, status.st_gid) != (draft.stat().st_uid, draft.stat().st_gid):
            os.chown(draft, status.st_uid, status.st_gid)
        draft.chmod(stat.S_IMODE(status.st_mode))


def _data_of(file: Path) -> Any:
    """What a manifest says, as plain data. Raises UnforeseenError when it cannot be read."""
    _, data, problems = read_document(file)
    if data is INVALID or problems:
        raise UnforeseenError
    return data


def _canonical(data: Any) -> str:
    """Data as a text in which 1, 1.0 and true differ."""
    return json.dumps(data, sort_keys=True)


def _expected(data: Any, models: Mapping[str, str]) -> Any:
    """The data as it should be afterwards."""
    after = deepcopy(data)
    for entry in after["services"]:
        model = models.get(entry["service_name"])
        if model is not None:
            entry[DEFAULT] = model
            if entry.get(LIST) and model not in entry[LIST]:
                entry[LIST].append(model)
    return after
