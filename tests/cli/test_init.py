"""``init``: configurations for an installed package, and training scripts translated into one."""

import dataclasses
import inspect
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
from phi3_lightning.commands.translation.script import Translation, translate
from phi3_lightning.config import LoRA, Objective
from phi3_lightning.errors import ConfigError

SETUP = """\
import torch
import trl
from datasets import load_dataset
from peft import LoraConfig, TaskType
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import SFTConfig, SFTTrainer

open("ran", "w").close()
checkpoint_path = "microsoft/Phi-3-mini-4k-instruct"
model_kwargs = dict(use_cache=False, torch_dtype=torch.bfloat16, device_map=None)
model = AutoModelForCausalLM.from_pretrained(checkpoint_path, **model_kwargs)
tokenizer = AutoTokenizer.from_pretrained(checkpoint_path)
raw_dataset = load_dataset("HuggingFaceH4/ultrachat_200k")
train_dataset = raw_dataset["train_sft"]
test_dataset = raw_dataset["test_sft"]
"""
DICTIONARIES = """
training_config = {
    "bf16": True, "do_eval": False, "learning_rate": 5.0e-06, "log_level": "info", "logging_steps": 20,
    "logging_strategy": "steps", "lr_scheduler_type": "cosine", "num_train_epochs": 1, "max_steps": -1,
    "output_dir": "./checkpoint_dir", "per_device_eval_batch_size": 4, "per_device_train_batch_size": 4,
    "save_steps": 100, "seed": 0, "gradient_checkpointing": True, "gradient_accumulation_steps": 1, "warmup_ratio": 0.2,
}
peft_config = {
    "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none", "task_type": "CAUSAL_LM",
    "target_modules": "all-linear", "modules_to_save": None,
}
train_conf = TrainingArguments(**training_config)
peft_conf = LoraConfig(**peft_config)
trainer = SFTTrainer(
    model=model, args=train_conf, peft_config=peft_conf, train_dataset=train_dataset, eval_dataset=test_dataset,
    max_seq_length=2048, dataset_text_field="text", tokenizer=tokenizer, packing=True,
)
"""
KEYWORDS = """
LEARNING_RATE = 5.0e-06
rank = 16
length = 2048

def main():
    epochs = 1
    arguments = SFTConfig(
        bf16=True, do_eval=False, learning_rate=LEARNING_RATE, log_level="info", logging_steps=20,
        lr_scheduler_type="cosine", num_train_epochs=epochs, output_dir="checkpoint_dir", per_device_eval_batch_size=4,
        per_device_train_batch_size=4, save_steps=100, seed=0, gradient_checkpointing=True,
        gradient_accumulation_steps=1, warmup_ratio=0.2, max_length=length, dataset_text_field="text", packing=True,
    )
    lora = LoraConfig(
        r=rank, lora_alpha=32, lora_dropout=0.05, bias="none", task_type=TaskType.CAUSAL_LM, target_modules="all-linear"
    )
    SFTTrainer(model, arguments, train_dataset=train_dataset, eval_dataset=test_dataset, peft_config=lora).train()
"""
MERGED = """
shared = {"learning_rate": 5.0e-06, "lr_scheduler_type": "cosine", "warmup_ratio": 0.2, "seed": 0}
steps = dict(save_steps=100, logging_steps=20, **shared)
trainer = trl.SFTTrainer(
    model=model,
    args=trl.SFTConfig("checkpoint_dir", **{
        "seed": 7, "do_eval": False, "bf16": True, "log_level": "info", "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4, "num_train_epochs": 1.0, **steps,
    }, max_length=2048, packing=True, gradient_accumulation_steps=1,
    gradient_checkpointing=True, dataset_text_field="text"),
    train_dataset=load_dataset("HuggingFaceH4/ultrachat_200k", split="train_sft"), eval_dataset=test_dataset,
    peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=5e-2, target_modules="all-linear", bias="none"),
)
"""
SPELLINGS = {"dictionaries": DICTIONARIES, "keywords": KEYWORDS, "merged": MERGED}
"""The cookbook's sample_finetune.py, in different spellings."""


def translated(tmp_path, source: str) -> Translation:
    (tmp_path / "script.py").write_text(source)
    return translate(tmp_path / "script.py")


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


