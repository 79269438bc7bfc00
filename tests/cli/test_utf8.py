"""Names and answers in any script, whatever the locale and whatever reads the output."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.patience import LIMIT

from .conftest import COMMAND

if TYPE_CHECKING:
    from .conftest import Workplace


def output(workplace: Workplace, *arguments: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *arguments],
        env=workplace.env | env,
        cwd=workplace.plugin,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=LIMIT,
    )


@pytest.mark.promise("U9")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locale")
def test_data_directory_with_any_name_works_in_the_c_locale(workplace: Workplace) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "AOG_DATA_DIR": str(workplace.home / "d\u00e4t\u00e4")}
    for command in (["engine", "install"], ["engine", "start"], ["engine", "status"], ["engine", "stop"]):
        done = output(workplace, *command, **plain)
        assert done.returncode == 0, done.stderr
    assert (workplace.home / "d\u00e4t\u00e4" / "engines" / "fake" / "logs" / "server.log").is_file()


@pytest.mark.promise("U9")
@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are Unicode there")
def test_data_directory_with_a_non_utf8_name_is_rejected(workplace: Workplace) -> None:
    workplace.env["AOG_DATA_DIR"] = os.fsdecode(bytes(workplace.home) + b"/d\xe4t")
    said = workplace.bad(1, "status")
    assert "resources.data_dir is" in said
    assert "which is not UTF-8. Name a directory in UTF-8, here or in AOG_DATA_DIR" in said


@pytest.mark.promise("U12")
def test_output_in_a_pipe_is_utf8_with_any_code_page(workplace: Workplace) -> None:
    name = "\u4f60\u597d \U0001f600"
    workplace.plugin.rename(workplace.plugin.with_name(name))
    workplace.plugin = workplace.plugin.with_name(name)
    with (workplace.plugin / "plugin.yaml").open("a") as manifest:
        manifest.write("nonsense: [\n")
    for arguments in (["lint"], ["status"], ["--plugin", f"{name}-absent", "status"]):
        done = output(workplace, *arguments, PYTHONIOENCODING="cp1252", PYTHONUTF8="0")
        assert name in (done.stdout + done.stderr).decode(), arguments
        assert b"internal error" not in done.stderr
