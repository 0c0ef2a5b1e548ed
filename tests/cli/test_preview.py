"""``preview`` shows what ``fit`` would train, and needs no model."""

import re

import pytest

from cli.conftest import QUICK, REPOSITORY, TINY

CONFIG = f"--config={REPOSITORY}/configs/quickstart.yaml"
DATA = (f"--data.train={TINY}/chats_train.jsonl", f"--data.val={TINY}/chats_val.jsonl", f"--model.base={TINY}")


def test_the_configuration_of_a_run_is_shown(cli, tmp_path):
    shown = cli("preview", CONFIG, *DATA, "--data.predict=null", "--rows=2", "--html=page.html")
    for part in (
        "chats_train.jsonl:1",
        "chats_train.jsonl:2",
        "<|assistant|>",
        "<|end|>",
        "rows read",
        "trained tokens",
    ):
        assert part in shown.text
    assert "chats_train.jsonl:3" not in shown.text
    page = (tmp_path / "page.html").read_text()
    assert '<span class="trained">' in page
    assert "://" not in page  # a self-contained file
    assert not (tmp_path / "runs").exists()


def test_data_and_tokenizer_are_enough(cli):
    shown = cli(
        "preview",
        f"--data.train={TINY}/chats_train.jsonl",
        f"--data.tokenizer={TINY}",
        "--data.max_length=512",
        "--ids=true",
    )
    assert "[1020]" in shown.text  # <|end|>


def test_files_read_and_left_out_are_listed(cli, tmp_path):
    for name in ("train.jsonl", "test.jsonl", ".ipynb_checkpoints/train-checkpoint.jsonl"):
        (tmp_path / "chats" / name).parent.mkdir(parents=True, exist_ok=True)
        rows = (TINY / "chats_val.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "chats" / name).write_text("".join(rows[:9] + rows[:1]))
    shown = cli(
        "preview", "--data.train=chats", f"--data.tokenizer={TINY}", "--data.val_fraction=0", "--data.max_length=512"
    ).text
    assert re.search(r"read +chats/train\.jsonl \(10 rows\)", shown)
    assert re.search(r"left out +test\.jsonl, \.ipynb_checkpoints/", shown)
    assert re.search(r"exact duplicates +1: chats/train\.jsonl:10 is chats/train\.jsonl:1", shown)
    fitted = cli(
        "fit", *QUICK, "--data.train=chats", "--data.val=null", "--data.val_fraction=0", "--trainer.max_steps=1"
    ).text
    assert "train: read: chats/train.jsonl (10 rows)" in fitted
    assert "train: left out: test.jsonl, .ipynb_checkpoints/" in fitted


def test_trained_text_is_marked_without_a_terminal(cli):
    shown = cli("preview", *DATA, "--data.max_length=512", "--rows=1").text
    assert re.search(r"<\|assistant\|>«[^»]*<\|end\|>»", shown.replace("│\n│", ""))


def test_bad_options_are_named(cli):
    assert "data.test" in cli("preview", CONFIG, *DATA, "--data.predict=null", "--split=test", code=1).text
    assert "--rows" in cli("preview", CONFIG, *DATA, "--rows=0", code=1).text
    assert "data.tokenizer" in cli("preview", f"--data.train={TINY}/chats_train.jsonl", code=1).text
    assert "data.max_length" in cli("preview", *DATA, "--data.max_lenght=3", code=2).text


@pytest.mark.parametrize("name", ["messages_multiturn.jsonl", "messages_system.jsonl",
    "messages_parts_reasoning_tools.jsonl", "sharegpt_toolcall_en.json", "prompt_completion.jsonl",
    "text_sql.jsonl"])  # fmt: skip
def test_real_files_are_shown(cli, shared, real_chats, name):
    shown = cli("preview", f"--data.train={real_chats}/{name}", f"--data.tokenizer={shared}/phi3-mini-4k-instruct")
    assert "trained tokens" in shown.text


TABLE = (
    "--data.conversation_column=id",
    "--data.role_column=who",
    "--data.content_column=text",
    "--data.order_column=when",
)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("f18.b_us_dates.csv", TABLE, "data.order_column"),
        ("f21.chat.jsonl", ("--data.chat_template=.",), "data.chat_template"),
        ("f22.a_semicolon.csv", (), "semicolons"),
        ("f26.row.jsonl", ("--data.tools=native",), "data.tools: render"),
    ],
)
def test_unreadable_data_is_one_error(cli, tmp_path, name, options, named):
    refused = cli(
        "preview", f"--data.train={REPOSITORY}/tests/cases/{name}", f"--data.tokenizer={TINY}", "--data.max_length=512",
        *options, code=1,
    )  # fmt: skip
    [line] = [line for line in refused.text.splitlines() if line.startswith("error: ")]
    assert named in line
    assert "Traceback" not in refused.text
    assert not list(tmp_path.glob("*/"))