def test_a_folder_that_is_not_empty_is_refused_without_overwrite(cli, tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/mine.yaml").write_text("mine")
    refused = cli("init", "conf", code=1)
    assert "error: conf is not empty; give another folder, or --overwrite" in refused.text
    assert [path.name for path in (tmp_path / "conf").iterdir()] == ["mine.yaml"]
    cli("init", "conf", "--overwrite")
    assert (tmp_path / "conf/mine.yaml").read_text() == "mine"
    assert (tmp_path / "conf/quickstart.yaml").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a.py"], "a.py is a file; give a folder"),
        (["my conf"], "give one without blanks and signs"),
        (["conf;ls"], "give one without blanks and signs"),
        (["conf", "--from=missing.py"], "--from: missing.py cannot be read"),
        (["conf", "--from=a.ipynb"], "`jupyter nbconvert --to script` makes one of a notebook"),
        (["conf", "--from=quickstart.py"], "quickstart.yaml is a configuration of the package; give"),
    ],
)
def test_bad_arguments_are_one_clear_error_and_write_nothing(cli, tmp_path, args, message):
    for name in ("a.py", "quickstart.py"):
        (tmp_path / name).write_text(DICTIONARIES)
    refused = cli("init", *args, code=1)
    assert message in refused.text
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
    templates = {path.name for path in (REPOSITORY / "src/phi3_lightning/pages/templates").iterdir()}
    assert {path.name for path in (tmp_path / "site/phi3_lightning/pages/templates").iterdir()} == templates


# ---------------------------------------------------------------- a script


DPO = """
from trl import DPOConfig, DPOTrainer

args = DPOConfig(
    output_dir="dpo", loss_type=["robust"], beta=0.2, label_smoothing=0.1, learning_rate=1e-5, padding_free=True,
    disable_dropout=True, max_steps=5,
)
DPOTrainer(
    "microsoft/Phi-3-mini-4k-instruct", args=args, peft_config=LoraConfig(r=8, lora_dropout=0.05),
    train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
)
"""


def test_a_script_of_preferences_becomes_a_configuration(cli, tmp_path):
    (tmp_path / "script.py").write_text(DPO)
    report = cli("init", "conf", "--from=script.py").text
    assert re.findall(r"^  line \d+, (.*)$", report, re.MULTILINE) == [
        "DPOConfig: padding_free = True: not translated; `fit --help` has every option",
        "LoraConfig: lora_dropout = 0.05: not taken; TRL's preference trainers switch dropout off",
    ]
    printed = yaml.safe_load(cli("fit", "--config=conf/script.yaml", "--print_config").text)
    objective = {"name": "dpo", "beta": 0.2, "label_smoothing": 0.1}
    assert objective.items() <= printed["model"]["objective"].items()
    lora = {"r": 8, "lora_dropout": 0.0, "init_from": None}
    assert lora.items() <= printed["model"]["lora"].items()
    assert (printed["data"]["train"], printed["data"]["batch_size"]) == ("trl-lib/ultrafeedback_binarized:train", 1)


@pytest.mark.parametrize(
    ("source", "settings", "notes"),
    [
        ("DPOConfig()", {"name": "dpo"}, []),
        ("DPOConfig(loss_type='ipo', beta=0.3)", {"name": "ipo", "beta": 0.3}, []),
        ("DPOConfig(label_smoothing=0.1)", {"name": "dpo"}, ["TRL uses it with loss_type robust alone"]),
        ("DPOConfig(loss_type=['sigmoid', 'sft'])", {}, ["not taken; see model.objective.name"]),
        ("c = DPOConfig()\nc.loss_type = 'ipo'", {}, ["no literal; set model.objective.name by hand"]),
        ("DPOConfig(loss_type=chosen)", {}, ["no literal; set model.objective.name by hand"]),
        ("KTOConfig(desirable_weight=1, undesirable_weight=1.5)", {
            "name": "kto", "desirable_weight": 1, "undesirable_weight": 1.5,
        }, []),
        ("ORPOConfig(beta=0.2)", {"name": "orpo", "beta": 0.2}, []),
        ("CPOConfig(loss_type='simpo', simpo_gamma=0.3, cpo_alpha=0.0)", {
            "name": "simpo", "simpo_gamma": 0.3, "sft_weight": 0.0,
        }, []),
        ("CPOConfig()", {}, ["CPOConfig: loss_type = 'sigmoid': not taken; see model.objective.name"]),
        ("DPOConfig(seed=1)\nDPOConfig(seed=1, loss_type='ipo')", {}, ["not alike in all such calls"] * 2),
        ("DPOConfig()\nKTOConfig()", {}, ["several values for model.objective.name"] * 2),
        ("SFTConfig(loss_type='dft')", {}, ["not translated"]),
    ],
)  # fmt: skip
def test_preference_trainers_become_objectives(tmp_path, source, settings, notes):
    translation = translated(tmp_path, source)
    found = {path.removeprefix("model.objective."): value for path, value in translation.settings.items()}
    dropout = found.pop("model.lora.lora_dropout", None)
    assert dropout == 0 or not settings
    found.pop("seed_everything", None)
    assert found == settings
    assert len(translation.notes) == len(notes)
    assert all(part in note for part, note in zip(notes, translation.notes, strict=True))
    Objective(**settings)


