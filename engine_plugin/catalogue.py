"""The failures that a person can fix: each with its message, its cause and its remedy.

A message is `what. fix`, with the numbers and names of the case. Code raises an entry's error:
`catalogue.PORT_TAKEN.error(port=8000, holder="nginx (pid 7)")`. The entries name no engine: an engine fills in its
own words, such as how its server is started on this system. A step is named by its rpc (StartEngine, PullModel NAME),
which the command line replaces by its command. docs/troubleshooting.md lists the entries (scripts/troubleshooting.py
writes it).
"""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

from engine_plugin.errors import (
    AuthError,
    DeadlineError,
    DownloadError,
    EngineNotInstalledError,
    InvalidRequestError,
    ModelNotFoundError,
    PreconditionError,
    UnavailableError,
    UnsupportedError,
)
from engine_plugin.failures import Entry

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

__all__ = [
    "ADDRESS_TAKEN",
    "CATALOGUE",
    "CHECKSUM_MISMATCH",
    "CLOUD_DISABLED",
    "CONTEXT_EXCEEDED",
    "DEADLINE_EXCEEDED",
    "DEFAULT_MODEL_MISSING",
    "DEVICE_MISSING",
    "DISK_FILLED",
    "DISK_FULL",
    "DISK_WRITE_REFUSED",
    "ENGINE_NOT_INSTALLED",
    "ENGINE_NOT_RUNNING",
    "FAMILIES",
    "HUB_ACCESS_REFUSED",
    "HUB_UNREACHABLE",
    "KEY_MISSING",
    "KEY_REFUSED",
    "KEY_UNSAFE",
    "MEMORY_INSUFFICIENT",
    "MODEL_KIND_MISMATCH",
    "MODEL_MISSING",
    "OWN_SOFTWARE_UNUSABLE",
    "PORT_TAKEN",
    "QUEUE_FULL",
    "SERVER_UNREACHABLE",
    "SERVICE_UNSUPPORTED",
    "SIGN_IN_REQUIRED",
    "SOFTWARE_TOO_OLD",
    "STREAM_UNSUPPORTED",
    "default_missing",
    "model_missing",
    "near_names",
    "on_this_system",
]

_MOST_NAMES = 20
_LONGEST_NAME = 128
_MOST_NEAR = 3
_ROOM = 300
"""Characters that a list of names may have."""
_LIST = "ListModels shows the names"


# The engine

ENGINE_NOT_RUNNING = Entry(
    "engine-not-running",
    UnavailableError,
    "the engine is not running",
    "Call StartEngine",
    "The engine has not been started yet, or has been stopped. After StopEngine a server that the plugin only talks "
    "to counts as stopped, too.",
    "Start it. A host does so by itself when it starts the plugin; `engine-plugin engine start` does it by hand.",
)

SERVER_UNREACHABLE = Entry(
    "server-unreachable",
    UnavailableError,
    "no {server} answers at {address} ({reason})",
    "Start it: {start}. Or {otherwise}",
    "The engine is a server of its own that this plugin only talks to, and nothing listens at its address, or what "
    "listens there is something else.",
    "Start the server by the command that the message names for this system, have the plugin run one of its own "
    "(`engine-plugin engine install`) where it can, or correct the address (`engine_host` under `provider`, or the "
    "option of `engine` that the message names).",
    names=("server", "address", "reason"),
)

ENGINE_NOT_INSTALLED = Entry(
    "engine-not-installed",
    EngineNotInstalledError,
    "{found}",
    "Call InstallEngine",
    "The engine's software is not part of this package. It is not installed below the data directory, lacks a part, "
    "or was damaged after its installation, for example by a loss of power or another program.",
    "`engine-plugin engine install` fetches and verifies it, and replaces a damaged installation; "
    "`engine.offline` in plugin.yaml names the way for machines without a network.",
)

