"""A server of our own: `ollama serve` on a port of its own, with models of its own, ended with everything it started.

An Ollama that the user runs is not touched by it: neither its port, nor its models, nor its settings.
"""

from __future__ import annotations

import re
import shutil
import sys
from typing import TYPE_CHECKING

from engine_plugin import catalogue
from engine_plugin.engines.local.server import ServerProcess
from engine_plugin.engines.ollama.attachment import is_older
from engine_plugin.engines.ollama.connection import OllamaClient
from engine_plugin.errors import EngineStartError, PreconditionError, UnsupportedError
from engine_plugin.process import python
from engine_plugin.process.engine_process import Command
from engine_plugin.process.environ import child_environ
from engine_plugin.system.files import in_thread, private_folder
from engine_plugin.transport.answers import explained

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from engine_plugin.engines.local.server import Address
    from engine_plugin.engines.ollama.options import OllamaOptions
    from engine_plugin.engines.ollama.software import Backend
    from engine_plugin.errors import EnginePluginError
    from engine_plugin.process.records import ProcessRecords
    from engine_plugin.transport.http1 import Http1Client

__all__ = ["ManagedServer", "try_out"]

_LABEL = "our Ollama server"
_VERSION_PATH = "/api/version"
_MODELS, _HOME, _TRIAL = "models", "home", "trial"

_OTHERS = ("OLLAMA_HOST", "OLLAMA_MODELS", "OLLAMA_ORIGINS", "OLLAMA_API_KEY")
"""What is meant for another server than ours; the rest of OLLAMA_… holds for ours too, unless plugin.yaml says it."""

_GPUS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES")
_COMPUTES = re.compile(r'msg="inference compute".*? library=(\S+)')


class ManagedServer(ServerProcess):
    """One server. Owned by the engine driver, which closes it once and throws it away."""

    def __init__(
        self,
        backend: Backend,
        options: OllamaOptions,
        records: ProcessRecords,
        data_dir: Path,
        environ: Mapping[str, str],
        mode: str = "auto",
    ) -> None:
        """Models lie in <data_dir>/models. `mode` is auto, cpu or gpu. No I/O."""
        super().__init__(
            _LABEL,
            options,
            records,
            None,
            health_path=_VERSION_PATH,
            chosen_ports=1,
            is_ours=False,
            error_marks=("level=ERROR", "Error: ", "panic: "),
        )
        self.version = ""
        """What the server says that it is, once it serves."""
        self.computes_on: tuple[str, ...] = ()
        """The kinds of devices that it said it uses, such as cpu or cuda; none when it did not say."""
        self._backend = backend
        self._options = options
        self._data = data_dir
        self._environ = environ
        self._mode = mode
        self._spoken: tuple[Http1Client, OllamaClient] | None = None
        self._refused: EnginePluginError | None = None
        """Why a server that runs is not one to be used."""

    @property
    def address(self) -> str:
        """The root of its URLs, for people; "" while there is none."""
        return f"http://127.0.0.1:{self._ports[0]}" if self._ports and self.ready else ""

    async def ensure_ready(self) -> None:
        """Start it, sharing a start that is under way.

        Raises EngineStartError when it does not serve; PreconditionError when it is too old, or sees no GPU for mode
        gpu; UnsupportedError when it cannot be kept from one in mode cpu. No process is left then.
        """
        await in_thread(self._make_folders)
        self._refused = None
        try:
            await super().ensure_ready()
        except EngineStartError as error:
            if self._refused is None:
                raise
            raise self._refused from error

    def client(self) -> OllamaClient:
        """The client of its latest run. Raises UnavailableError when it is not up."""
        http = self._require_client()
        if self._spoken is None or self._spoken[0] is not http:
            run = self.latest_run

            async def explain(error: EnginePluginError) -> EnginePluginError:
                return error if run is None else await explained(error, run)

            self._spoken = (http, OllamaClient(http, f"http://127.0.0.1:{self._ports[0]}", explain))
        return self._spoken[1]

    async def close(self) -> None:
        """Stop it for good, with the processes that hold its models; calls under way fail with UnavailableError."""
        spoken, self._spoken = self._spoken, None
        if spoken is not None:
            spoken[1].close()
        await super().close()
        self.clean_up()

    def launch(self, address: Address) -> Command:
        argv = python.guarded([self._backend.executable, "serve"])
        return Command(argv, self._environment(address.ports[0]))

    async def prove(self) -> None:
        """Have it say what it is. Raises PreconditionError or UnsupportedError for one that is not to be used."""
        try:
            await self._require_fit()
        except (PreconditionError, UnsupportedError) as error:
            self._refused = error
            raise

    async def _require_fit(self) -> None:
        self.version = str((await self.client().ask("GET", _VERSION_PATH)).get("version", ""))
        if is_older(self.version, self._options.minimum_version):
            raise catalogue.SOFTWARE_TOO_OLD.error(
                software=self._backend.origin,
                found=self.version,
                wanted=self._options.minimum_version,
                upgrade="Call UpgradeEngine, or name another in engine.ollama",
            )
        said = "\n".join(self.latest_run.lines() if self.latest_run else ())
        self.computes_on = tuple(kind.lower() for kind in _COMPUTES.findall(said))  # it says so before it answers
        self._require_mode()

    def _require_mode(self) -> None:
        kinds = self.computes_on
        if self._mode == "gpu" and set(kinds) == {"cpu"}:
            raise catalogue.DEVICE_MISSING.error(
                where="mode",
                asked="gpu",
                software=self._backend.origin,
                device="GPU",
                devices="cpu",
                way="Start in mode auto or cpu, or install its driver and a release for it (engine.accelerator)",
            )
        if self._mode == "cpu" and kinds and "cpu" not in kinds:
            raise UnsupportedError(
                f"mode: on this machine Ollama computes on {', '.join(kinds)} whatever it is told; start in mode auto"
            )

    def _make_folders(self) -> None:
        for name in (_MODELS, _HOME):
            private_folder(self._data / name)

    def _environment(self, port: int) -> dict[str, str]:
        """What our server is told. It would write below the user's home otherwise, and take what is meant for his."""
        base = {key: value for key, value in child_environ(self._environ).items() if key not in _OTHERS}
        home = str(self._data / _HOME)
        return {
            **base,
            "USERPROFILE" if sys.platform == "win32" else "HOME": home,
            "OLLAMA_HOST": f"127.0.0.1:{port}",
            "OLLAMA_MODELS": str(self._data / _MODELS),
            "GIN_MODE": "release",  # else it begins by listing its routes
            **_settings(self._options),
            **_devices(self._mode),
        }