def test_dropout_stays_where_the_script_leaves_it_on(tmp_path):
    found = translated(tmp_path, "DPOConfig(disable_dropout=False)\nLoraConfig(lora_dropout=0.05)")
    assert found == ({"model.objective.name": "dpo", "model.lora.lora_dropout": 0.05}, [])


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_script_becomes_a_configuration_that_trains(cli, tmp_path, spelling):
    (tmp_path / "script.py").write_text(SETUP + SPELLINGS[spelling])
    report = cli("init", "conf", "--from=script.py").text
    assert not (tmp_path / "ran").exists()  # a script is never run
    text = (tmp_path / "conf/script.yaml").read_text()
    named = re.findall(r"^  (line (\d+), .*: (\w+) = .*)$", report, re.MULTILINE)
    keys = {"do_eval", "log_level", "per_device_eval_batch_size", "use_cache", "torch_dtype", "dataset_text_field"}
    assert {key for _, _, key in named} >= keys
    lines = (SETUP + SPELLINGS[spelling]).splitlines()
    for note, line, key in named:
        assert key in lines[int(line) - 1]
        assert f"#   {note}\n" in text

    ours, cookbook = (
        yaml.safe_load(path.read_text())
        for path in (tmp_path / "conf/script.yaml", REPOSITORY / "configs/cookbook_sample_finetune.yaml")
    )
    cookbook["run"] = "checkpoint_dir"
    for section, values in cookbook.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            assert (ours[section][key] | value if isinstance(value, dict) else value) == ours[section][key], key
    assert (ours["run"], ours["seed_everything"]) == (cookbook["run"], cookbook["seed_everything"])

    options = ("--config=conf/script.yaml", *QUICK)
    printed = yaml.safe_load(cli("fit", *options, "--print_config").text)
    assert printed["model"]["lora"]["target_modules"] == "all-linear"
    if spelling == "keywords":
        cli("fit", *options, "--trainer.max_steps=2", "--trainer.limit_val_batches=1")
        assert (tmp_path / "runs/checkpoint_dir/checkpoints/last.ckpt").is_file()


ARGUMENTS = {
    "SFTConfig": {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    | {"packing", "max_length", "eos_token", "padding_free", "model_init_kwargs", "warmup_ratio", "no_such_key"},
    "SFTTrainer": {"model", "max_seq_length", "data_collator", "callbacks", "peft_config", "train_dataset"},
    "LoraConfig": {field.name for field in dataclasses.fields(peft.LoraConfig)},
    "BitsAndBytesConfig": set(inspect.signature(transformers.BitsAndBytesConfig.__init__).parameters)
    - {"self", "kwargs"},
    "AutoModelForCausalLM.from_pretrained": {"subfolder", "quantization_config", "torch_dtype", "low_cpu_mem_usage"},
    "load_dataset": {"name", "data_dir", "split", "streaming", "token"},
}


@pytest.mark.parametrize("call", ARGUMENTS)
@pytest.mark.parametrize("value", ["object()", "'odd'", "-7", "True"])
def test_every_argument_becomes_a_setting_or_a_note(tmp_path, call, value):
    """Each argument becomes a setting, a note, or (switches only) is the behaviour here anyway."""
    silent = set()
    for key in ARGUMENTS[call]:
        settings, notes = translated(tmp_path, f"x = 1\n{call}({key}={value})\n")
        assert all(note.startswith(f"line 2, {call}: {key} = {value}: ") for note in notes)
        assert not (settings and value == "object()")
        silent |= set() if settings or notes else {key}
    assert silent <= ({"bnb_4bit_use_double_quant"} if value == "True" else set())


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ("bf16=True, fp16=False", {"trainer.precision": "bf16-mixed", "model.dtype": "bfloat16"}),
        ("fp16=True", {"trainer.precision": "16-mixed", "model.dtype": "float16"}),
        ("warmup_steps=10", {"model.schedule.warmup": 10}),
        ("num_train_epochs=3.0, max_steps=-1", {"trainer.max_epochs": 3, "trainer.max_steps": -1}),
        ("num_train_epochs=3, max_steps=60", {"trainer.max_steps": 60, "trainer.max_epochs": -1}),
        ("gradient_checkpointing=False", {"model.gradient_checkpointing": "none"}),
        ("optim='paged_adamw_32bit'", {"model.optimizer.name": "adamw"}),
        ("lr_scheduler_type='constant_with_warmup'", {"model.schedule.name": "constant"}),
        (
            "eval_steps=100, gradient_accumulation_steps=8",
            {
                "trainer.val_check_interval": 100,
                "trainer.check_val_every_n_epoch": None,
                "trainer.accumulate_grad_batches": 8,
            },
        ),
        ("evaluation_strategy='epoch'", {}),
        ("eval_strategy='no'", {"data.val_fraction": 0.0, "checkpoint.monitor": None}),
        ("output_dir='out/phi3'", {"run": "phi3", "trainer.default_root_dir": "out"}),
        ("report_to=['tensorboard']", {}),
        ("report_to='none'", {"trainer.logger": False}),
        ("packing=False, max_seq_length=512", {"data.packing": False, "data.max_length": 512}),
        (
            "neftune_noise_alpha=5, assistant_only_loss=True",
            {"model.neftune_noise_alpha": 5, "data.train_on": "assistant"},
        ),
    ],
)
def test_arguments_become_options(tmp_path, arguments, settings):
    assert translated(tmp_path, f"SFTConfig({arguments})") == (settings, [])


