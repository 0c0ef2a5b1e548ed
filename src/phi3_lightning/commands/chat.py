"""``chat``: a conversation in the terminal with a checkpoint, an adapter or a base."""

import contextlib
import os
import sys
from collections.abc import Iterator

from jsonargparse.typing import NotEmptyStr

from phi3_lightning.commands.dialogue import Dialogue
from phi3_lightning.commands.loading import DATA_KEYS, LoadedRun, open_module
from phi3_lightning.commands.parser import Parser, add_run, command_parser
from phi3_lightning.commands.quiet import quieten_trainers
from phi3_lightning.errors import ConfigError, DataError
from phi3_lightning.generation.decode import stream
from phi3_lightning.generation.detokenize import IncrementalDetokenizer
from phi3_lightning.module import Phi3LoRAModule

DESCRIPTION = "Talk to a checkpoint, an adapter or the base in the terminal."

HELP = """\
/base          let the base answer, or the tuned model again
/system TEXT   set the system message; without TEXT there is none
/reset         clear the history
/help          show this
/exit          leave, as Ctrl-D does; Ctrl-C stops an answer
A message that begins with / has a space before it."""


def parser() -> Parser:
    """Return the parser of ``chat``."""
    result = command_parser(
        "chat",
        DESCRIPTION,
        {"model": Phi3LoRAModule},
        {"data": ", ".join(DATA_KEYS), "trainer": "accelerator, devices, precision and default_root_dir"},
        epilog="In a chat: " + "; ".join(" ".join(line.split()) for line in HELP.splitlines()),
    )
    add_run(
        result,
        "last, best, a checkpoint (.ckpt), a folder with an adapter in PEFT's format, or a file of loralib's (.pt). "
        "null: the best of --run, or its newest; where there is none, the base answers.",
    )
    result.add_argument(
        "--prompt", type=NotEmptyStr | None, default=None, help="Answer this alone, on stdout, and leave."
    )
    result.add_argument("--system", type=str | None, default=None, help="The system message.")
    result.accept_rest_of_run()
    return result


def main(args: list[str]) -> None:
    """Run the command with the arguments after ``chat``."""
    quieten_trainers()
    run = open_module(parser(), args)
    chat = Chat(run)
    try:
        if run.config.prompt is not None:
            chat.turn(run.config.prompt)
        else:
            _converse(chat)
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as the shell has it
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
        sys.exit(141)  # 128 + SIGPIPE


class Chat:
    """A chat with a loaded module."""

    def __init__(self, run: LoadedRun) -> None:
        self._module, self._trainer, self._template = run.module, run.trainer, run.template
        context_length = self._module.loaded_model.config.max_position_embeddings
        answer_length = self._module.generation.max_new_tokens
        self.dialogue = Dialogue(run.template, context_length, answer_length, run.system, run.config.system)
        self.base = False
        """Whether the base answers and not the tuned model."""

    def turn(self, text: str) -> None:
        """Answer a message on stdout; the part of an answer before Ctrl-C stays in the history.

        Raises:
            DataError: If the message cannot be rendered, or is too long.
        """
        prompt = self.dialogue.ask(text)
        if prompt.dropped:
            notice(f"the oldest {prompt.dropped} exchange(s) no longer fit into the context, and are dropped")
        answer = IncrementalDetokenizer(self._template.tokenizer)
        try:
            self._generate(prompt.ids, answer)
        except KeyboardInterrupt:
            if not answer.text:
                self.dialogue.take_back()
                raise
            write("\n")
            self.dialogue.answer(answer.text)
            raise
        write("\n")
        self.dialogue.answer(answer.text)

    def _generate(self, ids: list[int], answer: IncrementalDetokenizer) -> None:
        module, generation = self._module, self._module.generation
        adapter = module.base_answers() if self.base else contextlib.nullcontext()
        token = None
        with self._trainer.precision_plugin.forward_context(), module.autocast(), adapter:
            for token in stream(module.loaded_model, ids, self._template.stop_ids, generation):
                write(answer.add(token))
        write(answer.flush())
        if token not in self._template.stop_ids:
            notice(f"\ncut after model.generation.max_new_tokens {generation.max_new_tokens}, or at the context's end")

    def command(self, line: str) -> bool:
        """Run a line that begins with /, and return whether the chat continues."""
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
            notice("history cleared")
        else:
            notice(HELP if name == "/help" else f"there is no {name}\n{HELP}")
        return True


def _converse(chat: Chat) -> None:
    interactive = sys.stdin.isatty()
    if interactive:
        notice("/help shows the commands; Ctrl-D leaves")
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
        except (ConfigError, DataError) as error:  # the first where the run refuses system messages
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
    """Lines of a script in UTF-8, whatever the encoding of the platform."""
    try:
        yield from (line.rstrip("\r\n") for line in map(bytes.decode, sys.stdin.buffer) if line.strip())
    except UnicodeDecodeError as error:
        raise DataError(f"stdin: not UTF-8 ({error}); convert it") from error


def write(text: str) -> None:
    """Write a part of an answer on stdout, at once."""
    print(text, end="", flush=True)


def notice(text: str) -> None:
    """Write a line that is no answer on stderr."""
    print(text, file=sys.stderr, flush=True)
