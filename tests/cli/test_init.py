"""``init``: configurations for an installed package, and dictionaries of a script as one of them."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import zipfile

import peft
import pytest
import torch
import transformers
import yaml

from cli.conftest import QUICK, REPOSITORY
from phi3_lightning.commands.init import render
from phi3_lightning.commands.translation import lora, training, training_notes
from phi3_lightning.commands.translation.dictionaries import Dictionaries, read_dictionaries
from phi3_lightning.commands.translation.translate import Translation, translate
from phi3_lightning.errors import ConfigError

TRAINING_CONFIG = {
    "bf16": True,
    "do_eval": False,
    "learning_rate": 5.0e-06,
    "log_level": "info",
    "logging_steps": 20,
    "logging_strategy": "steps",
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "max_steps": -1,
    "output_dir": "./checkpoint_dir",
    "overwrite_output_dir": True,
    "per_device_eval_batch_size": 4,
    "per_device_train_batch_size": 4,
    "remove_unused_columns": True,
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 0,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_accumulation_steps": 1,
    "warmup_ratio": 0.2,
}
PEFT_CONFIG = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "target_modules": "all-linear",
    "modules_to_save": None,
}
COOKBOOK = {"training_config": TRAINING_CONFIG, "peft_config": PEFT_CONFIG}
"""The dictionaries of the cookbook's sample_finetune.py."""

SFT_CONFIG = [
    "model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "chat_template_path", "dataset_text_field",
    "dataset_kwargs", "dataset_num_proc", "eos_token", "max_length", "truncation_mode", "shuffle_dataset",
    "packing", "packing_strategy", "padding_free", "pad_to_multiple_of", "eval_packing", "completion_only_loss",
    "assistant_only_loss", "loss_type", "activation_offloading", "pad_token",
]  # fmt: skip
"""What trl 1.16 adds to TrainingArguments."""
FORMER = [
    "evaluation_strategy", "no_cuda", "group_by_length", "warmup_ratio", "max_seq_length", "overwrite_output_dir",
    "save_safetensors", "logging_dir", "include_tokens_per_second",
]  # fmt: skip
"""Names of earlier versions, which scripts still have."""


def script(dictionaries: dict[str, dict]) -> str:
    assigned = "".join(f"{name} = {values!r}\n" for name, values in dictionaries.items())
    return f"import torch\n{assigned}open('ran', 'w').close()\n"


WRITTEN = {".py": script, ".json": json.dumps, ".yaml": yaml.safe_dump}


def translated(training_config: dict | None = None, peft_config: dict | None = None) -> Translation:
    return translate(Dictionaries(training_config or {}, peft_config or {}, {}))


# ---------------------------------------------------------------- the folder


def test_the_configurations_of_the_checkout_are_written_for_an_installed_package(cli, tmp_path):
    cli("init", "conf")
    root = REPOSITORY / "configs"
    names = {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "conf") for path in (tmp_path / "conf").rglob("*") if path.is_file()} == names
    for name in names:
        text = (tmp_path / "conf" / name).read_text()
        assert not re.search(r"cli\.py|[ =]src/|configs/", text), name
        for mentioned in re.findall(r"conf/[\w/]+\.(?:yaml|sbatch)", text):
            assert (tmp_path / mentioned).is_file(), f"{name}: {mentioned}"


def test_the_quickstart_trains_from_there(cli, tmp_path):
    cli("init", "conf")
    cli("fit", "--config=conf/quickstart.yaml", "--trainer.max_steps=2", "--trainer.num_sanity_val_steps=0")
    assert torch.load(tmp_path / "runs/quickstart/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_a_folder_in_use_is_left_alone_unless_told(cli, tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/mine.yaml").write_text("mine")
    refused = cli("init", "conf", code=1)
    assert "error: conf is not empty; give another folder, or --overwrite" in refused.text
    assert [path.name for path in (tmp_path / "conf").iterdir()] == ["mine.yaml"]
    cli("init", "conf", "--overwrite")
    assert (tmp_path / "conf/mine.yaml").read_text() == "mine"
    assert (tmp_path / "conf/quickstart.yaml").is_file()


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["a.py"], "a.py is a file; give a folder"),
        (["my conf"], "give one without blanks and signs"),
        (["conf;ls"], "give one without blanks and signs"),
        (["conf", "--from=missing.py"], "--from: missing.py cannot be read"),
        (["conf", "--from=quickstart.py"], "quickstart.yaml is a configuration of the package; give"),
    ],
)
def test_what_cannot_be_is_one_clear_error_and_writes_nothing(cli, tmp_path, args, told):
    for name in ("a.py", "quickstart.py"):
        (tmp_path / name).write_text(script(COOKBOOK))
    refused = cli("init", *args, code=1)
    assert told in refused.text
    assert "Traceback" not in refused.text
    assert not (tmp_path / "conf").exists()