def test_validation_by_steps_counts_batches(tmp_path):
    found = translated(tmp_path, "SFTConfig(eval_strategy='steps', eval_steps=50, gradient_accumulation_steps=4)")
    assert yaml.safe_load(render(found, "a.py"))["trainer"]["val_check_interval"] == 200


@pytest.mark.parametrize(
    ("source", "note"),
    [
        ("SFTConfig(optim='lion_32bit')", "not taken; see model.optimizer.name"),
        ("SFTConfig(num_train_epochs=0.5)", "not taken; see trainer.max_epochs"),
        ("SFTConfig(learning_rate='fast')", "not taken; see model.optimizer.lr"),
        ("SFTConfig(seed=1e999)", "not taken; see seed_everything"),
        ("SFTConfig(eval_strategy='steps')", "not taken; see data.val_fraction"),
        ("SFTConfig(deepspeed='ds.json', push_to_hub=True)", "not translated"),
        ("SFTConfig(bf16=torch.cuda.is_bf16_supported())", "no literal; set trainer.precision by hand"),
        ("SFTConfig(**vars(options), **{seed: 1})", "not translated"),
        ("LoraConfig(layers_to_transform=...)", "no literal; set model.lora.layers_to_transform by hand"),
        ("BitsAndBytesConfig(bnb_4bit_quant_type='fp4')", "not taken; see model.quantization"),
        ("load_dataset('squad', 'plain_text', split='train')", "not translated"),
        ("load_dataset('a/b', data_dir='c', split='train')", "not translated"),
        ("load_dataset('a/b', NAME, split='train')", "not translated"),
        ("load_dataset('json', data_files='a.json', revision='v1', split='train')", "not translated"),
        ("load_dataset('iamtarun/python_code')", "not translated"),
        ("load_dataset('a/b', split='extra')", "not translated"),
        ("load_dataset('./rows', split='train')", "not translated"),
        ("load_dataset('a/b', data_files='a.json', split='train')", "not translated"),
        ("load_dataset('json', data_files={'train': FILE})", "not translated"),
        ("load_dataset('a/b', split=['train', 'test'])", "not translated"),
        ("load_dataset(split='train')", "not translated"),
        ("trainer = SFTTrainer(args=parse())", "not translated"),
        # spellings that are not read
        ("rank: int = 8\nLoraConfig(r=rank)", "no literal; set model.lora.r by hand"),
        ("LoraConfig(target_modules={'o_proj'})", "no literal; set model.lora.target_modules by hand"),
        ("name = 'o_proj'\nLoraConfig(target_modules=[name])", "no literal"),
        ("LoraConfig(task_type=TaskType.CAUSAL_LM)", "no literal"),
        ("SFTConfig(learning_rate=2 * 1e-4)", "no literal"),
        # more than one value, or a changed one by the time of the call
        ("lr = 1e-4\nif big: lr = 2e-4\nSFTConfig(learning_rate=lr)", "no literal"),
        ("def f(lr=1e-4):\n  SFTConfig(learning_rate=lr)", "no literal"),
        ("c = {'seed': 1}\nc['seed'] = 2\nSFTConfig(**c)", "not translated"),
        ("t = ['o_proj']\nt.append('lm_head')\nLoraConfig(target_modules=t)", "no literal"),
        ("a = SFTConfig(seed=1)\na.seed = 2", "no literal; set seed_everything by hand"),
        ("c = {'seed': 1}\nc.update(seed=2)\nSFTConfig(**c)", "not translated"),
        ("c = {'seed': 1}\nd = c\nd['seed'] = 2\nSFTConfig(**c)", "not translated"),
        ("SFTConfig(max_steps=20)\nSFTConfig()", "not alike in all such calls"),
        ("SFTConfig(max_length=512)\nSFTTrainer(max_seq_length=256)", "several values for data.max_length"),
        (
            "load_dataset('a/b', split='train[:9%]')\nload_dataset('a/b', split='train[9%:]')",
            "several values for data.train",
        ),
    ],
)
def test_untranslatable_arguments_are_named_and_set_nothing(tmp_path, source, note):
    settings, notes = translated(tmp_path, source)
    assert settings == {}
    assert notes
    assert all(note in text for text in notes)


