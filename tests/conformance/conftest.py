"""The Go host, built once, and its report at the end of the test session."""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from build import build_linked
from pins import ROOT
from tests.conformance.gohost import SOURCES, Check, GoHost, executable_of, run_go
from tests.conftest import REPORT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeAlias

    Observe: TypeAlias = Callable[..., dict[str, Check]]


NEWER = {
    "v1.8.0": "h1:ie8S6RRY8RvB2usYZv+AAZ/wBvx2AU5p5QeP5j/FORs=",
    "v1.8.0/go.mod": "h1:BExt6KEaIYx804z8k4gRzRLEvxKVb+kn0NMcihqOqb8=",
}
"""The newer go-plugin's lines in go.sum. It needs what the older one does."""


@pytest.fixture(scope="session")
def go_host(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[GoHost]:
    yield from _built(tmp_path_factory.mktemp("go-host"), request, "-mod=readonly")


@pytest.fixture(scope="session")
def newer_go_host(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[GoHost]:
    """The same host with a newer go-plugin."""
    directory = tmp_path_factory.mktemp("newer-go-host")
    module = directory / "newer.mod"
    text = (SOURCES / "go.mod").read_text()
    newer = re.sub(r"(hashicorp/go-plugin) v\S+", rf"\1 {next(iter(NEWER))}", text)
    assert newer != text
    module.write_text(newer)
    sums = [f"github.com/hashicorp/go-plugin {version} {digest}\n" for version, digest in NEWER.items()]
    module.with_suffix(".sum").write_text((SOURCES / "go.sum").read_text() + "".join(sums))
    yield from _built(directory, request, "-mod=readonly", f"-modfile={module}")


def _built(directory: Path, request: pytest.FixtureRequest, *options: str) -> Iterator[GoHost]:
    binary = directory / "conformance-host"
    run_go("build", *options, "-o", str(binary), ".")
    seen: list[Check] = []
    yield GoHost(binary, seen)
    request.config.stash[REPORT] += _lines(seen)


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A directory with the program of the Go package that the test module names JUDGE."""
    if shutil.which("go") is None:
        pytest.skip("Go is not installed: h2spec, grpc-go and grpcurl did not judge the native implementation")
    directory = tmp_path_factory.mktemp("judges")
    module = SOURCES.parent / "judges"
    run_go("build", "-mod=readonly", "-o", f"{directory}/", request.module.JUDGE, module=module)
    return directory


def _lines(checks: list[Check]) -> Iterator[str]:
    """Lines of the report: the outcome of each check."""
    yield "a Go host (hashicorp/go-plugin) and this plugin:"
    for check in checks:
        verdict = "ok  " if check.ok else "FAIL"
        detail = " ".join(check.detail.split())
        line = f"{verdict} {check.scenario:18} {check.name:32} {check.millis:8.1f} ms  {detail}"
        yield line if not check.ok else line[:150]
    failed = sum(not check.ok for check in checks)
    yield f"{len(checks) - failed} checks passed, {failed} failed"


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama.cpp plugin's executable, linked to this checkout."""
    return executable_of(build_linked(ROOT / "plugins/llamacpp/plugin.yaml", tmp_path_factory.mktemp("plugins dir")))


@pytest.fixture(scope="session")
def eight_services(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The executable of the default plugin, OpenVINO's, linked to this checkout."""
    return executable_of(build_linked(ROOT / "plugin.yaml", tmp_path_factory.mktemp("plugins dir")))


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """A directory for data and sockets with a path short enough for unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="epc-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@pytest.fixture
def scratch() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture(scope="session")
def observe(go_host: GoHost, plugin: Path) -> Observe:
    """Run a scenario once with the llama.cpp plugin, with or without AutoMTLS, and return its passed checks."""

    @functools.cache
    def observe(scenario: str, tls: bool = False) -> dict[str, Check]:
        with short_directory() as scratch:
            checks = go_host.run(scenario, plugin, scratch, *(["-automtls"] if tls else []))
        return {check.name: check for check in checks}

    return observe
