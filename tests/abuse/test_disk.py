"""The package's own files with any content, as another version, a person or a bad disk may leave them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine_plugin.cli.server_record import ServerRecord, is_server_process, read_record, record_file
from engine_plugin.download.partial import PartialState
from engine_plugin.errors import PullError
from engine_plugin.install.versions import Installation
from engine_plugin.models.store import FetchPolicy, ModelStore, PullRequest
from engine_plugin.process.records import ProcessRecords
from tests.abuse.examples import JSON, ODD_TEXT
from tests.examples import FEW
from tests.models.fakes import SAMPLES, Inspector, files_below, pull
from tests.models.server import file_server

if TYPE_CHECKING:
    from collections.abc import Iterator


class Long(bytes):
    """Too long to be shown when a test fails."""

    def __repr__(self) -> str:
        return f"Long({self[:20]!r}… of {len(self)})"


LONG = [Long(text) for text in (b"[" * 50_000, b'{"a":' * 50_000, b"1" * 5000, b'{"folder":"' + b"x" * 5000 + b'"}')]
NUMBERS: st.SearchStrategy[Any] = (
    st.integers() | st.floats() | st.sampled_from(["1", "-1", "x", None, [], {}, True, 2**31, 2**64, -1, 0, 1])
)


def content(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[bytes]:
    """What may stand in a JSON file that should have these fields."""
    shapes = st.fixed_dictionaries({}, optional={name: value | JSON for name, value in fields.items()}) | JSON
    written = st.builds(lambda shape, ascii_: json.dumps(shape, ensure_ascii=ascii_), shapes, st.booleans())
    return written.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary() | st.sampled_from(LONG)


@contextmanager
def directory() -> Iterator[Path]:
    """Yield a directory beside a file that must not change."""
    above = Path(tempfile.mkdtemp(prefix="epa-"))
    bystander = above / "bystander.json"
    bystander.write_text("{}")
    try:
        (above / "ours").mkdir(mode=0o700)
        yield above / "ours"
        assert bystander.read_text() == "{}"
        assert sorted(path.name for path in above.iterdir()) == ["bystander.json", "ours"]
    finally:
        shutil.rmtree(above)


@pytest.fixture(scope="module")
def stranger() -> Iterator[psutil.Process]:
    """Yield another process, whose token is in no record."""
    environ = {**os.environ, "ENGINE_PLUGIN_TOKEN": "strangers"}
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=environ) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.kill()


PROCESS_RECORD: dict[str, st.SearchStrategy[Any]] = {
    "pid": NUMBERS,
    "created": NUMBERS,
    "token": ODD_TEXT,
    "owner": NUMBERS,
    "owner_created": NUMBERS,
    "place": ODD_TEXT,
}


@pytest.mark.promise("P27", "F11", "P11")
@given(content(PROCESS_RECORD), st.booleans())
def test_damaged_process_record_kills_no_other_process(
    stranger: psutil.Process, written: bytes, of_stranger: bool
) -> None:
    """No process is killed, whatever pid the record names."""
    with directory() as ours:
        ProcessRecords(ours).ticket().add(os.getpid())
        [pattern] = ours.iterdir()
        if of_stranger:
            shape = json.loads(pattern.read_text())
            shape |= {"pid": stranger.pid, "created": stranger.create_time(), "owner": 2**31 - 2, "token": "other"}
            (ours / "1-2.json").write_text(json.dumps(shape))
        (ours / "7-8.json").write_bytes(written)
        (ours / "9.json").mkdir()
        assert ProcessRecords(ours).reap() == []
        assert stranger.is_running()
        assert pattern.exists()


MODEL_RECORD: dict[str, st.SearchStrategy[Any]] = {
    "kind": st.sampled_from(["chat", "embed", "x"]),
    "size": NUMBERS,
    "mtime_ns": NUMBERS,
    "digest": st.sampled_from(["sha256:0", "", "sha256:" + "0" * 64]),
    "details": st.fixed_dictionaries({}, optional={"families": JSON, "extra": JSON, "format": JSON}),
    "pulled_at": ODD_TEXT,
}


@pytest.mark.promise("P27")
@given(content(MODEL_RECORD), st.fixed_dictionaries({}, optional=MODEL_RECORD), st.booleans())
def test_damaged_model_record_leaves_the_model_listed(written: bytes, fields: dict[str, Any], fits: bool) -> None:
    """The model is listed, and its details are JSON."""
    with directory() as root:
        shutil.copy(SAMPLES / "tiny-chat.gguf", root / "m.gguf")
        if fits:  # the file's own size and time, so that the rest is believed
            stat = (root / "m.gguf").stat()
            known = {"kind": "chat", "digest": "sha256:0", "details": {}} | fields
            shape = known | {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            (root / "m.json").write_text(json.dumps(shape))
        else:
            (root / "m.json").write_bytes(written)

        async def look() -> None:
            store = ModelStore(root, inspect=Inspector(), samples=None)
            try:
                [model] = await store.list()
                assert model.name == "m"
                assert model.kind in ("chat", "embed")
                json.dumps(model.to_wire(), allow_nan=False)
            finally:
                await store.aclose()

        asyncio.run(look())


PARTIAL_STATE: dict[str, st.SearchStrategy[Any]] = {
    "source": st.just("http://127.0.0.1/model.gguf"),
    "etag": ODD_TEXT | st.sampled_from(['"version-1"', '"other"', "a\r\nx-evil: 1", "é"]),
    "last_modified": ODD_TEXT | st.just("yesterday"),
    "total": NUMBERS,
    "sha256": ODD_TEXT,
}


@pytest.mark.promise("P27")
@given(content(PARTIAL_STATE))
def test_damaged_state_of_a_partial_is_read_or_ignored(written: bytes) -> None:
    try:
        shape = json.loads(written)
    except (ValueError, RecursionError):
        shape = None
    state = PartialState.from_json(shape if isinstance(shape, dict) else None)
    assert isinstance(state.total, int)
    assert isinstance(state.etag, str)


@pytest.mark.promise("P27", "F25")
@FEW
@given(st.fixed_dictionaries({}, optional=PARTIAL_STATE) | content(PARTIAL_STATE), st.binary(max_size=300))
def test_pull_after_a_damaged_partial_succeeds_or_reports_the_error(
    left: dict[str, Any] | bytes, part: bytes
) -> None:
    """The pull ends with the whole model or an error that names the cause; the next pull always succeeds."""
    data = (SAMPLES / "tiny-chat.gguf").read_bytes()

    async def play(root: Path) -> None:
        async with file_server(data) as server:
            (root / ".partial").mkdir(mode=0o700)
            state = left if isinstance(left, bytes) else json.dumps(left | {"source": server.url()}).encode()
            (root / ".partial" / "m.json").write_bytes(state)
            (root / ".partial" / "m.part").write_bytes(part)
            policy = FetchPolicy(connect_s=5, stall_s=5, attempts=2, backoff_s=0.01, longest_wait_s=0.1)
            store = ModelStore(root, inspect=Inspector(), samples=None, policy=policy)
            request = PullRequest("m", source=server.url())
            try:
                try:
                    await pull(store, request)
                except PullError:
                    await pull(store, request)
            finally:
                await store.aclose()
            assert (root / "m.gguf").read_bytes() == data
            assert files_below(root) == {"m.gguf", "m.json"}

    with directory() as root:
        asyncio.run(play(root))


@pytest.mark.promise("P27")
@given(content({"folder": ODD_TEXT | st.sampled_from(["..", "../..", "/", "v", "c:", "v/", "./v"]), "facts": JSON}))
@example(LONG[-1])
def test_damaged_record_of_the_current_version_selects_an_installed_one_or_none(written: bytes) -> None:
    """No version, or an installed one."""
    with directory() as root:
        (root / "versions" / "v").mkdir(parents=True)
        (root / "current.json").write_bytes(written)
        version = Installation(root).current()
        assert version is None or version.folder == root / "versions" / "v"
        assert version is None or all(isinstance(value, str) for value in version.facts.values())


SERVER_RECORD: dict[str, st.SearchStrategy[Any]] = {
    "pid": NUMBERS,
    "started": NUMBERS,
    "address": ODD_TEXT,
    "log": ODD_TEXT,
}


@pytest.mark.promise("P27", "P11")
@given(content(SERVER_RECORD))
def test_damaged_server_record_finds_no_server(written: bytes) -> None:
    """No server is found, whatever the record contains."""
    with directory() as ours:
        record_file(ours / "server").write_bytes(written)
        record = read_record(ours / "server")
        assert record is None or is_server_process(record) is None


@pytest.mark.promise("P27")
def test_valid_record_of_a_running_server_is_found(tmp_path: Path) -> None:
    """Proves that the test before does not pass because no record is ever read."""
    record = ServerRecord.of_this_process("unix:/x", "log")
    record_file(tmp_path / "server").write_text(json.dumps(vars_of(record)))
    assert read_record(tmp_path / "server") == record
    assert is_server_process(record) == psutil.Process()


def vars_of(record: ServerRecord) -> dict[str, Any]:
    return {"pid": record.pid, "started": record.started, "address": record.address, "log": record.log}
