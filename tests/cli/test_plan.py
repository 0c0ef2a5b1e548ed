"""``plan``: a prediction from configurations alone, and three measured steps beside it."""

import json
import re

import pytest
from transformers import PreTrainedConfig

from cli.conftest import REPOSITORY, TINY
from recipes.published import DIFFERENT, PUBLISHED

QUICKSTART = (
    f"--config={REPOSITORY}/configs/quickstart.yaml", f"--model.base={TINY}",
    f"--data.train={TINY}/chats_train.jsonl", f"--data.val={TINY}/chats_val.jsonl", "--data.predict=null",
)  # fmt: skip
PARTS = (
    "base weights", "adapter, its gradients", "optimiser state", "activations kept", "head", "a layer's pass",
    "process and libraries",
)  # fmt: skip


def gigabytes(text: str, row: str) -> float:
    """The gigabytes in a row of the tables."""
    return float(re.search(rf"{re.escape(row)}[^│┃]*[│┃] *\(?([\d.]+)", text).group(1))


@pytest.fixture
def hub(tmp_path):
    """Make a folder that holds only a model's configuration from the hub."""

    def hub(name: str, **changes) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(PUBLISHED[name] | changes))
        return name

    return hub


def test_a_plan_from_real_lengths_is_complete(cli, tmp_path):
    answers = ("--evaluation.val_rows=4", "--model.generation.max_new_tokens=8", "--evaluation.every_n_validations=2")
    text = cli("plan", *QUICKSTART, "--data.max_length=256", *answers, f"--data.cache_dir={tmp_path}/cache").text
    assert "in data.train)" in text
    assert "answers: 4 rows in one validation in 2, at most" in text
    # two epochs of 54 batches end, and the first of them answers
    assert re.search("whole run: 150 optimiser steps .* seconds with answers in 1 of 2 validations, without", text)
    assert re.search(r"speed: [\d,]+ tokens/s a device", text)
    assert all(part in text for part in PARTS)
    assert "model.gradient_checkpointing: full" in text
    assert "Warning" not in text
    assert "\x1b" not in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_without_data_the_largest_rows_are_planned(cli):
    text = cli("plan", *QUICKSTART, "--data.train=nowhere.jsonl", "--data.max_length=256").text
    assert "512 tokens, 2 documents, 2 rows" in text
    assert "nowhere.jsonl: no such file" in text
    assert "whole run: unknown" in text


AUTO = (
    "--model.gradient_checkpointing=auto", "--data.max_tokens_per_batch=auto", "--data.max_length=256",
    "--data.batch_size=1", "--trainer.accumulate_grad_batches=4",
)  # fmt: skip


@pytest.mark.slow
def test_plan_decides_auto_as_fit_does(cli, tmp_path):
    text = cli("plan", *QUICKSTART, *AUTO, f"--data.cache_dir={tmp_path}/cache").text
    assert "4 rows (the largest of 27 in data.train), 1 to an optimiser step" in text
    assert "model.gradient_checkpointing: auto is none here: the largest batch takes less than" in text


def test_fit_decides_what_is_auto(cli, tmp_path):
    quiet = ("--monitor.base_drift=false", "--monitor.samples=0", "--trainer.max_steps=1")
    text = cli("fit", *QUICKSTART, *AUTO, *quiet, f"--data.cache_dir={tmp_path}/cache").text
    assert "auto is 4 rows to a micro-batch, and 1 such micro-batches to an optimiser step of 4 rows" in text
    assert "model.gradient_checkpointing: auto is none: the largest batch takes less than" in text
    assert "gradient checkpointing: none" in text


@pytest.mark.slow
def test_auto_without_the_planned_gpu_is_full_or_refused(cli):
    options = (*QUICKSTART, "--data.train=null", "--trainer.accelerator=gpu", "--model.gradient_checkpointing=auto")
    text = cli("plan", *options).text
    assert "auto is full here: there is no GPU here; where more fits" in text
    refused = cli("plan", *options, "--data.max_tokens_per_batch=auto", code=1).text
    assert "auto needs the GPU, and there is none here; give a number" in refused


