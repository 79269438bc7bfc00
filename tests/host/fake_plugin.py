"""A scriptable plugin for the tests of the host, with a real process, handshake and gRPC server.

`FAKE_MODE` says how it misbehaves, `FAKE_SOCKETS` where its socket goes (the test removes that directory).
InvokeService answers with its request and the state of the plugin's process.
"""

# ruff: noqa: N802 - methods bear the names of their rpcs

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_plugin.protocol.stubs import provider_pb2 as pb
from engine_plugin.protocol.stubs.goplugin import broker_pb2, controller_pb2, stdio_pb2
from engine_plugin.rpc.status import GrpcStatus
from engine_plugin.server import new_server
from engine_plugin.server.seam import Call, RpcError, RpcServer, RpcService

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

MODE = os.environ.get("FAKE_MODE", "normal")
MODEL = {
    "name": "tiny",
    "model": "tiny",
    "modified_at": "2026-01-02T03:04:05Z",
    "size": 1234,
    "digest": "sha256:00",
    "details": {"format": "gguf", "families": ["llama"]},
}


class Fake:
    """Answers every rpc of ProviderService with plausible values."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.status = 0
        self.auth: dict[str, str] = {}
        self.loaded: list[str] = []
        self.cancelled = asyncio.Event()

    async def GetManifest(self, _request: pb.GetManifestRequest, _call: Call) -> pb.GetManifestResponse:
        return pb.GetManifestResponse(code=200, manifest_json=b'{"provider": {"name": "fake"}}')

    async def InvokeService(self, request: pb.InvokeServiceRequest, _call: Call) -> pb.InvokeServiceResponse:
        asked = json.loads(request.request_data)
        match request.service_name:
            case "error":
                return pb.InvokeServiceResponse(code=asked["code"], message=asked["message"])
            case "status":
                raise RpcError(GrpcStatus[asked["status"]], asked["message"])
            case "hang":
                await asyncio.Event().wait()
            case "exit":
                print("[ERROR] out of cheese", file=sys.stderr, flush=True)
                os._exit(asked["code"])
            case "cancelled":
                await self.cancelled.wait()
            case "not-json":
                return pb.InvokeServiceResponse(code=200, response_data=b"<html>")
        answer = {
            "service": request.service_name,
            "request": asked,
            "auth": request.auth_info,
            "argv": sys.argv[1:],
            "cwd": str(Path.cwd()),
            "env": dict(os.environ),
            "pid": os.getpid(),
            "calls": self.calls,
        }
        return pb.InvokeServiceResponse(code=0, response_data=json.dumps(answer).encode())

    async def InvokeServiceStream(self, request: pb.InvokeServiceRequest, call: Call) -> None:
        asked = json.loads(request.request_data)
        try:
            for text in asked.get("chunks", ["Hel", "lo" + os.environ.get("FAKE_SAYS", "")]):
                event = {"choices": [{"delta": {"content": text}}]}
                data = f"data: {json.dumps(event)}\n\n".encode()
                await call.send(pb.InvokeServiceStreamResponse(chunk_data=data, metadata={"flavor": "openai"}))
            match asked.get("then"):
                case "hang":
                    await asyncio.Event().wait()
                case "error":
                    await call.send(pb.InvokeServiceStreamResponse(code=502, message="engine broke off"))
                    return
                case "abort":
                    raise RpcError(GrpcStatus.ABORTED, "engine broke off")
            await call.send(pb.InvokeServiceStreamResponse(chunk_data=b"data: [DONE]\n\n", is_final=True))
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def InvokeServiceBidi(self, call: Call) -> None:
        while (message := await call.receive()) is not None:
            assert isinstance(message, pb.InvokeServiceBidiRequest)
            metadata = {"first": str(message.is_first), "service": message.service_name, **message.metadata}
            data = message.data[::-1]
            await call.send(
                pb.InvokeServiceBidiResponse(data=data, message_type=message.message_type, metadata=metadata)
            )
            if message.data == b"refuse":
                await call.send(pb.InvokeServiceBidiResponse(code=400, message="refused"))
                return

    async def HealthCheck(self, _request: pb.HealthCheckRequest, _call: Call) -> pb.HealthCheckResponse:
        if self.status == 1:
            return pb.HealthCheckResponse(code=200, message="ready")
        return pb.HealthCheckResponse(code=503, message="the engine is not running; start it")

    async def GetOperateStatus(
        self, _request: pb.GetOperateStatusRequest, _call: Call
    ) -> pb.GetOperateStatusResponse:
        return pb.GetOperateStatusResponse(status=self.status)

    async def SetOperateStatus(self, request: pb.SetOperateStatusRequest, _call: Call) -> pb.SetOperateStatusResponse:
        self.status = request.status
        return pb.SetOperateStatusResponse()

    async def SetAuth(self, request: pb.SetAuthRequest, _call: Call) -> pb.SetAuthResponse:
        self.auth = dict(request.credentials)
        return pb.SetAuthResponse(code=200)

    async def ValidateAuth(self, _request: pb.ValidateAuthRequest, _call: Call) -> pb.ValidateAuthResponse:
        if self.auth:
            return pb.ValidateAuthResponse(code=200)
        return pb.ValidateAuthResponse(code=401, message="no key")

    async def RefreshAuth(self, _request: pb.RefreshAuthRequest, _call: Call) -> pb.RefreshAuthResponse:
        return pb.RefreshAuthResponse(code=501, message="nothing to refresh")

    async def StartEngine(self, request: pb.StartEngineRequest, _call: Call) -> pb.StartEngineResponse:
        self.status = 1
        return pb.StartEngineResponse(code=200, message=request.mode)

    async def StopEngine(self, _request: pb.StopEngineRequest, _call: Call) -> pb.StopEngineResponse:
        self.status = 0
        return pb.StopEngineResponse(code=200)

    async def GetConfig(self, _request: pb.GetConfigRequest, _call: Call) -> pb.GetConfigResponse:
        return pb.GetConfigResponse(code=200, config_json=b'{"host": "unix:/x", "device_type": "cpu"}')

    async def CheckEngine(self, _request: pb.CheckEngineRequest, _call: Call) -> pb.CheckEngineResponse:
        return pb.CheckEngineResponse(code=200, message="fake 1.2.3", installed=True)

    async def InstallEngine(self, request: pb.InstallEngineRequest, _call: Call) -> pb.InstallEngineResponse:
        return pb.InstallEngineResponse(code=200, message=f"fake 1.2.3 cover={request.cover}")

    async def InitEnv(self, _request: pb.InitEnvRequest, _call: Call) -> pb.InitEnvResponse:
        return pb.InitEnvResponse(code=200)

    async def UpgradeEngine(self, _request: pb.UpgradeEngineRequest, _call: Call) -> pb.UpgradeEngineResponse:
        return pb.UpgradeEngineResponse(code=200, message="fake 1.2.4")

    async def PullModel(self, request: pb.PullModelRequest, _call: Call) -> pb.PullModelResponse:
        asked = json.loads(request.request_json)
        last = asked.get("source", "success")
        return pb.PullModelResponse(code=200, response_json=json.dumps({"status": last, "total": 3}).encode())

    async def PullModelStream(self, request: pb.PullModelStreamRequest, call: Call) -> None:
        asked = json.loads(request.request_json)
        steps: list[dict[str, Any]] = [
            {"status": f"asked {json.dumps(asked, sort_keys=True)}"},
            {"status": "downloading", "digest": "sha256:00", "total": 100, "completed": 40},
        ]
        if asked["model"] != "broken":
            steps.append({"status": "success"})
        for step in steps:
            await call.send(pb.PullModelStreamResponse(code=200, data=json.dumps(step).encode()))

    async def DeleteModel(self, request: pb.DeleteModelRequest, _call: Call) -> pb.DeleteModelResponse:
        model = json.loads(request.request_json)["model"]
        if model != "tiny":
            return pb.DeleteModelResponse(code=404, message=f"no model is called {model!r}")
        return pb.DeleteModelResponse(code=200)

    async def ListModels(self, _request: pb.ListModelsRequest, _call: Call) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(code=200, response_json=json.dumps({"models": [MODEL]}).encode())

    async def LoadModel(self, request: pb.LoadModelRequest, _call: Call) -> pb.LoadModelResponse:
        self.loaded.append(json.loads(request.request_json)["model"])
        return pb.LoadModelResponse(code=200)

    async def UnloadModel(self, request: pb.UnloadModelRequest, _call: Call) -> pb.UnloadModelResponse:
        for model in json.loads(request.request_json)["models"]:
            self.loaded.remove(model)
        return pb.UnloadModelResponse(code=200)

    async def GetRunningModels(
        self, _request: pb.GetRunningModelsRequest, _call: Call
    ) -> pb.GetRunningModelsResponse:
        models = [MODEL | {"name": name} for name in self.loaded]
        return pb.GetRunningModelsResponse(code=200, response_json=json.dumps({"models": models}).encode())

    async def GetVersion(self, _request: pb.GetVersionRequest, _call: Call) -> pb.GetVersionResponse:
        return pb.GetVersionResponse(code=200, response_json=b'{"version": "1.2.3"}')


class Recorder:
    """Wraps `Fake` and records which of its rpcs are called."""

    def __init__(self, fake: Fake) -> None:
        self._fake = fake

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        answer: Callable[..., Awaitable[Any]] = getattr(self._fake, name)

        async def recorded(*arguments: Any) -> Any:
            self._fake.calls.append(name)
            return await answer(*arguments)

        return recorded


class GoPlugin:
    """go-plugin's three services."""

    def __init__(self) -> None:
        self.shutdown = asyncio.Event()

    async def Shutdown(self, _request: controller_pb2.Empty, _call: Call) -> controller_pb2.Empty:
        if MODE == "slow-shutdown":
            await asyncio.sleep(1000)
        if MODE != "ignores-shutdown":
            self.shutdown.set()
        return controller_pb2.Empty()

    async def StreamStdio(self, _request: object, call: Call) -> None:
        await call.send(stdio_pb2.StdioData(channel=stdio_pb2.StdioData.STDOUT, data=b"over "))
        await call.send(stdio_pb2.StdioData(channel=stdio_pb2.StdioData.STDOUT, data=b"stdio\n"))
        await asyncio.Event().wait()

    async def StartStream(self, call: Call) -> None:
        while await call.receive() is not None:
            pass


