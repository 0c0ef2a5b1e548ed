"""Bad input from the command line: one clear error, before the model is loaded, and nothing is overwritten."""

import json
import shutil
from pathlib import Path

import pytest

from cli.conftest import QUICK, TINY

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def rows(tmp_path: Path, *lines) -> str:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return f"--data.train={path}"


def with_message(**message) -> dict:
    return {"messages": [{"role": "user", "content": "Hi"}, message]}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", "chats.jsonl:2"),
        (with_message(role="robot", content="x"), "chats.jsonl:2"),
        (with_message(role="assistant", content=None), "chats.jsonl:2"),
        (with_message(role="assistant", content=[{"type": "image_url", "image_url": "x"}]), "chats.jsonl:2"),
        ({"messages": []}, "chats.jsonl:2"),
    ],
)
def test_a_bad_row_is_named(cli, tmp_path, bad, message):
    refused = cli("fit", *QUICK, rows(tmp_path, CHAT, bad, CHAT), "--trainer.max_steps=1", code=1)
    assert message in refused.text
    assert "Traceback" not in refused.text
    assert not list((tmp_path / "runs").rglob("*.ckpt"))


def test_missing_and_empty_files_are_named(cli, tmp_path):
    assert "nowhere.jsonl" in cli("fit", *QUICK, "--data.train=nowhere.jsonl", code=1).text
    assert "empty" in cli("fit", *QUICK, rows(tmp_path), code=1).text


@pytest.mark.parametrize("command", [("fit", "--trainer.max_steps=1"), ("preview",)])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.cache_dir=file/cache", "data.cache_dir: file/cache/phi3_lightning cannot be written"),
        ("--data.cache_dir=/proc/cache", "data.cache_dir: /proc/cache/phi3_lightning cannot be written"),
        ("--data.train=splits@main:train", "splits is a path here, and paths have no revisions"),
        ("--data.tokenizer=splits@main", "data.tokenizer: splits@main: splits is a path here"),
        ("--data.val=splits", "no single split in it is for data.val: test: test.jsonl; train: train.jsonl"),
        ("--data.val=splits/*.jsonl", "no single split in it is for data.val"),
        ("--data.group_by=customer", "data.group_by: 'customer' only decides which training rows validate"),
    ],
)
def test_unreadable_data_or_cache_are_one_line_errors(cli, tmp_path, command, option, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "splits").mkdir()
    for name in ("train", "test"):
        shutil.copy(TINY / "chats_val.jsonl", tmp_path / f"splits/{name}.jsonl")
    options = QUICK if command[0] == "fit" else QUICK[3:7]
    refused = cli(*command, *options, option, code=1)
    [error] = [line for line in refused.text.splitlines() if line.startswith("error:")]
    assert message in error
    assert "Traceback" not in refused.text
    assert not (tmp_path / "runs").exists()


def test_max_length_is_named_where_it_leaves_no_row(cli, tmp_path):
    long = {"messages": [{"role": "user", "content": "word " * 300}, {"role": "assistant", "content": "ok"}]}
    refused = cli("fit", *QUICK, rows(tmp_path, long), "--data.max_length=32", code=1)
    assert "max_length" in refused.text


def test_a_base_without_config_is_named(cli, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in cli("fit", *QUICK, "--model.base=empty", code=1).text


@pytest.mark.parametrize("kind", ["phi3small", "phi3_v", "phimoe", "llama"])
def test_other_architectures_are_refused_by_name(cli, tmp_path, kind):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "architectures": ["Other"]}))
    refused = cli("fit", *QUICK, "--model.base=base", f"--data.tokenizer={TINY}", code=1)
    assert kind in refused.text
    assert "Phi3ForCausalLM models work" in refused.text


def test_wrong_targets_are_named_with_what_exists(cli):
    refused = cli("fit", *QUICK, "--model.lora.target_modules=[query_proj, o_proj]", code=1)
    assert "query_proj matches no layer" in refused.text
    assert "qkv_proj" in refused.text
    refused = cli("fit", *QUICK, "--model.lora.target_modules=[q_proj, o_proj]", code=1)
    assert "set model.lora.backend: loralib, or name qkv_proj" in refused.text


