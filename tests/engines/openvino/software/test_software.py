"""InstallEngine and UpgradeEngine of both kinds: tried before the switch, rolled back on failure."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from engine_plugin.engines.openvino import software as software_module
from engine_plugin.engines.openvino.releases import RELEASE
from engine_plugin.engines.openvino.software import server_environ
from engine_plugin.errors import EngineNotInstalledError, EngineStartError, InstallError
from engine_plugin.install import software as shared_module
from engine_plugin.install.releases import Archive
from engine_plugin.install.software import Backend
from tests.engines.openvino.fake_ovms.archives import BROKEN, install, program
from tests.models.server import Script

if TYPE_CHECKING:
    from tests.engines.openvino.fake_ovms.archives import Mirror

    from .conftest import Place

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script with a #! line")


def absent(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let packages that are beside us seem to be absent."""
    found = shared_module.distribution_version

    def distribution_version(path: list[str] | None, name: str) -> str:
        return "" if path is None and name in names else found(path, name)

    monkeypatch.setattr(software_module, "distribution_version", distribution_version)


# Where it is looked for


async def test_openvino_genai_beside_the_package_is_found(place: Place, pip: list[str]) -> None:
    software = place.software()
    check = software.check()
    assert check.installed
    assert check.detail.startswith("openvino-genai beside engine-plugin, version 2026.")
    backend = software.find()
    assert (backend.kind, backend.site, backend.executable) == ("embedded", None, "")
    probed = await software.probe(backend)
    assert probed["version"] == backend.version == software.wanted_version
    assert "CPU" in [device["name"] for device in probed["devices"]]
    assert await place.install(software) == check.detail
    assert pip == []
    assert not software.folder.exists()


async def test_missing_software_is_reported(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch, "openvino-genai")
    software = place.software()
    assert (software.check().installed, software.check().detail) == (False, "OpenVINO is not installed")
    with pytest.raises(EngineNotInstalledError, match=r"OpenVINO is not installed\. Call InstallEngine"):
        software.find()
    assert not place.software(backend="release").check().installed


async def test_ovms_on_path_has_precedence(place: Place) -> None:
    executable = install(place.root / "theirs")
    software = place.software({"PATH": str(executable.parent)})
    backend = software.find()
    assert backend == Backend("ovms", "", f"OpenVINO Model Server at {executable}", executable=str(executable))
    assert await software.probe(backend) == {"version": "2026.3.0", "devices": None}
    assert place.software({"PATH": str(executable.parent)}, backend="embedded").find().kind == "embedded"
    assert place.software(ovms=str(executable)).find().executable == str(executable)
    nowhere = place.software(ovms="/nowhere/ovms")
    assert nowhere.check().detail == "no OpenVINO Model Server: /nowhere/ovms"
    with pytest.raises(EngineNotInstalledError, match=r"/nowhere/ovms\. Install it yourself, or set engine\.backend"):
        nowhere.find()
    with pytest.raises(InstallError, match=r"does not install the backend that plugin\.yaml selects\. .* to release"):
        await place.install(nowhere)