OWN_SOFTWARE_UNUSABLE = Entry(
    "own-software-unusable",
    EngineNotInstalledError,
    "{found}",
    "{advice}",
    "plugin.yaml names software of your own, which is not there or cannot be used. It is never installed for you.",
    "Correct its path in plugin.yaml, put the software there, or take the line out to have it installed.",
)

SOFTWARE_TOO_OLD = Entry(
    "software-too-old",
    PreconditionError,
    "{software} {found} is too old; {wanted} or newer is needed",
    "{upgrade}",
    "What is installed lacks interfaces that this plugin calls.",
    "Upgrade it: `engine-plugin engine upgrade` for software that the plugin installed, its own installer for "
    "everything else.",
    names=("software", "found", "wanted"),
)

DEVICE_MISSING = Entry(
    "device-missing",
    PreconditionError,
    "{where}: {asked} was asked for, but {software} sees no {device} (devices: {devices})",
    "{way}",
    "The mode of the start, or plugin.yaml, asks for a processor that the engine cannot see: it is not there, has no "
    "driver, or the engine was built without support for it.",
    "Start in mode auto or cpu, install the driver, or configure a build of the engine that knows the device.",
    names=("asked", "device", "devices"),
)

# Models

MODEL_MISSING = Entry(
    "model-missing",
    ModelNotFoundError,
    "model: no model is called {model!r}",
    "{hint}{way}",
    "The name is misspelt, or the model has not been pulled to this machine. A name without a tag means `:latest` "
    "where models have tags.",
    "Take one of the names that the message proposes, pull the model by the command in it, or set `auto_pull: true` "
    "in plugin.yaml (`--auto-pull` for one command) to have missing models pulled before the call.",
    names=("model", "pull"),
)

DEFAULT_MODEL_MISSING = Entry(
    "default-model-missing",
    ModelNotFoundError,
    "model: {model!r}, the default model for {service}, is not on this machine; {place} names it",
    "Choose another default{way}",
    "The request names no model, and the service's default model was deleted or never pulled.",
    "Choose another default (`engine-plugin models use NAME`), return to plugin.yaml's (`engine-plugin models use "
    "--reset`), or pull the model again. `default_model` in plugin.yaml is edited by hand.",
    names=("model", "pull", "service"),
)

MODEL_KIND_MISMATCH = Entry(
    "model-kind-mismatch",
    InvalidRequestError,
    "model: {model} is a model for {kind}; {service} needs one for {wanted}",
    "Name another: ListModels shows what each is for",
    "Each service needs models of one kind: chat and generate those for chat, embed those for embeddings.",
    "Name a model of that kind, or choose the service's default (`engine-plugin models use NAME`). A pull with "
    "`--type` says what a model is for when its files leave that open.",
    names=("model", "kind", "service", "wanted"),
)

# Room

DISK_FULL = Entry(
    "disk-full",
    DownloadError,
    "{folder} has {free} free ({free_bytes} bytes), {what} needs {needed} more ({needed_bytes} bytes) and {spare} to "
    "spare",
    "Free some space or move the data directory",
    "The disk below the data directory is too small for what is being fetched; that is looked at before the first "
    "byte, and again while bytes arrive.",
    "Delete models that are not needed (`engine-plugin models rm NAME`), or name a directory on a larger disk: "
    "`resources.data_dir` in plugin.yaml. What has arrived is kept, and the next attempt resumes from there.",
    names=("folder", "free_bytes", "needed_bytes"),
)

DISK_FILLED = Entry(
    "disk-filled",
    DownloadError,
    "{folder}: {reason} after {arrived} bytes; {free}",
    "Delete files that are not needed or move the data directory, then try again",
    "The disk filled up, or a quota or the number of files was reached, while a file was being written. A download "
    "of unknown size stops while 64 MiB are still free, and is deleted.",
    "As for `disk-full`. `df -i` shows how many files (inodes) a file system still holds.",
    names=("folder",),
)

