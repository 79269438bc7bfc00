"""Chatting: one question, and a conversation on a real terminal with a real Ctrl-C."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.cli.conversation import ChatParameters, Conversation, Picture, Piece, piece_of
from engine_plugin.errors import BadGatewayError
from engine_plugin.manifest import load_manifest
from tests.engines.ollama.contract.handle import ContractServer
from tests.patience import LIMIT
from tests.shipped import shipped, write_manifest

from .conftest import COMMAND, REPOSITORY
from .showing import use_engine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .conftest import Workplace

terminal = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")

if sys.platform != "win32":
    from .screen import CTRL_C, CTRL_D, ENTER, Screen

ENDLESS = REPOSITORY / "tests" / "data" / "gguf" / "tiny-random.gguf"


@pytest.fixture
def place(workplace: Workplace) -> Workplace:
    """A workplace whose engine chats, and is installed."""
    use_engine(workplace, "chatting:ChattingEngine")
    workplace.install()
    return workplace


@pytest.fixture
def native(place: Workplace) -> Workplace:
    """The same, with Ollama's own JSON."""
    manifest = place.plugin / "plugin.yaml"
    manifest.write_text(manifest.read_text().replace("openai:chat", "ollama:chat"))
    return place


def asked(place: Workplace) -> dict[str, Any]:
    """Return the last request that has reached the engine."""
    said = [line.partition(" ")[2] for line in place.journal if line.startswith("chat ")]
    request: dict[str, Any] = json.loads(said[-1])
    return request


