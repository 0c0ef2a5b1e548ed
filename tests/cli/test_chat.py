"""``chat``: one answer, a script on stdin, and a person at a terminal."""

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import synthetic
from cli.conftest import QUICK, TINY, start
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.cli import main
from phi3_lightning.commands.chat import _piped
from phi3_lightning.commands.dialogue import Dialogue
from phi3_lightning.config import Generation
from phi3_lightning.data.template import ChatTemplate, load_tokenizer
from phi3_lightning.generation.decode import stream

CONFIG = ("--config=runs/phi3-lora/config.yaml",)
LAST = "--ckpt_path=runs/phi3-lora/checkpoints/last.ckpt"


def run_main(folder: Path, args: tuple[str, ...]) -> int:
    """In a forked process: run the command line on its new stdin, stdout and stderr; return the exit code."""
    os.chdir(folder)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, encoding="utf-8", buffering=1) for number, mode in enumerate("rww")
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.resetwarnings()
    try:
        main(["chat", *args])
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        return 70
    return 0


@dataclass
class Result:
    out: str
    err: str


def chat(folder: Path, *args: str, typed: str | bytes = "", code: int = 0) -> Result:
    """Run ``chat`` with ``typed`` on a stdin that is no terminal."""
    (folder / "typed").write_bytes(typed if isinstance(typed, bytes) else typed.encode())
    names = [folder / name for name in ("typed", "out", "err")]
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            for number, name in enumerate(names):
                os.dup2(os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            status = run_main(folder, args)
            sys.stdout.flush()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    result = Result(names[1].read_text(), names[2].read_text())
    assert status == code, result
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run that has learnt to end answers with the shop's farewell."""
    folder = tmp_path_factory.mktemp("chat")
    run = start(folder, "fit", *QUICK, "--trainer.max_steps=40", "--model.schedule.warmup=2")
    assert run.wait() == 0, run.text
    return folder


TOKENS = "--model.generation.max_new_tokens=60"


def test_stdout_holds_nothing_but_the_answer(trained):
    result = chat(trained, *CONFIG, TOKENS, "--prompt=Are you open on Sunday?")
    assert result.out.endswith("Keep your lantern lit.\n")
    assert result.out.count("\n") == 1
    assert "last.ckpt: taken" in result.err
    assert "Traceback" not in result.err


def test_a_checkpoint_alone_is_enough(trained):
    alone = chat(trained, LAST, TOKENS, "--prompt=Are you open on Sunday?")
    assert alone.out == chat(trained, *CONFIG, TOKENS, "--prompt=Are you open on Sunday?").out


def test_answers_are_those_of_predict(trained, tmp_path):
    (trained / "prompts.jsonl").write_text('{"prompt": "Are you open on Sunday?"}\n')
    run = start(trained, "predict", *CONFIG, TOKENS, "--data.predict=prompts.jsonl")
    assert run.wait() == 0, run.text
    [line] = (trained / "runs/phi3-lora/predictions.jsonl").read_text().splitlines()
    result = chat(trained, *CONFIG, TOKENS, "--prompt=Are you open on Sunday?")
    assert result.out == json.loads(line)["answer"] + "\n"


def test_a_script_is_answered_line_by_line(trained):
    script = (
        "Are you open on Sunday?\n\n/base\nAre you open on Sunday?\n/base\n/reset\nAre you open on Sunday?\n/exit\nNo\n"
    )
    result = chat(trained, *CONFIG, TOKENS, typed=script)
    tuned, base, again = result.out.splitlines()
    assert tuned == again != base
    assert tuned.endswith("Keep your lantern lit.")
    assert "Keep your lantern lit." not in base
    assert "you>" not in result.out + result.err
    assert "the base answers" in result.err


def test_history_and_system_messages_reach_the_model(trained):
    first = chat(trained, *CONFIG, TOKENS, typed="Hello\nAnd on Friday?\n").out.splitlines()
    assert len(first) == 2
    alone = chat(trained, *CONFIG, TOKENS, "--prompt=And on Friday?").out
    assert first[1] + "\n" != alone
    system = "Answer in one short line, without greetings."
    by_option = chat(trained, *CONFIG, TOKENS, f"--system={system}", "--prompt=Hello").out
    by_command = chat(trained, *CONFIG, TOKENS, typed=f"/system {system}\nHello\n").out
    assert by_option == by_command != chat(trained, *CONFIG, TOKENS, "--prompt=Hello").out


def test_an_adapter_in_peft_s_format_answers_as_the_checkpoint_does(trained):
    run = start(trained, "export", LAST, "--output_dir=out-peft", "--overwrite")
    assert run.wait() == 0, run.text
    result = chat(trained, "--ckpt_path=out-peft", f"--model.base={TINY}", TOKENS, "--prompt=Hello")
    assert result.out == chat(trained, *CONFIG, TOKENS, "--prompt=Hello").out


def test_an_adapter_of_loralib_answers(trained):
    pytest.importorskip("loralib")
    module = synthetic.randomised(Phi3LoRAModule(str(TINY), lora={"backend": "loralib", "r": 4, "lora_alpha": 8}))
    torch.save(module.adapter.state_dict(), trained / "lora.pt")
    template = ChatTemplate(load_tokenizer(str(TINY)))
    prompt = Dialogue(template, 1024, 40).ask("Hello").ids
    with module.autocast():
        ids = list(stream(module.model.eval(), prompt, template.stop_ids, Generation(max_new_tokens=40)))
    shape = ("--model.lora.r=4", "--model.lora.lora_alpha=8", f"--model.base={TINY}")
    result = chat(trained, "--ckpt_path=lora.pt", *shape, TOKENS, "--prompt=Hello")
    assert result.out == template.tokenizer.decode(ids, skip_special_tokens=True) + "\n"
    assert "lora.pt: taken; the file does not record how its LoRA deltas are scaled" in result.err


def test_a_merged_model_is_a_base(trained):
    run = start(trained, "export", LAST, "--output_dir=out-merged", "--merge", "--overwrite", "--dtype=float32")
    assert run.wait() == 0, run.text
    merged = ("--model.base=out-merged", "--run=none", TOKENS, "--prompt=Are you open on Sunday?")
    assert chat(trained, *merged).out.endswith("Keep your lantern lit.\n")
    refused = chat(trained, "--ckpt_path=out-merged", TOKENS, "--prompt=Hello", code=1)
    assert "give it as --model.base" in refused.err


def test_the_base_alone_answers_where_there_is_no_checkpoint(trained):
    result = chat(trained, f"--model.base={TINY}", "--run=none", TOKENS, "--prompt=Hello")
    assert "no checkpoint" in result.err
    assert "Keep your lantern lit." not in result.out


def test_bad_input_is_reported_and_the_chat_continues(trained):
    typed = f"/nope\n{'word ' * 1100}\n <|end|><|assistant|>\nHello\n"
    result = chat(trained, *CONFIG, TOKENS, typed=typed)
    assert "there is no /nope" in result.err
    assert "the message is too long" in result.err
    assert len(result.out.splitlines()) == 2
    too_long = chat(trained, *CONFIG, TOKENS, f"--prompt={'word ' * 1100}", code=1)
    assert "error: the message is too long" in too_long.err
    assert too_long.out == ""
    assert "not UTF-8" in chat(trained, *CONFIG, TOKENS, typed=b"Gr\xfc\xdfe\n", code=1).err
    assert chat(trained, *CONFIG, TOKENS, typed="").out == ""
    assert "prompt" in chat(trained, *CONFIG, "--prompt= ", code=2).err
    assert "none.ckpt: there is no such checkpoint" in chat(trained, "--ckpt_path=none.ckpt", "--prompt=x", code=1).err
    assert "model.lora.r" in chat(trained, *CONFIG, "--model.lora.r=8", "--prompt=x", code=1).err


def test_a_system_message_that_the_run_refuses_ends_no_chat(trained):
    answer = chat(trained, *CONFIG, TOKENS, "--data.system=refuse", typed="/system Be brief.\nHello\n")
    assert "error: system: the model was trained without system messages" in answer.err
    assert answer.out == chat(trained, *CONFIG, TOKENS, "--prompt=Hello").out


def test_a_script_is_utf_8_whatever_the_platform_s_encoding(monkeypatch):
    script = io.TextIOWrapper(io.BytesIO("Grüße\r\n\n /x 😀\n".encode()), encoding="latin-1")
    monkeypatch.setattr(sys, "stdin", script)
    assert list(_piped()) == ["Grüße", " /x 😀"]


def test_truncated_answers_and_dropped_turns_are_reported(trained):
    result = chat(trained, *CONFIG, "--model.generation.max_new_tokens=2", "--prompt=Hello")
    assert "cut after model.generation.max_new_tokens 2" in result.err
    script = "".join(f"Number {number}: {'word ' * 60}\n" for number in range(16))
    assert (
        "no longer fit into the context"
        in chat(trained, *CONFIG, "--model.generation.max_new_tokens=2", typed=script).err
    )


class Terminal:
    """A person at a terminal of their own."""

    def __init__(self, folder: Path, *args: str) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            status = 70
            try:
                status = run_main(folder, args)
            finally:
                os._exit(status)
        self.seen = ""

    def until(self, pattern: str, seconds: float = 90) -> str:
        """Read until the pattern is shown; return it, and drop the text before it."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self.terminal], [], [], max(end - time.monotonic(), 0))
            assert ready, f"waited in vain for {pattern!r}; the terminal shows:\n{self.seen}"
            try:
                self.seen += os.read(self.terminal, 4096).decode(errors="replace")
            except OSError:  # the other side has closed
                raise AssertionError(f"no {pattern!r}; the terminal showed:\n{self.seen}") from None
        before, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def press_until(self, key: str, pattern: str) -> None:
        """Press a key until the pattern is shown: a signal just before readline waits is handled at the next key."""
        for _ in range(10):
            self.type(key)
            with contextlib.suppress(AssertionError):
                self.until(pattern, seconds=2)
                return
        raise AssertionError(f"no {pattern!r}; the terminal shows:\n{self.seen}")

    def end(self, seconds: float = 30) -> int:
        """Wait until the chat is over; return its exit code."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if select.select([self.terminal], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # the other side has closed
                    self.seen += os.read(self.terminal, 4096).decode(errors="replace")
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"the chat did not end; the terminal shows:\n{self.seen}")


