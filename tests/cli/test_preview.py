"""``preview`` shows what ``fit`` would train, and needs no model."""

import pytest

from cli.conftest import REPOSITORY, TINY

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
    assert "http" not in page  # one file that needs nothing else
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


def test_what_cannot_be_shown(cli):
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