def eventually(condition: Callable[[], bool], seconds: float = LIMIT) -> None:
    """Wait for a state of another process, for which there is no event."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


# One question.


def test_answer_is_printed(place: Workplace) -> None:
    assert place.good("chat", "Why", "so?") == "1: Why so?\n"
    assert asked(place) == {
        "messages": [{"role": "user", "content": "Why so?"}],
        "stream": True,
        "model": "tiny",
    }
    options = ("--model", "other", "--system", "Be brief.", "--max-tokens", "7", "--temperature", "0", "--no-think")
    assert place.good("chat", "hi", *options) == "2: hi\n"
    assert asked(place) == {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
        "model": "other",
        "think": False,
        "chat_template_kwargs": {"enable_thinking": False},
        "max_tokens": 7,
        "temperature": 0.0,
        "stream": True,
    }


def test_prompt_is_read_from_standard_input(place: Workplace) -> None:
    assert place.fed(b"from a pipe\n", "chat").stdout == b"1: from a pipe\n"
    assert place.fed(b"text\n", "chat", "Sum up:", "-").stdout == b"1: Sum up: \n\ntext\n"
    assert b"the prompt is empty" in place.fed(b" \n", "chat").stderr
    done = place.fed(b"\xff", "chat")
    assert (done.returncode, done.stderr) == (1, b"engine-plugin: standard input is not UTF-8 (byte 0)\n")


def test_output_without_a_terminal_is_the_text_only(place: Workplace) -> None:
    done = place.run("chat", "x", "--model", "thinker", "--think")
    assert (done.stdout, done.stderr) == ("\n\nI thought\x1b]0;title\x07 of: x\n", "")
    assert asked(place)["think"] is True
    done = place.run("chat", "x", "--max-tokens", "1")
    assert done.stdout == "1: x\n"
    assert "truncated: the answer reached --max-tokens" in done.stderr


def test_json_output_has_the_events(place: Workplace) -> None:
    lines = [json.loads(line) for line in place.good("chat", "x", "--json").splitlines()]
    assert [line["choices"][0]["delta"] for line in lines] == [{"content": "1: x"}, {}]


def test_images_are_sent_with_the_prompt(place: Workplace, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"jpeg")
    (tmp_path / "b").write_bytes(b"png?")
    pictures = ("--image", str(tmp_path / "a.jpg"), "--image", str(tmp_path / "b"))
    assert place.good("chat", "what?", *pictures) == "seen\n"
    assert asked(place)["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,anBlZw=="}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,cG5nPw=="}},
        {"type": "text", "text": "what?"},
    ]
    place.bad(2, "chat", "what?", "--image", str(tmp_path / "none"))


def test_native_ollama_answer_is_printed(native: Workplace, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"png")
    picture = ("--image", str(tmp_path / "a.png"))
    options = ("--max-tokens", "9", "--temperature", "0.5", "--think")
    assert native.good("chat", "hi", *picture, *options) == "native: hi, 1 pictures!\n"
    request = asked(native)
    assert request["messages"] == [{"role": "user", "content": "hi", "images": ["cG5n"]}]
    assert (request["options"], request["think"]) == ({"num_predict": 9, "temperature": 0.5}, True)
    assert "the runner has died" in native.bad(1, "chat", "hi", "--model", "failing")


def test_answer_of_a_unary_service_is_printed(place: Workplace) -> None:
    manifest = place.plugin / "plugin.yaml"
    manifest.write_text(manifest.read_text().replace("support_streaming: true", "support_streaming: false"))
    assert place.good("chat", "hi") == "whole\n"


def test_failed_answer_is_reported_with_its_status(place: Workplace) -> None:
    done = place.run("chat", "hi", "--model", "breaking")
    assert (done.returncode, done.stdout) == (1, "So far\n")
    assert done.stderr == "engine-plugin: the engine broke off\n"
    assert "models pull absent" in place.bad(3, "chat", "hi", "--model", "absent")
    (place.data / "installed").unlink()
    assert "not installed" in place.bad(4, "chat", "hi")


def test_closed_output_cancels_the_answer_quietly(place: Workplace) -> None:
    with subprocess.Popen(
        [*COMMAND, "chat", "hi", "--model", "endless"],
        env=place.env,
        cwd=place.plugin,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(5) == b"more "
        process.stdout.close()
        assert process.wait(LIMIT) == 0
        assert process.stderr.read() == b""
    assert "the answer was cut short" in place.journal


def test_missing_model_is_pulled_first(place: Workplace) -> None:
    assert place.good("chat", "hi", "--model", "fresh", "--auto-pull") == "1: hi\n"
    assert (place.data / "models" / "fresh").exists()


# What events say.


@pytest.mark.parametrize(
    ("event", "piece"),
    [
        ({}, Piece()),
        ({"choices": []}, Piece()),
        ({"choices": [{"delta": {"content": None, "role": "assistant"}}]}, Piece()),
        ({"choices": [{"delta": {"reasoning": "Hm"}}]}, Piece("Hm")),
        ({"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]}, Piece("", "a", "stop")),
        ({"message": {"content": "a"}, "done": True, "done_reason": "length"}, Piece("", "a", "length")),
        ({"message": {"thinking": "b"}, "done": False}, Piece("b")),
    ],
)
def test_text_of_an_event_is_found(event: dict[str, Any], piece: Piece) -> None:
    assert piece_of(event) == piece


@pytest.mark.parametrize("event", [{"choices": 1}, {"choices": ["x"]}, {"message": []}, {"error": {"message": "x"}}])
def test_event_of_another_format_is_an_error(event: dict[str, Any]) -> None:
    with pytest.raises(BadGatewayError):
        piece_of(event)


def test_conversation_sends_its_history(place: Workplace) -> None:
    spec = load_manifest(place.plugin / "plugin.yaml", {"AOG_DATA_DIR": str(place.home)}).service("chat")
    conversation = Conversation(spec, ChatParameters(system="S"))
    conversation.keep("one", [Picture("a.png", b"x")], "two")
    roles = [message["role"] for message in conversation.request("three")["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert len(conversation.request("three")["messages"][1]["content"]) == 2
    conversation.clear()
    assert len(conversation.request("three")["messages"]) == 2


# At a terminal.


@terminal
def test_conversation_at_a_terminal_prints_each_answer(place: Workplace) -> None:
    for name in ("tiny", "thinker"):
        (place.data / "models").mkdir(exist_ok=True)
        (place.data / "models" / name).touch()
    with Screen([*COMMAND, "chat"], place.env, place.plugin) as screen:
        screen.until("tiny answers")
        screen.prompt()
        screen.type("first" + ENTER)
        screen.until("1: first\r\n")
        screen.prompt()
        screen.type("second\x1b\rline" + ENTER)
        screen.until("3: second\r\nline\r\n")
        screen.prompt()
        screen.type("/clear" + ENTER)
        screen.prompt()
        screen.type("/system Be kind." + ENTER)
        screen.until("system prompt: Be kind.")
        screen.prompt()
        screen.type("//now" + ENTER)
        screen.until("2: /now\r\n")
        screen.prompt()
        screen.type("/nonsense" + ENTER)
        screen.until("unknown command /nonsense")
        screen.prompt()
        screen.type("/mod\t th\t" + ENTER)
        screen.until("thinker answers")
        screen.prompt()
        screen.type("deep" + ENTER)
        screen.until("I thought]0;title of: deep\r\n")
        screen.prompt()
        screen.type("/model absent" + ENTER)
        screen.until("no model is called 'absent'")
        screen.prompt()
        screen.type("/help" + ENTER)
        screen.until("Ctrl-C stops the answer")
        screen.prompt()
        screen.type(CTRL_C)
        screen.until("/bye or Ctrl-D exits.")
        screen.prompt()
        screen.type("/bye" + ENTER)
        assert screen.end() == 0
        assert screen.modes_now == screen.modes
    assert b"\x1b[2mLet me\x1b[0m" in screen.raw


@terminal
def test_missing_model_is_reported_before_the_first_prompt(place: Workplace) -> None:
    (place.data / "models").mkdir()
    (place.data / "models" / "tiny").touch()
    with Screen([*COMMAND, "chat", "--model", "tinny"], place.env, place.plugin) as screen:
        screen.until("no model is called 'tinny'")
        screen.until("Choose another: /model NAME")
        screen.prompt()
        screen.type("/model tiny" + ENTER)
        screen.until("tiny answers")
        screen.prompt()
        screen.type("hi" + ENTER)
        screen.until("1: hi\r\n")
        screen.prompt()
        screen.type(CTRL_D)
        assert screen.end() == 0
    assert "tinny answers" not in screen.raw.decode()


@terminal
def test_ctrl_c_cancels_only_the_answer(place: Workplace) -> None:
    """It cancels the answer and the engine's work on it, also before the answer begins."""
    with Screen([*COMMAND, "chat", "--model", "endless"], place.env, place.plugin) as screen:
        screen.prompt()
        screen.type("go" + ENTER)
        screen.until("more more ")
        screen.type(CTRL_C)
        screen.until("(interrupted)")
        screen.prompt()
        eventually(lambda: place.journal[-1] == "the answer was cut short")
        screen.type("/model silent" + ENTER)
        screen.until("no model is called 'silent'")
        screen.prompt()
        screen.type(CTRL_D)
        assert screen.end() == 0
        assert screen.modes_now == screen.modes
    assert place.journal[-1] == "stop"
    with Screen([*COMMAND, "chat", "--model", "silent"], place.env, place.plugin) as screen:
        screen.prompt()
        screen.type("go" + ENTER)
        eventually(lambda: place.journal[-1].startswith("chat "))
        screen.until("waiting for the model")
        screen.type(CTRL_C)
        screen.until("(interrupted)")
        screen.prompt()
        eventually(lambda: place.journal[-1] == "the silence was broken")
        screen.process.terminate()
        assert screen.end() == 143
        assert screen.modes_now == screen.modes
    assert screen.raw.rindex(b"\x1b[?2004l") > screen.raw.rindex(b"\x1b[?2004h")
    assert screen.raw.rindex(b"\x1b[?25h") > screen.raw.rindex(b"\x1b[?25l")


