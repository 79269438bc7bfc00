"""A conversation at a terminal. Ctrl-C stops the current answer only."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.shortcuts import CompleteStyle

from engine_plugin.cli.advice import explained
from engine_plugin.cli.conversation import SERVICE
from engine_plugin.cli.lookup import default_model, is_model, missing, model_to_call
from engine_plugin.cli.output import say
from engine_plugin.cli.session import serving
from engine_plugin.cli.terminal import AnswerPrinter, print_answer, waiting
from engine_plugin.errors import EnginePluginError, PluginProcessError, UnsupportedError
from engine_plugin.models.names import is_cloud_name
from engine_plugin.waiting import handling_signals

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from engine_plugin.cli.context import Options
    from engine_plugin.cli.conversation import Conversation, Picture
    from engine_plugin.host import PluginClient

__all__ = ["talk"]

_PROMPT = ">>> "
_COMMANDS = ("/bye", "/clear", "/help", "/model", "/system")
_HELP = """\
/model [NAME]   show the model, or switch to NAME
/system [TEXT]  show the system prompt, or replace it with TEXT
/clear          clear the conversation
/bye            exit; so does Ctrl-D
Ctrl-C stops the answer. Alt-Enter inserts a new line. A line that begins with // is sent with one slash."""

_QUICK = 1.0
_BY_SIGNAL = 128
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


async def talk(options: Options, conversation: Conversation, pictures: list[Picture], auto_pull: bool) -> None:
    """Answer the lines that are typed until /bye or Ctrl-D; `pictures` are sent with the first one.

    Called by `chat` at a terminal, whose mode is restored even after a signal. Raises the errors that end a
    conversation: the engine cannot be started, the plugin has died.
    """
    settings = conversation.settings
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None, "called from a coroutine"  # noqa: S101
    cancel: Callable[[], object] = task.cancel
    came: list[int] = []

    def end(number: int, _frame: object) -> None:
        came.append(number)
        loop.call_soon_threadsafe(cancel)

    ending = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]  # nohup
    try:
        with handling_signals(ending, end):
            async with serving(options, SERVICE, settings.model, auto_pull=auto_pull) as (client, settings.model):
                talk = _Talk(options, client, conversation, pictures, auto_pull)
                with handling_signals([signal.SIGINT], lambda *_: loop.call_soon_threadsafe(talk.interrupt)):
                    await talk.run()
    except asyncio.CancelledError:
        if came:
            sys.exit(_BY_SIGNAL + came[0])
        raise


@dataclass
class _Talk:
    """Handles the lines of a conversation."""

    options: Options
    client: PluginClient
    conversation: Conversation
    pictures: list[Picture]
    auto_pull: bool
    default: str = ""
    """The model that answers if none is chosen, "" if the plugin chooses it."""
    running: asyncio.Task[None] | None = None
    """The work that Ctrl-C cancels."""

    async def run(self) -> None:
        """Read and answer lines until the end of the conversation."""
        self.default = await default_model(self.client, SERVICE)
        names = await self._names()
        session = _prompt_session(names)
        if not await self._say_missing(names):
            say(f"{self._model()} answers. /help shows the commands; /bye or Ctrl-D exits.")
        while True:
            try:
                line = (await session.prompt_async(_PROMPT, handle_sigint=False)).strip()
            except KeyboardInterrupt:  # the prompt reads Ctrl-C as a key, not as a signal
                if not session.default_buffer.text:
                    say("/bye or Ctrl-D exits.")
                continue
            except EOFError:
                return
            if line == "/bye":
                return
            if line:
                await self._take(line)

    async def _names(self) -> list[str]:
        try:
            entries = await self.client.list_models(timeout=_QUICK)
            return [name for entry in entries for name in (entry.get("name", ""), *entry.get("references", ()))]
        except EnginePluginError:
            return []  # only completion needs them

    async def _say_missing(self, names: list[str]) -> bool:
        """If the chosen model is not among `names`, print that and how to choose another, and return True."""
        wanted = self.conversation.settings.model or self.default
        # An engine without a list may still have the model, and cloud models need not be listed.
        if (
            not names
            or not wanted
            or is_cloud_name(wanted)
            or any(is_model({"name": name}, wanted) for name in names)
        ):
            return False
        say(f"{await missing(self.client, wanted, names)}\nChoose another: /model NAME")
        return True

    def _model(self) -> str:
        named = self.conversation.settings.model or self.default
        return named or "the model that the plugin chooses"

    async def _take(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        try:
            match word:
                case "/clear":
                    self.conversation.clear()
                case "/help":
                    say(_HELP)
                case "/model":
                    await self._change_model(rest)
                case "/system":
                    self._change_system(rest)
                case _ if word.startswith("/") and word[1:].isalpha():
                    say(f"unknown command {word}. /help shows the commands; //{word[1:]} sends it as text.")
                case _:
                    await self._ask(line.removeprefix("/") if line.startswith("//") else line)
        except PluginProcessError:
            raise
        except EnginePluginError as error:
            say(explained(error))

    async def _ask(self, prompt: str) -> None:
        printer, pictures = AnswerPrinter(), list(self.pictures)
        asking = print_answer(self.client, self.conversation, prompt, pictures, printer)
        complete = await self._interruptible(asking)
        if complete or printer.text:
            self.conversation.keep(prompt, pictures, printer.text)
            self.pictures.clear()

    async def _change_model(self, name: str) -> None:
        if name:
            await self._interruptible(self._load(name))
        say(f"{self._model()} answers")

    async def _load(self, name: str) -> None:
        name = await model_to_call(self.client, self.options, SERVICE, name, auto_pull=self.auto_pull) or name
        with waiting(f"loading {name}"), suppress(UnsupportedError):  # the server loads models on demand
            await self.client.load_model(name)
        self.conversation.settings.model = name

    def _change_system(self, text: str) -> None:
        settings = self.conversation.settings
        settings.system = text or settings.system
        say(f"system prompt: {settings.system}" if settings.system else "there is no system prompt")

    async def _interruptible(self, work: Coroutine[Any, Any, None]) -> bool:
        """Run the work and return whether it was completed. Raises what the work raises."""
        task = self.running = asyncio.create_task(work)
        try:
            await asyncio.wait({task})
        finally:
            self.running = None
            if not task.done():  # cancelled from outside
                task.cancel()
                await asyncio.wait({task})
        if task.cancelled():
            click.echo("\r(interrupted)", err=True)
            return False
        task.result()
        return True

    def interrupt(self) -> None:
        """Cancel the running work, if there is any."""
        if self.running is not None:
            self.running.cancel()


def _prompt_session(models: list[str]) -> PromptSession[str]:
    """Create the line editor: history of this conversation only, completion by Tab, Alt-Enter for a new line."""
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    words = [*_COMMANDS, *(f"/model {name}" for name in models)]
    completer = WordCompleter(words, sentence=True)
    return PromptSession(
        completer=completer,
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        reserve_space_for_menu=0,
        key_bindings=keys,
    )