def before_handshake() -> None:
    """Do what FAKE_MODE asks for instead of a handshake."""
    lines = {
        "noise": "Loading the model...",
        "core": "2|1|unix|/nowhere|grpc|",
        "version": "1|7|unix|/nowhere|grpc|",
        "netrpc": "1|1|unix|/nowhere|netrpc|",
        "certificate": "1|1|unix|/nowhere|grpc|" + "A" * 60,
        "not-base64": "1|1|unix|/nowhere|grpc|" + "A" * 60 + "!",
        "network": "1|1|udp|/nowhere|grpc|",
    }
    if MODE in lines:
        print(lines[MODE], flush=True)
    if MODE in lines or MODE == "hang":
        print("[WARN] this plugin misbehaves", file=sys.stderr, flush=True)
        sys.stdin.readline()
        watch_parent_forever()
    if MODE == "exit":
        print("config.toml: line 3: no such key\n[ERROR] giving up", file=sys.stderr, flush=True)
        sys.exit(3)


def watch_parent_forever() -> None:
    import time

    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def say(level: str, message: str, **kv: object) -> None:
    line = {"@level": level, "@message": message, "@timestamp": "2026-01-02T03:04:05.000006Z", **kv}
    print(json.dumps(line), file=sys.stderr, flush=True)