DISK_WRITE_REFUSED = Entry(
    "disk-write-refused",
    DownloadError,
    "{place}: {reason}",
    "Correct the permissions of the data directory, or move it",
    "A file below the data directory cannot be written: the directory belongs to another user, the file system is "
    "mounted read-only, or the disk fails.",
    "Give the plugin's user the directory (`chown`), or name another one: `resources.data_dir` in plugin.yaml.",
    names=("place",),
)

MEMORY_INSUFFICIENT = Entry(
    "memory-insufficient",
    PreconditionError,
    "model: {model} needs {needed} of memory, and {limit}",
    "Take a smaller model, unload others (UnloadModel NAME), or raise the limit",
    "The model's weights are larger than the memory that may be used for models, or than what is free.",
    "Take a smaller model or a stronger quantization, unload others, shorten the context length, or raise the limit "
    "that the message names.",
    names=("model", "needed"),
)

QUEUE_FULL = Entry(
    "queue-full",
    UnavailableError,
    "the model is busy: {waiting}",
    "Try again later",
    "More requests arrived than the model answers at once and the queue may hold.",
    "Send fewer at a time, or allow more to wait: `engine.max_queue` in plugin.yaml. More requests at once "
    "(`engine.parallel`) cost memory. For more machines see scaling.md.",
)

CONTEXT_EXCEEDED = Entry(
    "context-exceeded",
    InvalidRequestError,
    "request_data: {said}",
    "Shorten the request, or take a model with more context",
    "The request, with what the model would answer, has more tokens than the model's context.",
    "Send fewer or shorter messages, set a smaller `max_tokens`, raise the engine's context length in plugin.yaml "
    "(it costs memory) where the model was trained for more, or take another model: `engine-plugin models list` "
    "shows the context of each.",
)

# Ports

PORT_TAKEN = Entry(
    "port-taken",
    UnavailableError,
    "port {port} is held by {holder}",
    "{fix}",
    "Another process took the port on which the engine was to listen. Ports are chosen free, so that this is rare "
    "and mends itself at the next start, unless plugin.yaml names a port.",
    "Start again, end the process that the message names, or take the port out of plugin.yaml.",
    names=("port", "holder"),
)

ADDRESS_TAKEN = Entry(
    "address-taken",
    PreconditionError,
    "{address}: {holder}",
    "Choose another --address",
    "`engine-plugin serve` was given an address where another program listens, or a path where something else lies.",
    "Choose another address, or end the program that uses this one.",
    names=("address", "holder"),
)

# Keys

KEY_MISSING = Entry(
    "key-missing",
    AuthError,
    "{server} at {address} asks for a key, and {variable} is not set",
    "Set {variable} in the environment of the plugin, and start it again",
    "The server rejects requests without a key. Keys are read from the environment of the plugin's process, not from "
    "plugin.yaml.",
    "Export the variable before the host, or `engine-plugin engine start`, is started. `engine.key_variable` in "
    "plugin.yaml names another variable.",
    names=("server", "address", "variable"),
)

KEY_REFUSED = Entry(
    "key-refused",
    AuthError,
    "{server} at {address} refuses the key ({reason})",
    "Correct {variable} in the environment of the plugin, and start it again",
    "The key is wrong, has expired, or may not be used for what was asked.",
    "Make a new key where the server's are made, and export it before the plugin is started.",
    names=("server", "address", "variable"),
)

KEY_UNSAFE = Entry(
    "key-unsafe",
    PreconditionError,
    "{address}: the key in {variable} would go to another machine unencrypted",
    "Use https, unset {variable}, or set {option} in plugin.yaml if you must",
    "Anyone on the network between the two machines could read and use the key.",
    "Give the server a certificate and its address as https://. On a network that you trust wholly, plugin.yaml can "
    "allow it.",
    names=("address", "variable", "option"),
)