@pytest.mark.slow
def test_measured_steps_stand_beside_the_prediction(cli, tmp_path):
    text = cli("plan", *QUICKSTART, "--measure", f"--data.cache_dir={tmp_path}/cache").text
    assert re.search(r"peak memory, GB *│ *[\d.]+ │ *[\d.]+ │ *[+-][\d.]+%", text)
    assert re.search(r"tokens/s *│ *[\d,]+ │ *[\d,]+ │", text)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".txt") == ["cache"]


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENT)
def test_the_family_is_planned_from_config_json_alone(cli, hub, name):
    folder = hub(name)
    text = cli(
        "plan", f"--config={REPOSITORY}/configs/{name}.yaml", f"--model.base={folder}", "--trainer.accelerator=gpu"
    ).text
    weights = {"phi3_medium_4k_lora": 27.92, "phi4_lora": 29.32, "phi4_mini_lora": 7.67}.get(name, 7.64)  # bfloat16
    assert gigabytes(text, "base weights") == pytest.approx(weights, abs=0.01)
    assert "a calculation: few GPUs" in text
    assert "there is no GPU here" in text


@pytest.mark.slow
@pytest.mark.parametrize("overlay", ["cpu", "ddp", "fsdp2", "gpu_8gb", "torchrun"])
def test_overlays_are_planned(cli, hub, overlay):
    base = hub("phi3_mini_4k_lora", num_hidden_layers=1)
    path = REPOSITORY / f"configs/overlays/{overlay}.yaml"
    configs = (f"--config={REPOSITORY}/configs/phi3_mini_4k_lora.yaml", f"--config={path}")
    text = cli("plan", *configs, f"--model.base={base}", "--trainer.accelerator=gpu").text
    assert ("FSDP2 over" in text) != ("FSDP2" in path.read_text() or "quantization: nf4" in path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["phi3_mini_4k_loralib", "phi3_mini_4k_dora", "phi3_mini_4k_qlora", "cookbook_sample_finetune"]
)
def test_each_kind_of_adapter_is_planned(cli, hub, name):
    base = hub("phi3_mini_4k_lora", num_hidden_layers=1)
    text = cli(
        "plan",
        f"--config={REPOSITORY}/configs/{name}.yaml",
        f"--model.base={base}",
        "--data.train=nowhere.jsonl",
        "--trainer.accelerator=gpu",
    ).text
    assert "at the peak" in text


def test_configurations_that_cannot_be_planned_are_named(cli):
    assert "max_length" in cli("plan", *QUICKSTART, "--data.max_length=100000", code=1).text
    assert (
        "query_proj matches no layer"
        in cli("plan", *QUICKSTART, "--model.lora.target_modules=[query_proj]", code=1).text
    )
    assert "model.optimizer.lr" in cli("plan", *QUICKSTART, "--model.optimizer.ir=1", code=2).text
    assert "--measure" in cli("plan", "--help").text


def test_a_published_base_needs_no_network(cli, monkeypatch):
    real = PreTrainedConfig.get_config_dict

    def folders_alone(name, **options):
        if str(name).startswith("microsoft/"):
            raise OSError("no network")
        return real(name, **options)

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", folders_alone)
    text = cli("plan", f"--config={REPOSITORY}/configs/phi4_mini_lora.yaml", "--trainer.accelerator=gpu").text
    assert "microsoft/Phi-4-mini-instruct is not on this machine; the shapes that it was published with" in text
    assert gigabytes(text, "base weights") == pytest.approx(7.67, abs=0.01)
    unknown = cli("plan", *QUICKSTART, "--model.base=microsoft/Phi-9", code=1).text
    assert "no configuration for 'microsoft/Phi-9'" in unknown
    assert "--model.base FOLDER with that file needs no network" in unknown