def start_grandchild() -> None:
    """Start a process that holds stdout and stderr open after this one has ended. The test ends it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    say("info", "grandchild", pid=child.pid)
    child.returncode = 0  # this process does not wait for it


async def main() -> None:
    go_plugin = GoPlugin()
    server: RpcServer = new_server("another" if MODE == "unhealthy" else "plugin")
    certificate = ""
    if MODE == "another-certificate":
        from engine_plugin.goplugin.tls import TlsServer, host_certificates
        from engine_plugin.system.certificates import Identity

        server = TlsServer(host_certificates(os.environ["PLUGIN_CLIENT_CERT"]))
        certificate = base64.b64encode(Identity.create().certificate).decode()
    server.add(RpcService(pb.DESCRIPTOR.services_by_name["ProviderService"], Recorder(Fake())))
    for file, name in (
        (controller_pb2, "GRPCController"),
        (stdio_pb2, "GRPCStdio"),
        (broker_pb2, "GRPCBroker"),
    ):
        if MODE == "plain":
            break  # a server by hand knows nothing of go-plugin
        server.add(RpcService(file.DESCRIPTOR.services_by_name[name], go_plugin))
    sockets = os.environ.get("FAKE_SOCKETS")
    wanted = f"unix:{sockets}/{os.getpid()}.sock" if sockets else "127.0.0.1:0"
    address = await server.start(wanted)
    say("debug", "serving", address=address, big=2**40)
    print("plain words", file=sys.stderr, flush=True)
    if MODE == "grandchild":
        start_grandchild()
    network = "unix" if sockets else "tcp"
    print(f"1|1|{network}|{address.removeprefix('unix:')}|grpc|{certificate}", flush=True)
    print("a line after the handshake", flush=True)
    try:
        parent = os.getppid()
        while not go_plugin.shutdown.is_set() and os.getppid() == parent:
            waiting = asyncio.ensure_future(go_plugin.shutdown.wait())
            await asyncio.wait({waiting}, timeout=0.5)
            waiting.cancel()
    finally:
        await server.stop(0.1)


if __name__ == "__main__":
    before_handshake()
    asyncio.run(main())