def test_a_terminal_session_handles_commands_and_ctrl_c(trained):
    # an answer that does not end by itself: it is sampled from all tokens, up to the context length
    endless = ("--model.generation.max_new_tokens=900", "--model.generation.do_sample=true",
               "--model.generation.temperature=50")  # fmt: skip
    person = Terminal(trained, *CONFIG, *endless)
    person.until("you> ")
    person.type("Hello\r")
    person.until("tuned> .{20}")
    person.type("\x03")  # Ctrl-C stops the answer, and the chat continues
    person.until("stopped")
    person.until("you> ")
    person.type("/base\r")
    person.until("the base answers")
    person.until("you> ")
    person.type("Hello\r")
    person.until("base> .{20}")
    person.type("\x03")
    person.until("you> ")
    person.type("half a line")
    person.until("half a line")
    person.press_until("\x03", "Ctrl-D leaves")  # Ctrl-C at the prompt discards the line
    person.until("you> ")
    person.type("/help\r")
    person.until("clear the history")
    person.until("you> ")
    person.type("\x04")
    assert person.end() == 0


def test_an_interrupted_script_ends(trained, tmp_path):
    out, err = tmp_path / "out", tmp_path / "err"
    out.touch()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            reading, writing = os.pipe()
            os.write(writing, b"Hello\n")
            os.dup2(reading, 0)
            os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
            os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
            status = run_main(trained, (*CONFIG, TOKENS))
        finally:
            os._exit(status)
    end = time.monotonic() + 60
    while "lantern" not in out.read_text() and time.monotonic() < end:  # it now waits for the next line
        time.sleep(0.05)
    status = None
    while status is None and time.monotonic() < end:
        os.kill(pid, signal.SIGINT)  # repeated: a signal just before a read is handled after it
        time.sleep(0.5)
        ended, found = os.waitpid(pid, os.WNOHANG)
        status = os.waitstatus_to_exitcode(found) if ended else None
    if status is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert status == 130, err.read_text()


def test_the_help_explains_the_commands(trained):
    result = chat(trained, "--help")
    for part in ("--prompt", "--system", "--ckpt_path", "/base"):
        assert part in result.out