async def test_audio_packages_are_installed_for_an_ovms(
    place: Place, pip: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the packages are installed; the ovms stays unchanged."""
    absent(monkeypatch, "av")
    executable = install(place.root / "theirs")
    software = place.software(ovms=str(executable))
    assert "is incomplete: the Python packages for audio (av) are missing" in software.check().detail
    with pytest.raises(EngineNotInstalledError, match="InstallEngine"):
        software.find()
    assert (await place.install(software)).startswith(f"OpenVINO Model Server at {executable}")
    assert place.versions() == ["packages-2026.3.0"]
    assert not await place.upgrade(software)
    audio, templates = pip
    assert ("av==" in audio, "numpy==" in audio, "--hash=sha256:" in audio) == (True, False, True)
    assert "openvino" not in audio + templates
    assert ("jinja2==" in templates, "numpy" in templates) == (True, False)
    backend = software.find()
    assert backend.site is not None
    assert backend.folder is not None
    assert (backend.site, (backend.folder / "templates").is_dir()) == (backend.folder / "python", True)
    [tried] = place.tried
    assert tried.executable == str(executable)
    assert tried.site is not None
    executable.unlink()
    assert "openvino-genai beside engine-plugin" in place.software().check().detail, "packages alone are no engine"


# openvino-genai by pip


async def test_openvino_genai_is_installed_and_upgraded(place: Place, pip: list[str]) -> None:
    software = place.software(backend="embedded")
    probed: list[Backend] = []

    async def probe(_self: object, backend: Backend) -> dict[str, str]:
        probed.append(backend)
        return {"version": software.wanted_version}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(software_module.OpenVinoSoftware, "probe", probe)
        said = await place.install(software, cover=True)
        assert said == f"openvino-genai in {probed[0].site}, version {software.wanted_version}".replace(
            str(probed[0].site), str(software.find().site)
        )
        assert not await place.upgrade(software)
        other = place.software(backend="embedded", version="2026.4.0.0")
        assert await place.upgrade(other)
    everything, chosen = pip
    assert f"openvino-genai=={software.wanted_version}" in everything
    assert "--hash=sha256:" in everything
    assert "openvino-genai==2026.4.0.0" in chosen
    assert "openvino==" not in chosen
    assert "--hash" not in chosen
    assert "\\" not in chosen
    assert "aiohttp==" in chosen
    assert place.versions() == [f"embedded-{software.wanted_version}"]
    assert place.left() == {"current-openvino.json", "install.lock", "versions"}


@pytest.mark.slow
@pytest.mark.thorough
async def test_real_installation_runs(place: Place) -> None:
    """With pip, from the registry, by hash. The packages beside engine-plugin are not used."""
    software = place.software(backend="embedded")
    said = await place.install(software, cover=True)
    backend = software.find()
    assert backend.site is not None
    assert said == f"openvino-genai in {backend.site}, version {software.wanted_version}"
    assert {"av", "soxr", "numpy", "openvino_genai"} <= {path.name for path in backend.site.iterdir()}
    assert (await software.probe(backend))["version"] == software.wanted_version
    assert not await place.upgrade(software)
    assert place.left() == {"current-openvino.json", "install.lock", "versions"}


async def test_unusable_embedded_server_is_reported(place: Place) -> None:
    nothing = Backend("embedded", "1", "openvino-genai in /nowhere", executable="")
    software = place.software()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(software_module, "SERVER_MODULE", "engine_plugin.engines.openvino.absent")
        with pytest.raises(EngineStartError, match=r"in /nowhere does not run \(exit code 1\): .*No module named"):
            await software.probe(nothing)


# A release


async def test_release_is_installed(place: Place, mirror: Mirror, pip: list[str]) -> None:
    data = mirror.publish("2026.3")
    mirror.server.scripts.append(Script(drop_after=len(data) // 2))
    software = place.software(backend="release", mirror=mirror.url)
    assert software.wanted_version == RELEASE == "2026.3"
    assert not software.check().installed
    said = await place.install(software)
    assert said.startswith(f"OpenVINO Model Server in {software.folder}")
    assert said.endswith("version 2026.3.0")
    assert f"unpacking {mirror.name('2026.3')}" in place.told
    assert any("trying again" in step for step in place.told)
    backend = software.find()
    assert await software.probe(backend) == {"version": "2026.3.0", "devices": None}
    assert [(tried.kind, tried.version) for tried in place.tried] == [("ovms", "")]
    assert (Path(backend.executable).parent.parent / "lib" / "libopenvino.so").is_symlink()
    assert backend.folder is not None
    assert (backend.folder / "templates").is_dir()
    [templates] = pip  # audio's are beside us
    assert "jinja2==" in templates
    assert place.versions() == ["release-2026.3.0"]
    assert place.left() == {"current-openvino.json", "install.lock", "versions"}
    before = len(mirror.server.requests)
    assert not await place.upgrade(software)
    assert await place.install(software) == said
    assert len(mirror.server.requests) == before


async def test_release_without_python_needs_no_python(place: Place, mirror: Mirror, pip: list[str]) -> None:
    mirror.publish("2026.3", with_python=False)
    software = place.software(backend="release", mirror=mirror.url)
    await place.install(software)
    assert pip == []
    folder = software.find().folder
    assert folder is not None
    assert not (folder / "templates").exists()


async def test_release_is_upgraded(place: Place, mirror: Mirror, pip: list[str]) -> None:
    mirror.publish("2026.3")
    await place.install(place.software(backend="release", mirror=mirror.url))
    mirror.publish("2026.4")
    newer = place.software(backend="release", version="2026.4", mirror=mirror.url)
    assert await place.upgrade(newer)
    assert place.versions() == ["release-2026.4.0"]
    assert newer.find().version == "2026.4.0"
    assert mirror.fetched() == [mirror.name("2026.3"), mirror.name("2026.4")]


@pytest.mark.promise("P13")
@pytest.mark.parametrize("library", ["libxml2.so.2", "libpython3.12.so.1.0"])
async def test_missing_library_fails_the_installation(
    place: Place, mirror: Mirror, pip: list[str], library: str
) -> None:
    mirror.publish("2026.3")
    await place.install(place.software(backend="release", mirror=mirror.url))
    mirror.publish("2026.4", BROKEN, library)
    newer = place.software(backend="release", version="2026.4", mirror=mirror.url)
    with pytest.raises(InstallError, match=rf"was not changed: .* {library} is missing .* Install"):
        await place.upgrade(newer)
    assert place.versions() == ["release-2026.3.0"]
    assert (await newer.probe(newer.find()))["version"] == "2026.3.0"


@pytest.mark.promise("P13")
async def test_release_that_fails_to_start_is_rolled_back(place: Place, mirror: Mirror, pip: list[str]) -> None:
    mirror.publish("2026.3")
    await place.install(place.software(backend="release", mirror=mirror.url))
    mirror.publish("2026.4")
    newer = place.software(backend="release", version="2026.4", mirror=mirror.url)
    place.fails = EngineStartError("the graph cannot be loaded")
    with pytest.raises(InstallError, match=r"version 2026\.3\.0 is used again: the graph cannot be loaded"):
        await place.upgrade(newer)
    assert place.adopted == 3, "once for the first, then there and back"
    assert place.versions() == ["release-2026.3.0"]
    assert newer.find().version == "2026.3.0"


async def test_wrong_checksum_fails_the_installation(place: Place, mirror: Mirror, pip: list[str]) -> None:
    data = mirror.publish("2026.3")
    mirror.server.data = data[:-1] + b"?"
    software = place.software(backend="release", mirror=mirror.url)
    with pytest.raises(InstallError, match="expected sha256:"):
        await place.install(software)
    assert place.versions() == []
    assert pip == []
    mirror.server.files["/mirror/v2026.3/SHA256SUMS"] = None
    with pytest.raises(InstallError, match="there is no such file"):
        await place.install(software)


async def test_local_archive_is_installed_offline(place: Place, mirror: Mirror, pip: list[str]) -> None:
    data = mirror.publish("2026.3")
    path = place.root / "ovms.tar.gz"
    path.write_bytes(data)
    archive = Archive(str(path), sha256=hashlib.sha256(data).hexdigest())
    software = place.software(archives=(archive,), offline=True)
    assert (await place.install(software)).endswith("version 2026.3.0")
    assert mirror.server.requests == []
    assert path.exists()
    assert not await place.upgrade(software)


async def test_offline_installation_reports_where_to_put_the_archive(place: Place) -> None:
    software = place.software(backend="release", offline=True, ovms_flavour="redhat", ovms_python="off")
    with pytest.raises(InstallError) as caught:
        await place.install(software)
    address = (
        "https://github.com/openvinotoolkit/model_server/releases/download/v2026.3/ovms_redhat_2026.3.0_python_off"
    )
    assert address in str(caught.value)
    assert str(software.folder / "offline") in str(caught.value)


async def test_full_disk_is_reported_before_the_download(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software_module, "_NEEDED_BYTES", {"embedded": 1 << 60})
    with pytest.raises(InstallError, match="OpenVINO needs"):
        await place.install(place.software(backend="embedded"), cover=True)


# The environment of ovms


def test_environment_of_an_installed_ovms(place: Place) -> None:
    home = install(place.root).parent.parent
    (home / "lib" / "libopenvino.so.2630").touch()
    (home / "share" / "espeak-ng-data").mkdir(parents=True)
    templates = place.root / "templates"
    templates.mkdir()
    backend = Backend("ovms", "", "", executable=str(home / "bin" / "ovms"), folder=place.root)
    environ = {"PATH": "/bin", "LD_LIBRARY_PATH": "/cuda", "PYTHONPATH": "/ours", "API_KEY": "x", "HTTPS_PROXY": "p"}
    assert server_environ(backend, environ) == {
        "PATH": f"/bin{os.pathsep}{home / 'bin'}",
        "LD_LIBRARY_PATH": f"{home / 'lib'}{os.pathsep}/cuda",
        "PYTHONPATH": f"{home / 'lib' / 'python'}{os.pathsep}{templates}",
        "ESPEAK_DATA_PATH": str(home / "share" / "espeak-ng-data"),
        "HTTPS_PROXY": "p",
    }


def test_environment_of_an_ovms_of_the_system(place: Place) -> None:
    """Its libraries are the system's, which must not precede those of other programs."""
    executable = place.root / "usr" / "bin" / "ovms"
    executable.parent.mkdir(parents=True)
    (place.root / "usr" / "lib").mkdir()
    executable.write_bytes(program("2026.3.0"))
    assert server_environ(Backend("ovms", "", "", executable=str(executable)), {}) == {"PATH": str(executable.parent)}