SIGN_IN_REQUIRED = Entry(
    "sign-in-required",
    AuthError,
    "model: {model} needs a sign-in at {server}",
    "Open {url} in a browser, then try again",
    "The model is not computed on this machine but by the maker of the server, for people who have an account there.",
    "Open the address in a browser and connect this machine with your account, or take a model of this machine.",
    names=("model", "server", "url"),
)

CLOUD_DISABLED = Entry(
    "cloud-disabled",
    PreconditionError,
    "model: {model} is computed in the cloud, and {server} has that switched off ({said})",
    "Take a model of this machine, or allow the cloud: {option}",
    "The name belongs to a model that the server would hand to its maker's machines. No request leaves the machine "
    "while that is switched off.",
    "Take a model of this machine, or allow it by the setting that the message names.",
    names=("model", "server", "option"),
)

# The network

HUB_UNREACHABLE = Entry(
    "hub-unreachable",
    DownloadError,
    "{source}: cannot connect ({reason})",
    "Check {settings} and, for a certificate of your own, SSL_CERT_FILE",
    "The machine has no way to the server: no network, a proxy that is not set, a name that does not resolve, or a "
    "certificate that this machine does not trust.",
    "Try the address in a browser of the same machine. Set HTTPS_PROXY for a proxy, SSL_CERT_FILE for a certificate "
    "of your own, and the hub's own variable for a mirror. What has arrived is kept.",
    names=("source",),
)

HUB_ACCESS_REFUSED = Entry(
    "hub-access-refused",
    AuthError,
    "{said}",
    "Give username and password (for Hugging Face: any username and an access token), and accept the licence there",
    "The model is private, or its licence must be accepted first.",
    "Open the model's page, accept its licence, make an access token, and give it with the pull: "
    "`engine-plugin models pull NAME --username NAME` asks for it; HF_TOKEN works too.",
)

CHECKSUM_MISMATCH = Entry(
    "checksum-mismatch",
    DownloadError,
    "{place}: checksum mismatch: expected {wanted}, got {found}",
    "{fix}",
    "What arrived is not what was asked for: the file changed at its source, was damaged on the way, or the digest "
    "was copied wrongly. It is never used.",
    "Try again. If it stays so, compare the digest with the one that the source publishes, and correct it or the "
    "source.",
    names=("place", "found", "wanted"),
)

# Calls

SERVICE_UNSUPPORTED = Entry(
    "service-unsupported",
    UnsupportedError,
    "service_name: {engine} does not support {service}",
    "It supports: {able}",
    "The engine, or the server that it is attached to, does not offer this service.",
    "Call another service, or run a plugin whose engine has it.",
    names=("service",),
)

STREAM_UNSUPPORTED = Entry(
    "stream-unsupported",
    UnsupportedError,
    "service_name: {service} does not stream with {engine}",
    "Call InvokeService for the whole answer",
    "Not every service can be streamed.",
    "Ask for the whole answer at once.",
    names=("service",),
)

DEADLINE_EXCEEDED = Entry(
    "deadline-exceeded",
    DeadlineError,
    "{what}: not done in {seconds:g} s",
    "{remedy}",
    "The call took longer than plugin.yaml allows its service, or a step of the engine's life longer than such a "
    "step may take. The engine's work on it has been stopped.",
    "Raise the service's `timeout` in plugin.yaml (negative: no deadline), take a smaller model, or ask for fewer "
    "tokens. For a start look at the engine's last words in the plugin's log: `engine-plugin engine status` "
    "says where that is.",
    names=("what", "seconds"),
)

