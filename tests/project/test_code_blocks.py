"""Each code block of the README and the guides does what the page says: Python runs, options and commands exist.

Blocks that cannot run here are marked with the reason: ``<!-- not run: needs a GPU -->`` above them.
"""

import json
import logging
import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml

from cli.conftest import REPOSITORY, TINY, start
from docs.blocks import Block, all_blocks, blocks_of, commands
from phi3_lightning import ChatDataModule, Phi3LoRAModule, adapters
from phi3_lightning.config import LoRA
from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.formats import parse_row
from phi3_lightning.errors import Phi3LightningError
from phi3_lightning.model import base as base_model

sys.path.insert(0, str(REPOSITORY / "scripts"))
from command_line import parse

HUB = "microsoft/Phi-3-mini-4k-instruct"
"""The base that the guides name; the embedded tiny one replaces it."""

EXTRAS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)


# ---------------------------------------------------------------------- names on the pages


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a context length of 4,096 tokens, as Phi-3-mini-4k has."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``my-bot``, the adapter of a one-step run for PEFT and for loralib."""
    folder = tmp_path_factory.mktemp("exported")
    fit = (
        "fit", f"--model.base={base}", f"--data.train={TINY}/chats_val.jsonl", "--trainer.max_steps=1", "--run=bot",
        "--trainer.accelerator=cpu", "--trainer.devices=1", "--data.num_workers=0", "--monitor.base_drift=false",
        "--monitor.samples=0", "--trainer.logger=false", "--data.batch_size=1", f"--data.cache_dir={folder}/cache",
    )  # fmt: skip
    export = ("export", "--run=bot", f"--model.base_id={HUB}")
    for arguments in (fit, (*export, "--output_dir=my-bot"), (*export, "--output_dir=lora", "--format=loralib")):
        run = start(folder, *arguments)
        assert run.wait() == 0, run.text
    for name in ("lora.json", "lora.pt"):
        shutil.copy(folder / "lora" / name, folder / "my-bot" / name)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a checkout, with the chats and the run that the pages mention."""
    for name in ("src", "configs", "scripts", "examples", "benchmarks"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    rows = (TINY / "chats_val.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    (tmp_path / "chats.jsonl").write_text("\n".join(rows), encoding="utf-8")
    recipe = REPOSITORY / "configs/phi3_mini_4k_lora.yaml"
    for name in ("my-bot", "quickstart"):
        (tmp_path / f"runs/{name}").mkdir(parents=True)
        shutil.copy(recipe, tmp_path / f"runs/{name}/config.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


# ---------------------------------------------------------------------- Python


def _loralib_state(base: Path) -> dict[str, Any]:
    """The values that the page on adapters calls ``state``, ``targets`` and ``names``."""
    names = ["qkv_proj", "o_proj"]
    model = base_model.load(str(base))
    adapter = adapters.attach(model, LoRA(backend="loralib", target_modules=names))
    halves = {target.path: adapter.lora_AB(target) for target in adapter.targets}
    state = {f"{path}.lora_{half}": pair["AB".index(half)] for path, pair in halves.items() for half in "AB"}
    return {"state": state, "targets": adapter.targets, "names": names}


def known(page: str, base: Path) -> dict[str, Any]:
    """The names that a page introduces in its text before its blocks use them."""
    if page == "docs/adapters.md":
        return _loralib_state(base)
    return {"pl": pl, "Phi3LoRAModule": Phi3LoRAModule, "ChatDataModule": ChatDataModule, "base": str(base)}


def run_python(block: Block, names: dict[str, Any], base: Path) -> None:
    """Run a block on the tiny base."""
    exec(compile(block.text.replace(HUB, str(base)), str(block), "exec"), names)


@pytest.mark.filterwarnings("ignore:.*tensorboardX.*", "ignore:.*`max_epochs` was not set.*")
@pytest.mark.parametrize("block", all_blocks("python"), ids=str)
def test_python_runs(block, base, here, request, caplog):
    if "my-bot" in block.text:
        (here / "my-bot").symlink_to(request.getfixturevalue("exported") / "my-bot")
    caplog.set_level(logging.ERROR, logger="lightning.pytorch")
    names = known(block.page, base)
    run_python(block, names, base)
    if "model" in names and "my-bot" in block.text:  # the adapter is in it
        assert any(
            parameter.abs().sum() > 0 for name, parameter in names["model"].named_parameters() if "lora_B" in name
        )


def test_a_wrong_block_fails(base, here):
    [block] = blocks_of("```python\nfrom phi3_lightning import Phi3LoRAModule\nPhi3LoRAModule(bse='x')\n```\n", "page")
    with pytest.raises(TypeError, match="bse"):
        run_python(block, {}, base)


# ---------------------------------------------------------------------- YAML and JSON


def parts(text: str) -> list[dict[str, Any]]:
    """The configurations in a block, one by one: some blocks show a section in several forms."""
    return [yaml.safe_load(part) for part in re.split(r"^(?=\w)", text, flags=re.MULTILINE) if part.strip()]


def check_yaml(part: dict[str, Any], folder: Path) -> None:
    """Parse a configuration as the command line does, and check the adapter's section."""
    whole = {"model": {"lora": part["lora"]}} if "lora" in part else part
    (folder / "part.yaml").write_text(yaml.safe_dump(whole), encoding="utf-8")
    options = parse(["fit", "--config=configs/quickstart.yaml", "--config=part.yaml"])
    LoRA(**options.model.lora.as_dict())


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=str)
def test_yaml_is_a_configuration(block, here):
    found = parts(block.text)
    assert found
    for part in found:
        check_yaml(part, here)


