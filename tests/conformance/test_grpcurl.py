"""grpcurl finds and calls the services of the native server by reflection, under both its names."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from engine_plugin.server.native import NativeServer
from tests.patience import patience

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.promise("G41")]
JUDGE = "github.com/fullstorydev/grpcurl/cmd/grpcurl"


async def grpcurl(judges: Path, *arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        judges / "grpcurl",
        "-plaintext",
        "-unix",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(patience(20)):
        out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    return out.decode()


async def test_grpcurl_lists_describes_and_calls(judges: Path, short_dir: Path) -> None:
    path = f"{short_dir}/s"
    server = NativeServer()
    await server.start(f"unix:{path}")
    try:
        listed = (await grpcurl(judges, path, "list")).split()
        assert listed == [
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
        ]
        assert "rpc Check" in await grpcurl(judges, path, "describe", "grpc.health.v1.Health")
        assert "rpc Watch" in await grpcurl(judges, path, "describe", "grpc.health.v1.Health.Watch")
        asked = ("-d", '{"service": "plugin"}', path, "grpc.health.v1.Health/Check")
        assert json.loads(await grpcurl(judges, *asked)) == {"status": "SERVING"}
    finally:
        await server.stop(0)
