"""The options of this start, compared with those of the checkpoint."""

import copy
from pathlib import Path

import pytest

from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.checkpoint.changed_options import changed_options

MODEL = dict(Phi3LoRAModule("base").hparams)
DATA = dict(ChatDataModule(train="chats.jsonl", tokenizer="base").hparams)
CHECKPOINT = {
    "hyper_parameters": MODEL,
    "datamodule_hyper_parameters": DATA,
    "ChatDataModule": {"seed": 42},
}


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "42")


def changes_of(path: str, value):
    now = {"model": copy.deepcopy(MODEL), "data": copy.deepcopy(DATA)}
    *sections, key = path.split(".")
    place = now
    for section in sections:
        place = place[section]
    place[key] = value
    return changed_options(CHECKPOINT, now["model"], now["data"])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.base", "other"),
        ("model.revision", "main"),
        ("model.init", "random"),
        ("model.quantization", "nf4"),
        ("model.lora.r", 4),
        ("model.lora.target_modules", ["o_proj"]),
        ("model.lora.rank_pattern", {"o_proj": 4}),
        ("data.train", "other.jsonl"),
        ("data.train", ["chats.jsonl", "other.jsonl"]),
        ("data.columns", {"question": "prompt"}),
        ("data.max_length", 512),
        ("data.seed", 7),
    ],
)
def test_another_base_adapter_or_data_make_another_run(path, value):
    (found,) = changes_of(path, value)
    assert (found.option, found.makes_another_run) == (path, True)
    assert str(found).startswith(f"{path} is {value} and was ")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.optimizer.lr", 0.5),
        ("model.schedule.name", "linear"),
        ("model.neftune_noise_alpha", 5.0),
        ("model.lora.lora_dropout", 0.5),
    ],
)
def test_options_that_a_resumed_run_takes_over_are_listed(path, value):
    (found,) = changes_of(path, value)
    assert (found.option, found.makes_another_run) == (path, False)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("data.num_workers", 7),
        ("data.val", "other.jsonl"),
        ("data.predict", "prompts.jsonl"),
        ("data.cache_dir", "elsewhere"),
        ("model.generation.max_new_tokens", 7),
        ("model.torch_compile", "none"),
        ("data.train", "./chats.jsonl"),
        ("data.train", str(Path("chats.jsonl").resolve())),
        ("model.base", f"{Path('base').resolve()}/"),
    ],
)
def test_options_without_effect_on_training_are_not_listed(path, value):
    assert changes_of(path, value) == []


def test_another_global_seed_makes_another_run_unless_data_seed_is_set(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    (found,) = changed_options(CHECKPOINT, MODEL, DATA)
    assert str(found) == "seed_everything is 1 and was 42"
    assert found.makes_another_run
    given = DATA | {"seed": 42}
    assert changed_options(CHECKPOINT | {"datamodule_hyper_parameters": given}, MODEL, given) == []


def test_an_option_unknown_to_the_older_version_is_not_compared():
    older = {key: value for key, value in MODEL.items() if key not in ("torch_compile", "dtype")}
    assert changed_options({"hyper_parameters": older}, MODEL, DATA) == []