@pytest.mark.slow
def test_a_wheel_brings_the_configurations_along(tmp_path):
    pytest.importorskip("hatchling", reason="hatchling builds the wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True, timeout=120)
    [wheel] = (tmp_path / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from phi3_lightning.commands.init import main; main(['conf'])"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120, env=environment)
    shipped = {path.name for path in (REPOSITORY / "configs").rglob("*") if path.is_file()}
    assert {path.name for path in (tmp_path / "conf").rglob("*") if path.is_file()} == shipped
    assert f"base: {tmp_path}/site/phi3_lightning/assets/tiny_phi3" in (tmp_path / "conf/quickstart.yaml").read_text()


# ---------------------------------------------------------------- dictionaries


@pytest.mark.parametrize("suffix", WRITTEN)
def test_dictionaries_become_a_configuration_that_trains(cli, tmp_path, suffix):
    (tmp_path / f"my_config{suffix}").write_text(WRITTEN[suffix](COOKBOOK))
    ran = cli("init", "conf", f"--from=my_config{suffix}")
    assert not (tmp_path / "ran").exists()  # a script is never run
    told = set(re.findall(r"^  training_config\.(\w+): ", ran.text, re.MULTILINE))
    assert told == {
        "do_eval", "log_level", "output_dir", "overwrite_output_dir", "remove_unused_columns", "save_total_limit",
    }  # fmt: skip
    text = (tmp_path / "conf/my_config.yaml").read_text()
    assert all(f"#   training_config.{key}: " in text for key in told)
    cookbook = yaml.safe_load((REPOSITORY / "configs/cookbook_sample_finetune.yaml").read_text())
    ours = yaml.safe_load(text)
    assert ours["seed_everything"] == cookbook["seed_everything"]
    assert {key: ours["trainer"][key] for key in cookbook["trainer"]} == cookbook["trainer"]
    assert {key: ours["model"]["lora"][key] for key in cookbook["model"]["lora"]} == cookbook["model"]["lora"]
    assert ours["model"]["schedule"] == cookbook["model"]["schedule"]
    assert ours["model"]["optimizer"]["lr"] == cookbook["model"]["optimizer"]["lr"]
    assert ours["checkpoint"]["every_n_steps"] == cookbook["checkpoint"]["every_n_steps"]

    given = ("--config=conf/my_config.yaml", *QUICK)
    printed = yaml.safe_load(cli("fit", *given, "--print_config").text)
    assert printed["model"]["lora"]["target_modules"] == "all-linear"
    if suffix == ".py":
        cli("fit", *given, "--trainer.max_steps=2", "--trainer.limit_val_batches=1")
        assert (tmp_path / "runs/checkpoint_dir/checkpoints/last.ckpt").is_file()


def known(rules: dict, notes: dict) -> set[str]:
    assert not rules.keys() & notes.keys()
    return rules.keys() | notes.keys()


def test_every_key_of_training_arguments_and_sft_config_is_known():
    fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    private = {name for name in fields if name.startswith("_")} | {"deepspeed_plugin", "distributed_state"}
    assert fields - private | set(SFT_CONFIG) | set(FORMER) <= known(training.RULES, training_notes.NOTES)


def test_every_key_of_lora_config_is_known():
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields <= known(lora.RULES, lora.NOTES)


SAMPLES = {
    "activation_checkpointing_kwargs": {}, "chat_template_path": "a.jinja", "eval_steps": 50, "eval_strategy": "steps",
    "evaluation_strategy": "steps", "gradient_checkpointing_kwargs": {}, "loss_type": "nll", "max_steps": 100,
    "lr_scheduler_type": "linear", "metric_for_best_model": "eval_loss", "optim": "adamw_torch", "output_dir": "out/a",
    "packing_strategy": "bfd_split", "report_to": "none", "run_name": "a", "save_strategy": "steps",
    "warmup_ratio": 0.1,
    "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-7, "logging_strategy": "steps", "fp16": False,
    "train_sampling_strategy": "random", "logging_steps": 5, "save_steps": 10, "max_length": 128, "max_seq_length": 128,
}  # fmt: skip
"""A value for each key that 1 is none for."""


def test_every_setting_that_a_key_comes_to_is_an_option(cli, tmp_path):
    given = {key: SAMPLES.get(key, 1) for key in training.RULES}
    adapter = PEFT_CONFIG | {"use_rslora": True, "rank_pattern": {"o_proj": 4}, "init_lora_weights": "gaussian"}
    adapter |= {
        "base_model_name_or_path": "a/b",
        "revision": "main",
        "peft_type": "LORA",
        "layers_to_transform": [0, 1],
    }
    found = translated(given, adapter)
    assert len(found.settings) > 35
    (tmp_path / "all.yaml").write_text(render(found, "all.py"))
    printed = yaml.safe_load(cli("fit", "--config=all.yaml", "--print_config").text)
    for path, value in found.settings.items():
        part = printed
        for key in path.split("."):
            part = part[key]
        assert part == value, path


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({"bf16": True}, {"trainer.precision": "bf16-mixed", "model.dtype": "bfloat16"}),
        ({"bf16": False, "fp16": True}, {"trainer.precision": "16-mixed", "model.dtype": "float16"}),
        ({"bf16": False, "fp16": False}, {"trainer.precision": "32-true", "model.dtype": "float32"}),
        ({"learning_rate": "5e-6"}, {"model.optimizer.lr": 5e-6}),
        ({"warmup_steps": 10, "warmup_ratio": 0.1}, {"model.schedule.warmup": 10}),
        ({"warmup_steps": 0, "warmup_ratio": 0.1}, {"model.schedule.warmup": 0.1}),
        ({"warmup_steps": 0.1}, {"model.schedule.warmup": 0.1}),
        ({"num_train_epochs": 3.0, "max_steps": -1}, {"trainer.max_epochs": 3}),
        ({"num_train_epochs": 3, "max_steps": 60}, {"trainer.max_steps": 60, "trainer.max_epochs": -1}),
        ({"gradient_checkpointing": False}, {"model.gradient_checkpointing": "none"}),
        ({"max_grad_norm": 0.0}, {"trainer.gradient_clip_val": None}),
        ({"adam_beta2": 0.95}, {"model.optimizer.betas": [0.9, 0.95]}),
        ({"optim": "adamw_bnb_8bit"}, {"model.optimizer.name": "paged_adamw_8bit"}),
        ({"lr_scheduler_type": "constant_with_warmup"}, {"model.schedule.name": "constant"}),
        (
            {"eval_strategy": "steps", "eval_steps": 100, "gradient_accumulation_steps": 4},
            {
                "trainer.val_check_interval": 400,
                "trainer.check_val_every_n_epoch": None,
                "trainer.accumulate_grad_batches": 4,
            },
        ),
        ({"evaluation_strategy": "epoch"}, {}),
        ({"eval_strategy": "no"}, {"data.val_fraction": 0.0, "checkpoint.monitor": None}),
        ({"save_strategy": "epoch", "save_steps": 500}, {}),
        ({"output_dir": "out/phi3"}, {"run": "phi3", "trainer.default_root_dir": "out"}),
        ({"report_to": ["tensorboard"]}, {}),
        ({"max_seq_length": 512, "packing": True}, {"data.max_length": 512, "data.packing": True}),
        ({"assistant_only_loss": True}, {"data.train_on": "assistant"}),
        ({"neftune_noise_alpha": 5}, {"model.neftune_noise_alpha": 5.0}),
    ],
)
def test_keys_come_to_their_equals(given, settings):
    assert translated(given).settings == settings