@terminal
def test_single_prompt_at_a_terminal_prints_one_answer(place: Workplace) -> None:
    with Screen([*COMMAND, "chat", "hi", "--model", "endless"], place.env, place.plugin) as screen:
        screen.until("more more ")
        screen.type(CTRL_C)
        screen.until("engine-plugin: interrupted")
        assert screen.end() == 130
        assert screen.modes_now == screen.modes
    assert "the answer was cut short" in place.journal
    with Screen([*COMMAND, "chat", "--json"], place.env, place.plugin) as screen:
        screen.until("Give a PROMPT")
        assert screen.end() == 2


@terminal
def test_ctrl_c_frees_the_slot_of_a_real_engine(workplace: Workplace) -> None:
    """The model answers one request at a time and never stops by itself, so the next answer proves a free slot."""
    shape = shipped("llamacpp")
    shape["engine"] |= {"backend": "xllamacpp", "threads": 1, "parallel": 1}
    write_manifest(workplace.plugin, shape)
    workplace.good("models", "pull", str(ENDLESS))
    chatting = [*COMMAND, "chat", "--model", ENDLESS.stem, "--max-tokens", "1000000"]
    with Screen(chatting, workplace.env, workplace.plugin) as screen:
        screen.until("answers. /help")
        for _ in range(2):
            screen.prompt()
            screen.type("go on" + ENTER)
            screen.until(" tiny")  # a word that it likes
            screen.more(300)
            screen.type(CTRL_C)
            screen.until("(interrupted)")
        screen.prompt()
        eventually(lambda: not computing(workplace))
        screen.type(CTRL_D)
        assert screen.end() == 0
        assert screen.modes_now == screen.modes