async def try_out(
    backend: Backend, options: OllamaOptions, records: ProcessRecords, environ: Mapping[str, str]
) -> None:
    """Have newly installed software serve, beside what runs, with models of its own, and end it.

    Raises EnginePluginError when it does not. Called before it is switched on.
    """
    if backend.folder is None:
        return
    folder = backend.folder / _TRIAL
    server = ManagedServer(backend, options, records, folder, environ)
    try:
        await server.ensure_ready()
        await server.client().ask("GET", "/api/tags")
    finally:
        await server.close()
        await in_thread(shutil.rmtree, folder, ignore_errors=True)


def _settings(options: OllamaOptions) -> dict[str, str]:
    """plugin.yaml's options as Ollama reads them; what is left out there is left to the server."""
    flash = {"on": "1", "off": "0"}.get(options.flash_attention, "")
    told = {
        "OLLAMA_KEEP_ALIVE": options.keep_alive,
        "OLLAMA_LOAD_TIMEOUT": options.load_timeout,
        "OLLAMA_CONTEXT_LENGTH": str(options.context_length or ""),
        "OLLAMA_NUM_PARALLEL": str(options.num_parallel or ""),
        "OLLAMA_MAX_LOADED_MODELS": str(options.max_loaded_models or ""),
        "OLLAMA_MAX_QUEUE": str(options.max_queue or 1),  # with 0 it may refuse whom it could serve at once
        "OLLAMA_FLASH_ATTENTION": flash,
        "OLLAMA_KV_CACHE_TYPE": options.kv_cache_type,
        "OLLAMA_NO_CLOUD": "1" if options.no_cloud else "",
    }
    return {key: value for key, value in told.items() if value}


def _devices(mode: str) -> dict[str, str]:
    """What hides the graphics cards from it; gpu and auto leave it what the environment shows."""
    return dict.fromkeys(_GPUS, "-1") | {"OLLAMA_VULKAN": "0"} if mode == "cpu" else {}