COOKBOOK_TARGETS = ["k_proj", "q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({"target_modules": COOKBOOK_TARGETS}, {"model.lora.target_modules": COOKBOOK_TARGETS}),
        (
            {"target_modules": ["q_proj", "v_proj"]},
            {"model.lora.target_modules": ["q_proj", "v_proj"], "model.lora.backend": "loralib"},
        ),
        ({"base_model_name_or_path": "a/b", "revision": "c"}, {"model.base": "a/b", "model.revision": "c"}),
        ({"use_dora": True, "r": 8}, {"model.lora.use_dora": True, "model.lora.r": 8}),
        ({"init_lora_weights": "pissa"}, {}),
        ({"bias": "all"}, {}),
    ],
)
def test_adapters_come_to_their_equals(given, settings):
    found = translated(None, given)
    assert found.settings == settings
    assert len(found.notes) == (settings == {} or "model.lora.backend" in settings)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"learning_rat": 1}, "not known; did you mean learning_rate?"),
        ({"optim": "lion_32bit"}, "lion_32bit is not offered, and adamw is taken"),
        ({"lr_scheduler_type": "polynomial"}, "polynomial is not offered, cosine is taken"),
        ({"num_train_epochs": 0.5}, "for 0.5 give trainer.max_steps"),
        ({"report_to": "wandb"}, "wandb: another logger goes under trainer.logger"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "the variant that is not reentrant is used"),
        ({"deepspeed": "ds.json"}, "configs/overlays/fsdp2.yaml"),
        ({"label_smoothing_factor": 0.1}, "override Phi3LoRAModule.compute_loss"),
        ({"save_strategy": "no"}, "last.ckpt is always written"),
        ({"metric_for_best_model": "rouge"}, "'rouge' is no metric here"),
        ({"seed": None}, "not set there"),
    ],
)
def test_keys_without_an_equal_are_named_with_what_to_do(given, told):
    [(key, note)] = translated(given).notes.items()
    assert key == f"training_config.{next(iter(given))}"
    assert told in note