@pytest.mark.parametrize(
    ("text", "error"), [("monitor: {sample: 3}", SystemExit), ("lora: {r: 0}", Phi3LightningError)]
)
def test_wrong_yaml_is_refused(text, error, here):
    [part] = parts(text)
    with pytest.raises(error):
        check_yaml(part, here)


@pytest.mark.parametrize("block", all_blocks("json"), ids=str)
def test_json_is_a_chat(block):
    for line in block.text.splitlines():
        assert parse_row(json.loads(line), RowOptions())


# ---------------------------------------------------------------------- shell


def _check_script(words: list[str]) -> None:
    script = REPOSITORY / words[0]
    sources = "".join(path.read_text(encoding="utf-8") for path in [script, *script.parent.rglob("*.py")])
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert f'"{option}"' in sources, f"{words[0]} has no {option}"


def _check_cli(arguments: list[str]) -> None:
    if arguments[0] in ("chat", "export"):
        arguments = [*arguments, "--model.base=unknown"]  # the checkpoint names the real one
    try:
        parse(arguments)
    except SystemExit:
        raise AssertionError(f"refused: {' '.join(arguments)}") from None


def check_command(words: list[str]) -> None:
    """Check that a command of a page and its options exist."""
    program, *rest = words
    program = program.removeprefix(".venv/bin/")
    if program == "phi3-lightning":
        _check_cli(rest)
    elif program == "python" and rest[0] == "cli.py":
        _check_cli(rest[1:])
    elif program == "torchrun":
        _check_cli(rest[rest.index("cli.py") + 1 :])
    elif program == "sbatch":
        assert (REPOSITORY / rest[0]).is_file()
        _check_cli(["fit", *rest[1:]])
    elif program == "python" and rest[0].endswith(".py"):
        _check_script(rest)
    elif program == "make":
        assert rest[0] in TARGETS, f"no target {rest[0]}"
    elif "pip" in words:
        for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            assert set(extra.split(",")) <= EXTRAS.keys(), f"no extra {extra}"
    else:
        known_here = ("source", "tensorboard", "python3", "python", "export", "git", "cd")
        assert program in known_here, f"is {program} run here? mark the block `not run`, with the reason"


# the commands of the tutorial are run, by test_tutorial
RUN = [block for block in all_blocks("bash") if block.reason is None and block.page != "docs/tutorial.md"]


@pytest.mark.parametrize("block", RUN, ids=str)
def test_commands_and_options_exist(block, here):
    found = commands(block.text)
    assert found
    for words in found:
        check_command(words)


@pytest.mark.parametrize(
    "command",
    [
        "python cli.py fit --config configs/quickstart.yaml --model.lora.rank 8",
        "python cli.py predict --config configs/absent.yaml",
        "python cli.py teach",
        "python scripts/shrink_base.py a b --colour red",
        "make coffee",
        "pip install 'phi3-lightning[coffee]'",
        "vllm serve my-bot",
    ],
)
def test_a_wrong_command_fails(command, here):
    with pytest.raises(AssertionError):
        check_command(commands(command)[0])


def test_blocks_that_do_not_run_say_why():
    skipped = [block for language in ("bash", "python", "yaml") for block in all_blocks(language) if block.reason]
    assert all(len(block.reason) > 10 for block in skipped)
    assert {block.page for block in skipped} <= {"docs/evaluation.md", "docs/export.md", "docs/tutorial.md"}
