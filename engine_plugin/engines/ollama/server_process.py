"""The process of the managed server: `ollama serve` with its own port, models and home.

The port, the models and the settings of an Ollama that the user runs are not used.
"""

from __future__ import annotations

import re
import shutil
import sys
from typing import TYPE_CHECKING

from engine_plugin import catalogue
from engine_plugin.engines.local.server import Place, ServerProcess
from engine_plugin.engines.ollama.attached import is_older
from engine_plugin.engines.ollama.client import OllamaClient
from engine_plugin.errors import EngineStartError, UnsupportedError
from engine_plugin.process import python
from engine_plugin.process.engine_process import Command
from engine_plugin.process.environ import child_environ
from engine_plugin.system.files import in_thread, private_folder
from engine_plugin.transport.answers import explained

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from engine_plugin.engines.ollama.options import OllamaOptions
    from engine_plugin.errors import EnginePluginError
    from engine_plugin.install.software import Backend
    from engine_plugin.process.records import ProcessRecords
    from engine_plugin.transport.http1 import Http1Client

__all__ = ["OllamaProcess", "trial_run"]

_LABEL = "the managed Ollama server"
_VERSION_PATH = "/api/version"
_MODELS, _HOME, _TRIAL = "models", "home", "trial"

_NOT_INHERITED = ("OLLAMA_HOST", "OLLAMA_MODELS", "OLLAMA_ORIGINS", "OLLAMA_API_KEY")
"""Variables that configure the user's Ollama. Other OLLAMA_… variables are inherited unless plugin.yaml sets them."""

_GPUS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES")
_COMPUTES = re.compile(r'msg="inference compute".*? library=(\S+)')


class OllamaProcess(ServerProcess):
    """One `ollama serve`, restarted when it dies. Owned by `ManagedServer`, which closes it once and discards it."""

    health_path = _VERSION_PATH
    error_marks = ("level=ERROR", "Error: ", "panic: ")
    _options: OllamaOptions

    def __init__(
        self,
        program: Backend,
        options: OllamaOptions,
        records: ProcessRecords,
        data_dir: Path,
        environ: Mapping[str, str],
        mode: str = "auto",
    ) -> None:
        """The models are in <data_dir>/models. `mode` is auto, cpu or gpu. No I/O."""
        super().__init__(_LABEL, program, options, Place(records, environ, None))
        self.version = ""
        """The version that the server reports, once it is ready."""
        self.computes_on: tuple[str, ...] = ()
        """The kinds of devices in its log, such as cpu or cuda; empty if it logs none."""
        self.mode = mode
        self._data = data_dir
        self._clients: tuple[Http1Client, OllamaClient] | None = None
        self._unfit: EnginePluginError | None = None
        """Why a server that runs cannot be used."""

    @property
    def address(self) -> str:
        """The URL of the server; "" unless it is ready."""
        return f"http://127.0.0.1:{self.ports[0]}" if self.ports and self.ready else ""

    async def ensure_ready(self) -> None:
        """Start the server unless it is ready. Concurrent calls share one start.

        Raises EngineStartError if it does not answer, PreconditionError if it is too old or has no GPU in mode gpu,
        and UnsupportedError if it uses a GPU in mode cpu. After an error no process is left.
        """
        for name in (_MODELS, _HOME):
            await in_thread(private_folder, self._data / name)
        self._unfit = None
        try:
            await super().ensure_ready()
        except EngineStartError as error:
            if self._unfit is None:
                raise
            raise self._unfit from error

    def client(self) -> OllamaClient:
        """The client of the latest run of the process. Raises UnavailableError unless the server is ready."""
        http = self.http()
        if self._clients is None or self._clients[0] is not http:
            run = self.latest_run

            async def explain(error: EnginePluginError) -> EnginePluginError:
                return error if run is None else await explained(error, run)

            self._clients = (http, OllamaClient(http, f"http://127.0.0.1:{self.ports[0]}", explain))
        return self._clients[1]

    async def close(self) -> None:
        """Stop the server and its runners for good. Running requests raise UnavailableError."""
        clients, self._clients = self._clients, None
        if clients is not None:
            clients[1].close()
        await super().close()
        self.clean_up()

    def launch(self) -> Command:
        argv = python.guarded([self.backend.executable, "serve"])
        return Command(argv, self._environment(self.ports[0]))

    async def prove(self) -> None:
        """Check version and devices of the started server. Raises PreconditionError or UnsupportedError."""
        self.version = str((await self.client().ask("GET", _VERSION_PATH)).get("version", ""))
        log = "\n".join(self.latest_run.lines() if self.latest_run else ())
        self.computes_on = tuple(kind.lower() for kind in _COMPUTES.findall(log))  # logged before it answers
        self._unfit = self._unfitness()
        if self._unfit is not None:
            raise self._unfit

    def _unfitness(self) -> EnginePluginError | None:
        kinds = self.computes_on
        if is_older(self.version, self._options.minimum_version):
            return catalogue.SOFTWARE_TOO_OLD.error(
                software=self.backend.origin,
                found=self.version,
                wanted=self._options.minimum_version,
                upgrade="Call UpgradeEngine, or set engine.ollama to another one",
            )
        if self.mode == "gpu" and set(kinds) == {"cpu"}:
            return catalogue.DEVICE_MISSING.error(
                where="mode",
                asked="gpu",
                software=self.backend.origin,
                device="GPU",
                devices="cpu",
                way="Start in mode auto or cpu, or install the driver and a release for the GPU (engine.accelerator)",
            )
        if self.mode == "cpu" and kinds and "cpu" not in kinds:
            return UnsupportedError(
                f"mode: on this machine Ollama always computes on {', '.join(kinds)}; start in mode auto"
            )
        return None

    def _environment(self, port: int) -> dict[str, str]:
        """The environment of the server, which keeps its files out of the user's home."""
        base = {key: value for key, value in child_environ(self._environ).items() if key not in _NOT_INHERITED}
        home = str(self._data / _HOME)
        return {
            **base,
            "USERPROFILE" if sys.platform == "win32" else "HOME": home,
            "OLLAMA_HOST": f"127.0.0.1:{port}",
            "OLLAMA_MODELS": str(self._data / _MODELS),
            "GIN_MODE": "release",  # else it logs all its routes
            **_settings(self._options),
            **_devices(self.mode),
        }