def test_values_that_only_running_would_give_are_named(tmp_path):
    (tmp_path / "a.py").write_text(
        "from torch import cuda\n"
        "rank: int = 8\n"
        "common = {'seed': 7}\n"
        "env = cuda.environ()\nenv['A'], rank_list = '1', [1]\nenv['B'] = '2'\n"
        "training_config = dict(bf16=cuda.is_bf16_supported(), learning_rate=1e-4, **common,\n"
        "    use_liger_kernel=fast())\n"
        "training_config['max_steps'] = 5\n"
        "peft_config = {'r': rank, 'target_modules': find_all(), key: 1, **more}\n"
        "if True:\n    training_config['seed'] = 9\n"
        "training_config.update(packing=True)\n"
    )
    found = translate(read_dictionaries(tmp_path / "a.py"))
    assert found.settings == {
        "model.optimizer.lr": 1e-4, "seed_everything": 7, "trainer.max_steps": 5, "trainer.max_epochs": -1,
        "model.lora.r": 8,
    }  # fmt: skip
    assert found.notes["training_config.bf16"] == (
        "cuda.is_bf16_supported() would have to be run; set trainer.precision by hand"
    )
    assert found.notes["training_config.use_liger_kernel"] == ("fast() would have to be run; nothing here is set by it")
    assert "find_all()" in found.notes["peft_config.target_modules"]
    assert {"peft_config.key", "peft_config.more"} <= found.notes.keys()
    assert {"training_config, line 12", "training_config, line 13"} <= found.notes.keys()


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.py", "x = 1", "no dictionary called training_config or peft_config"),
        ("a.py", "training_config = {", "cannot be parsed"),
        ("a.py", "training_config = {}\0", "cannot be parsed"),
        ("a.json", "[1]", "no dictionary called"),
        ("a.json", "{", "cannot be parsed"),
        ("a.yaml", "a: [", "cannot be parsed"),
        ("a.txt", "", "is no .py, .json, .yaml or .yml file"),
    ],
)
def test_files_without_dictionaries_are_refused(tmp_path, name, text, told):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_dictionaries(tmp_path / name)


def test_what_else_a_file_holds_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(COOKBOOK | {"model_kwargs": {"use_cache": False}}))
    assert read_dictionaries(tmp_path / "a.yaml").unread == {"model_kwargs": "no dictionary of that name is read"}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (({"learning_rate": "fast"}, {}), r"training_config\.learning_rate: 'fast' cannot be used"),
        (({"seed": float("inf")}, {}), r"training_config\.seed: inf cannot be used"),
        (({"seed": 1.5}, {}), r"training_config\.seed: 1\.5 cannot be used \(it is a whole number"),
        (({"weight_decay": -1}, {}), r"model\.optimizer\.weight_decay: -1"),
        (({}, {"r": 0}), r"model\.lora\.r: 0"),
        (({}, {"lora_dropout": 1.5}), r"model\.lora\.lora_dropout: 1\.5"),
    ],
)
def test_values_out_of_range_are_named(given, told):
    with pytest.raises(ConfigError, match=told):
        translated(*given)


def test_a_line_break_in_a_key_stays_a_comment():
    text = render(translated({"a\nmodel: {base: evil}\u2028b": 1}), "a\nb.json")
    assert yaml.safe_load(text)["model"]["base"] == "microsoft/Phi-3-mini-4k-instruct"
    assert all(line.startswith("#") for line in text[: text.index("seed_everything")].splitlines())