FAMILIES: Mapping[str, Sequence[Entry[Any]]] = {
    "The engine": (
        ENGINE_NOT_RUNNING,
        SERVER_UNREACHABLE,
        ENGINE_NOT_INSTALLED,
        OWN_SOFTWARE_UNUSABLE,
        SOFTWARE_TOO_OLD,
        DEVICE_MISSING,
    ),
    "Models": (MODEL_MISSING, DEFAULT_MODEL_MISSING, MODEL_KIND_MISMATCH),
    "Room: disk, memory, queue, context": (
        DISK_FULL,
        DISK_FILLED,
        DISK_WRITE_REFUSED,
        MEMORY_INSUFFICIENT,
        QUEUE_FULL,
        CONTEXT_EXCEEDED,
    ),
    "Ports and addresses": (PORT_TAKEN, ADDRESS_TAKEN),
    "Keys and accounts": (KEY_MISSING, KEY_REFUSED, KEY_UNSAFE, SIGN_IN_REQUIRED, CLOUD_DISABLED),
    "The network": (HUB_UNREACHABLE, HUB_ACCESS_REFUSED, CHECKSUM_MISMATCH),
    "Calls": (SERVICE_UNSUPPORTED, STREAM_UNSUPPORTED, DEADLINE_EXCEEDED),
}
"""The entries by their chapter of docs/troubleshooting.md, in its order."""

CATALOGUE: Mapping[str, Entry[Any]] = {entry.id: entry for entries in FAMILIES.values() for entry in entries}
"""Every entry by its id."""


def model_missing(
    name: object, *, near: Sequence[str] = (), here: Sequence[str] = (), pull: str = "", sources: str = ""
) -> ModelNotFoundError:
    """The error for a missing model.

    `near` are similar names, else `here` all names. `pull` is the reference for `models pull`, "" if there is none;
    then `sources` says what can be pulled and completes "Others must be pulled first: ".
    """
    hint = f"Did you mean {' or '.join(near)}? " if near else f"Here are: {_some(here)}. "
    if pull:
        way = f"Pull it: PullModel {shlex.quote(pull)}" if len(pull) <= _LONGEST_NAME else _LIST
    elif sources:
        way = f"Others must be pulled first: {sources}"
    else:
        way = _LIST
    text = MODEL_MISSING.text(model=str(name)[:_LONGEST_NAME], hint=hint, way=way)
    return ModelNotFoundError(text, model=str(name), pull=pull)


def default_missing(name: str, service: str, place: str, *, pull: str = "") -> ModelNotFoundError:
    """The error for a missing default model; `place` is the file that names it, `pull` as above."""
    way = f", or pull it: PullModel {shlex.quote(pull)}" if pull and len(pull) <= _LONGEST_NAME else ""
    error = DEFAULT_MODEL_MISSING.error(model=name[:_LONGEST_NAME], service=service, place=place, way=way)
    error.fields |= {"model": name, "pull": pull} if pull else {"model": name}
    return error


def _some(names: Sequence[str]) -> str:
    """The first names, within the limit, and the number of the others."""
    shown, room = [], _ROOM
    for name in names[:_MOST_NAMES]:
        room -= len(name)
        if room < 0:
            break
        shown.append(name)
    more = len(names) - len(shown)
    return ", ".join([*shown, *([f"{more} more"] if more else [])]) or "none"


def near_names(name: str, existing: Iterable[str]) -> list[str]:
    """At most three existing names that look like `name`, the nearest first.

    Names that differ only by a tag or an owner come before similar spellings.
    """
    import difflib

    wanted = name[:_LONGEST_NAME].casefold()
    by_folded = {other.casefold(): other for other in existing}
    same = [other for other in by_folded if _stem(other) == _stem(wanted)]
    alike = difflib.get_close_matches(wanted, by_folded)
    return [by_folded[near] for near in dict.fromkeys([*same, *alike])][:_MOST_NEAR]


def _stem(name: str) -> str:
    """A name without owner and tag."""
    return name.rpartition("/")[2].partition(":")[0]


def on_this_system(*, linux: str, macos: str, windows: str) -> str:
    """The text for this operating system, such as how a server is started."""
    return {"darwin": macos, "win32": windows}.get(sys.platform, linux)