@pytest.mark.parametrize(
    ("source", "settings"),
    [
        (
            "d = load_dataset('a/b')\nt, v = d['train'], d['validation']",
            {"data.train": "a/b:train", "data.val": "a/b:validation"},
        ),
        ("load_dataset('a/b', split='train[:95%]')", {"data.train": "a/b:train[:95%]"}),
        ("load_dataset('a/b', 'c', split='train', revision='v1')", {"data.train": "a/b/c@v1:train"}),
        ("load_dataset('a/b', name='c', split='train[:9]')", {"data.train": "a/b/c:train[:9]"}),
        ("F = 'a.jsonl'\nload_dataset('json', data_files=F, split='train')", {"data.train": "a.jsonl"}),
        (
            "load_dataset('csv', data_files={'train': ['a.csv'], 'val': 'b.csv', 'test': 'c.csv'})",
            {"data.train": ["a.csv"], "data.val": "b.csv", "data.test": "c.csv"},
        ),
        ("AutoTokenizer.from_pretrained('c/d')", {"data.tokenizer": "c/d"}),
        ("M = 'a/b'\nPhi3ForCausalLM.from_pretrained(M)\nAutoTokenizer.from_pretrained(M)", {"model.base": "a/b"}),
        (
            "m, t = FastLanguageModel.from_pretrained(model_name='a/b', max_seq_length=512, load_in_4bit=True)",
            {"model.base": "a/b", "data.max_length": 512, "model.quantization": "nf4"},
        ),
        (
            "BitsAndBytesConfig(load_in_8bit=True)\nSFTTrainer('a/b', eval_dataset=load_dataset('c/d', split='dev'))",
            {"model.base": "a/b", "model.quantization": "int8", "data.val": "c/d:dev"},
        ),
        (
            "training_config = {'seed': 1, 'seed': 3}\nSFTConfig(**training_config, packing=True)\nset_seed(3)",
            {"seed_everything": 3, "data.packing": True},
        ),
        (
            "LoraConfig(r=8, target_modules=['o_proj'], use_dora=True)",
            {"model.lora.r": 8, "model.lora.target_modules": ["o_proj"], "model.lora.use_dora": True},
        ),
    ],
)
def test_data_base_and_adapter_are_read_from_their_calls(tmp_path, source, settings):
    assert translated(tmp_path, source) == (settings, [])


SLICES = ["k_proj", "q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]


@pytest.mark.parametrize(
    ("targets", "settings"),
    [
        (SLICES, {}),
        (["qkv_proj"], {}),
        ("all-linear", {}),
        (["q_proj", "v_proj"], {"model.lora.backend": "loralib"}),
    ],
)
def test_slices_of_fused_layers_select_the_loralib_backend(tmp_path, targets, settings):
    found = translated(tmp_path, f"LoraConfig(target_modules={targets!r})")
    assert found == ({"model.lora.target_modules": targets} | settings, [])
    LoRA(**{path.removeprefix("model.lora."): value for path, value in found.settings.items()})


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("x = 1", "has none of TrainingArguments, SFTConfig, DPOConfig"),
        ("SFTConfig(", "cannot be read"),
        ("SFTConfig()\0", "cannot be read"),
        ("a = {**a}\nSFTConfig(**a)", "cannot be read"),
    ],
)
def test_files_that_are_no_training_script_are_refused(tmp_path, text, error):
    with pytest.raises(ConfigError, match=error):
        translated(tmp_path, text)


def test_a_line_break_in_a_key_stays_a_comment(tmp_path):
    found = translated(tmp_path, r"""LoraConfig(**{"a\nmodel: {base: evil}\u2028b": 1})""")
    text = render(found, "a\nb.py")
    assert yaml.safe_load(text)["model"]["base"] == "microsoft/Phi-3-mini-4k-instruct"
    assert all(line.startswith("#") for line in text[: text.index("seed_everything")].splitlines())