async def trial_run(
    program: Backend, options: OllamaOptions, records: ProcessRecords, environ: Mapping[str, str]
) -> None:
    """Start newly installed software beside the running server, with an empty models directory, and stop it.

    Called before the software is activated. Raises EnginePluginError if it does not work.
    """
    if program.folder is None:
        return
    folder = program.folder / _TRIAL
    server = OllamaProcess(program, options, records, folder, environ)
    try:
        await server.ensure_ready()
        await server.client().ask("GET", "/api/tags")
    finally:
        await server.close()
        await in_thread(shutil.rmtree, folder, ignore_errors=True)


def _settings(options: OllamaOptions) -> dict[str, str]:
    """The options of plugin.yaml as environment variables; options that are not set are omitted."""
    flash = {"on": "1", "off": "0"}.get(options.flash_attention, "")
    variables = {
        "OLLAMA_KEEP_ALIVE": options.keep_alive,
        "OLLAMA_LOAD_TIMEOUT": options.load_timeout,
        "OLLAMA_CONTEXT_LENGTH": str(options.context_length or ""),
        "OLLAMA_NUM_PARALLEL": str(options.num_parallel or ""),
        "OLLAMA_MAX_LOADED_MODELS": str(options.max_loaded_models or ""),
        "OLLAMA_MAX_QUEUE": str(options.max_queue or 1),  # 0 may refuse requests that could be answered at once
        "OLLAMA_FLASH_ATTENTION": flash,
        "OLLAMA_KV_CACHE_TYPE": options.kv_cache_type,
        "OLLAMA_NO_CLOUD": "1" if options.no_cloud else "",
    }
    return {key: value for key, value in variables.items() if value}


def _devices(mode: str) -> dict[str, str]:
    """Variables that hide GPUs in mode cpu; other modes inherit the environment."""
    return dict.fromkeys(_GPUS, "-1") | {"OLLAMA_VULKAN": "0"} if mode == "cpu" else {}
