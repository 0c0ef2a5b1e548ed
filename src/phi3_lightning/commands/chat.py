"""``chat``: a conversation in the terminal with a checkpoint, an adapter or a base."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from jsonargparse.typing import NotEmptyStr

from phi3_lightning.commands.dialogue import Dialogue
from phi3_lightning.commands.loading import DATA_KEYS, LoadedRun, open_module
from phi3_lightning.commands.parser import Parser, RunConfig
from phi3_lightning.errors import DataError
from phi3_lightning.generation.stream import Text, stream
from phi3_lightning.module import Phi3LoRAModule

DESCRIPTION = "Talk to a checkpoint, an adapter or the base in the terminal."

HELP = """\
/base          let the base answer, or the tuned model again
/system TEXT   set the system message; without TEXT there is none
/reset         forget what was said
/help          show this
/exit          leave, as Ctrl-D does; Ctrl-C stops an answer
A message that begins with / has a space before it."""


def parser() -> Parser:
    """Return the parser of ``chat``, which takes the configuration of a run as it is."""
    result = Parser(
        prog="cli.py chat",
        description=DESCRIPTION,
        epilog="In a chat: " + "; ".join(" ".join(line.split()) for line in HELP.splitlines()),
    )
    result.add_argument("-c", "--config", action=RunConfig, help="Configuration of a run.")
    result.add_argument(
        "--ckpt_path", type=str | None, default=None,
        help="last, best, a checkpoint (.ckpt), a folder with an adapter in PEFT's format, or a file of loralib's "
        "(.pt). null: the best of --run, or its newest; where there is none, the base answers.",
    )  # fmt: skip
    result.add_argument(
        "--prompt", type=NotEmptyStr | None, default=None, help="Answer this alone, on stdout, and leave."
    )
    result.add_argument("--system", type=str | None, default=None, help="The system message.")
    result.add_lightning_class_args(Phi3LoRAModule, "model")
    result.add_argument("--data", type=dict[str, Any], default={}, help=f"{', '.join(DATA_KEYS)} count.")
    result.add_argument("--run", type=str, default="phi3-lora", help="Name of the run, where no ckpt_path is given.")
    result.add_argument(
        "--trainer", type=dict[str, Any], default={}, help="accelerator, devices, precision and default_root_dir count."
    )
    result.add_argument("--seed_everything", type=int | bool, default=42, help="Of answers that are drawn (do_sample).")
    result.accept_rest_of_run()
    return result


def main(args: list[str]) -> None:
    """Run the command.

    Args:
        args: The arguments after ``chat``.

    Raises:
        CheckpointError: If checkpoint or adapter cannot be read, or do not belong to the base.
        ConfigError: If options cannot be used.
        DataError: If the one prompt cannot be answered.
        ModelError: If the base cannot be loaded.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    options = parser()
    opened = open_module(options, args)
    chat = Chat(opened, opened.config.system)
    try:
        if opened.config.prompt is not None:
            chat.turn(opened.config.prompt)
        else:
            _converse(chat)
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as the shell has it
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
        sys.exit(141)  # 128 + SIGPIPE


class Chat:
    """A module that talks.

    Args:
        opened: The module, its template and what it computes in.
        system: The system message.
    """

    def __init__(self, opened: LoadedRun, system: str | None) -> None:
        self._module, self._trainer, self._template = opened.module, opened.trainer, opened.template
        assert self._module.model is not None  # loaded
        window, room = self._module.model.config.max_position_embeddings, self._module.generation.max_new_tokens
        self.dialogue = Dialogue(opened.template, window, room, opened.system, system)
        self.base = False
        """Whether the base answers and not the tuned model."""

    def turn(self, text: str) -> None:
        """Answer a message on stdout.

        Args:
            text: The message.

        Raises:
            DataError: If it cannot be rendered, or is too long.
            KeyboardInterrupt: On Ctrl-C; what was said by then is kept.
        """
        prompt = self.dialogue.ask(text)
        if prompt.forgotten:
            notice(f"the oldest {prompt.forgotten} exchange(s) no longer fit into the window, and are forgotten")
        said = Text(self._template.tokenizer)
        try:
            self._speak(prompt.ids, said)
        except KeyboardInterrupt:
            if not said.shown:
                self.dialogue.take_back()
                raise
            write("\n")
            self.dialogue.answer(said.shown)
            raise
        write("\n")
        self.dialogue.answer(said.shown)

    def _speak(self, ids: list[int], said: Text) -> None:
        module, generation = self._module, self._module.generation
        assert module.model is not None  # loaded
        who = module.base_answers() if self.base else contextlib.nullcontext()
        token = None
        with self._trainer.precision_plugin.forward_context(), module.autocast(), who:
            for token in stream(module.model, ids, self._template.stop_ids, generation):
                write(said.add(token))
        write(said.rest())
        if token not in self._template.stop_ids:
            notice(f"\ncut after model.generation.max_new_tokens {generation.max_new_tokens}, or at the window's end")

    def command(self, line: str) -> bool:
        """Do what a line that begins with / says.

        Args:
            line: The line.

        Returns:
            Whether the chat goes on.
        """
        name, _, rest = line.partition(" ")
        if name == "/exit":
            return False
        if name == "/base":
            self.base = not self.base
            notice("the base answers" if self.base else "the tuned model answers")
        elif name == "/system":
            self.dialogue.system = rest.strip() or None
            notice(f"system: {self.dialogue.system or 'none'}")
        elif name == "/reset":
            self.dialogue.forget()
            notice("forgotten")
        else:
            notice(HELP if name == "/help" else f"there is no {name}\n{HELP}")
        return True


def _converse(chat: Chat) -> None:
    interactive = sys.stdin.isatty()
    if interactive:
        notice("/help shows what can be done; Ctrl-D leaves")
    for line in _typed() if interactive else _piped():
        try:
            if line.startswith("/"):
                if not chat.command(line):
                    return
                continue
            if interactive:
                write("base> " if chat.base else "tuned> ")
            chat.turn(line)
        except KeyboardInterrupt:
            if not interactive:
                raise
            notice("stopped")
        except DataError as error:
            notice(f"error: {error}")


def _typed() -> Iterator[str]:
    """Lines from a terminal, until Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, which gives input() a history
    while True:
        try:
            line = input("you> ")
        except KeyboardInterrupt:
            notice("\nCtrl-D leaves")
            continue
        except EOFError:
            write("\n")
            return
        if line.strip():
            yield line


def _piped() -> Iterator[str]:
    try:
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
    except UnicodeDecodeError as error:
        raise DataError(f"stdin: not UTF-8 ({error}); convert it") from error


def write(text: str) -> None:
    """Write a part of an answer, at once."""
    print(text, end="", flush=True)


def notice(text: str) -> None:
    """Say something that is no answer."""
    print(text, file=sys.stderr, flush=True)