@terminal
@pytest.mark.parametrize("flavor", ["openai", "ollama"])
async def test_conversation_with_ollama_shows_thinking_and_stops_on_ctrl_c(
    workplace: Workplace, tmp_path: Path, flavor: str
) -> None:
    """In both flavors: thinking comes before the answer, and Ctrl-C closes the request."""
    manifest = (REPOSITORY / "plugins/ollama/plugin.yaml").read_text()
    (workplace.plugin / "plugin.yaml").write_text(
        manifest.replace("config_ref: openai:chat", f"config_ref: {flavor}:chat")
    )
    server = ContractServer(tmp_path / "ollama")
    env = workplace.env | {"OLLAMA_HOST": server.address}
    try:
        with Screen([*COMMAND, "chat", "--model", "think:8b"], env, workplace.plugin) as screen:
            screen.prompt()
            screen.type("hello" + ENTER)
            screen.until("\r\n\r\nYou said: hello\r\n")
            screen.prompt()
            server.fail("endless")
            screen.type("go on" + ENTER)
            screen.until("more more more")
            screen.type(CTRL_C)
            screen.until("(interrupted)")
            await server.wait("/api/chat", state="left")
            server.mend()
            screen.prompt()
            screen.type("again" + ENTER)
            screen.until("\r\n\r\nYou said: again\r\n")
            screen.prompt()
            screen.type(CTRL_D)
            assert screen.end() == 0
        said = [message["role"] for message in server.bodies("/api/chat")[-1]["messages"]]
    finally:
        server.close()
    assert b"\x1b[2mThe" in screen.raw
    assert said == ["user", "assistant", "user", "assistant", "user"]


def computing(place: Workplace) -> bool:
    """Whether its processes use the processor for more than moments."""

    def used() -> float:
        times = [process.cpu_times() for process in place.processes()]
        return sum(spent.user + spent.system for spent in times)

    before = used()
    time.sleep(0.5)  # the time that is measured
    return used() - before > 0.1