def test_max_length_beyond_the_context_length_is_refused(cli):
    refused = cli("fit", *QUICK, "--data.max_length=4096", code=1)
    assert "data.max_length: 4096" in refused.text
    assert "1024" in refused.text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.lora.r=0", "model.lora.r"),
        ("--model.optimizer.lr=-1", "model.optimizer.lr"),
        ("--model.schedule.warmup=1.5", "model.schedule.warmup"),
        ("--trainer.precision=16-true", "bf16-mixed"),
        ("--model.attn_implementation=flash_attention_2", "use documents"),
        ("--run=a/b", "no plain folder name"),
        ("--ckpt_path=nowhere.ckpt", "nowhere.ckpt: there is no such checkpoint"),
        ("--trainer.accelerator=mps", "MPS"),
    ],
)
def test_impossible_values_are_named(cli, option, message):
    refused = cli("fit", *QUICK, "--trainer.max_steps=1", option, code=None)
    assert refused.status != 0
    assert message in refused.text


@pytest.mark.parametrize(
    ("option", "code", "message"),
    [
        ("--trainer.precision=bf17", 2, "trainer.precision: bf17 cannot be used: "),
        ("--trainer.strategy=dpp", 1, "trainer.strategy: 'dpp' cannot be used: "),
        ("--trainer.strategy.class_path=nowhere.Strategy", 2, "No module named 'nowhere'"),
        (
            "--trainer.strategy={class_path: phi3_lightning.FSDP2Strategy, init_args: text}",  # text to the parser
            1,
            "trainer.strategy: '{class_path: phi3_lightning.FSDP2Strategy, init_args: text}' cannot be used: ",
        ),
        ("--config=section.yaml", 2, "Problem with given class_path 'phi3_lightning.FSDP2Strategy': "),
    ],
)
def test_values_that_the_parser_refuses_are_one_line(cli, tmp_path, option, code, message):
    section = "{class_path: phi3_lightning.FSDP2Strategy, init_args: text}"
    (tmp_path / "section.yaml").write_text(f"trainer: {{strategy: {section}}}\n")
    refused = cli("fit", *QUICK, "--trainer.max_steps=1", option, code=code)
    [error] = [line for line in refused.text.splitlines() if line.startswith("error:")]
    assert message in error
    assert "Traceback" not in refused.text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.bse=x", "model.base"),
        ("--data.max_lenght=5", "data.max_length"),
        ("--model.lora.lora_alhpa=5", "model.lora.lora_alpha"),
        ("--optimizer=AdamW", "--model.optimizer.name"),
        ("--lr_scheduler=StepLR", "--model.schedule.name"),
    ],
)
def test_a_typo_names_the_nearest_option(cli, option, message):
    assert message in cli("fit", *QUICK, option, code=2).text


def test_a_typo_in_a_file_names_the_nearest_key(cli, tmp_path):
    (tmp_path / "a.yaml").write_text(f"model: {{base: {TINY}, lora: {{lora_alhpa: 5}}}}\n")
    assert "lora_alpha" in cli("fit", "--config=a.yaml", code=2).text


def test_class_path_form_is_refused_with_the_remedy(cli, tmp_path):
    (tmp_path / "a.yaml").write_text(
        f"model: {{class_path: phi3_lightning.Phi3LoRAModule, init_args: {{base: {TINY}}}}}\n"
    )
    assert "directly under model:" in cli("fit", "--config=a.yaml", code=2).text


def test_a_loss_that_is_not_finite_names_step_and_rows(cli, tmp_path):
    refused = cli("fit", *QUICK, "--trainer.max_steps=60", "--model.optimizer.lr=1e38",
                  "--model.schedule={name: constant, warmup: 0}", code=1)  # fmt: skip
    assert "optimiser step 2" in refused.text
    assert "chats_train.jsonl:" in refused.text
