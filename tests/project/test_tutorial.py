"""The tutorial, from its own page: each command in order, in one folder, on the tiny model, and what it promises."""

import json
import re
import shutil
from pathlib import Path

import pytest

from cli.conftest import REPOSITORY, TINY, start
from docs.blocks import Block, blocks_of, commands
from project.test_code_blocks import HUB

PAGE = REPOSITORY / "docs/tutorial.md"
BLOCKS = blocks_of(PAGE.read_text(encoding="utf-8"), "docs/tutorial.md")
REFUSED = re.compile(r"# refused$", re.MULTILINE)

# what a page for people with a GPU leaves to the recipe: the size of the model, and its speed
SMALL = """
trainer: {accelerator: cpu, devices: 1, max_steps: 20, max_epochs: -1, limit_val_batches: 2, accumulate_grad_batches: 1}
monitor: {base_drift: false, samples: 1, sample_tokens: 8}
evaluation: {rows: 4}
"""


def run_block(block: Block, folder: Path) -> str:
    """Run the commands of a block in a folder, and return what they printed."""
    printed = ""
    for words in commands(block.text):
        if words[:2] == ["python", "cli.py"]:
            run = start(folder, *words[2:])
            status = run.wait(300)
            assert status == (1 if REFUSED.search(block.text) else 0), f"{block}: {' '.join(words)}\n{run.text}"
            printed += run.text
        elif words[0] == "python":
            script = compile((folder / words[1]).read_text(encoding="utf-8"), words[1], "exec")
            exec(script, {"__name__": "__main__"})
        else:
            assert words[0] in ("source", "tensorboard"), f"{block}: is {words[0]} run here?"
    return printed


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a checkout; the base is the tiny model with a context of 4,096 tokens."""
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    base = tmp_path / HUB
    shutil.copytree(TINY, base)
    config = json.loads((base / "config.json").read_text())
    config |= {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
    (base / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["support_tickets.py", "--tickets", "120"])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_each_command_does_what_the_page_says(folder):
    printed, refusals = "", []
    for block in BLOCKS:
        if block.language == "yaml":
            (folder / "support.yaml").write_text(block.text + SMALL, encoding="utf-8")
        elif block.language == "bash" and block.reason is None:
            text = run_block(block, folder)
            printed += text
            refusals += [text] if REFUSED.search(block.text) else []
    shown = [block.text.strip().removeprefix("... ") for block in BLOCKS if block.language == "text"][1:]
    assert len(refusals) == len(shown) == 2
    for refusal, line in zip(refusals, shown, strict=True):
        assert line in refusal
    assert re.search(r"^(fits|may not fit|does not fit): ", printed, re.MULTILINE)
    files = "preview.html", "runs/support/test.html", "support-adapter/certificate.json", "support-adapter/README.md"
    assert all((folder / path).is_file() for path in files)
    assert "ADAPTER ./support-gguf-F32-LoRA.gguf" in (folder / "support-gguf/Modelfile").read_text()
    test = json.loads((folder / "runs/support/test.json").read_text())
    assert "new_tickets.csv" in json.dumps(test)


def test_every_step_but_ollama_is_run():
    skipped = [block for block in BLOCKS if block.language == "bash" and block.reason]
    assert ["ollama" in block.text for block in skipped] == [True]


def test_a_command_that_fails_is_found(folder):
    [block] = blocks_of("```bash\npython cli.py preview --data.train absent.csv\n```\n", "page")
    with pytest.raises(AssertionError, match=r"absent\.csv"):
        run_block(block, folder)
