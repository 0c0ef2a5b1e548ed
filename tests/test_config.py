"""Sections are checked on construction, and errors name the key that the user wrote."""

import re
from dataclasses import asdict

import pytest
from peft import LoraConfig

from phi3_lightning.config import Generation, LoRA, Objective, Optimizer, Schedule
from phi3_lightning.config.checks import section
from phi3_lightning.config.lora import PHI3_LINEAR_LAYERS
from phi3_lightning.config.objective import USED
from phi3_lightning.errors import ConfigError, Phi3LightningError

OUT_OF_RANGE = [
    (LoRA, "r", 0, "model.lora.r"),
    (LoRA, "lora_alpha", 0, "model.lora.lora_alpha"),
    (LoRA, "lora_dropout", 1.0, "model.lora.lora_dropout"),
    (LoRA, "lora_dropout", -0.1, "model.lora.lora_dropout"),
    (LoRA, "target_modules", [], "model.lora.target_modules"),
    (LoRA, "target_modules", "", "model.lora.target_modules"),
    (LoRA, "target_modules", "*_proj", "model.lora.target_modules"),
    (LoRA, "exclude_modules", "(q", "model.lora.exclude_modules"),
    (LoRA, "rank_pattern", {"*o_proj": 4}, "model.lora.rank_pattern"),
    (LoRA, "backend", "lora", "model.lora.backend"),
    (LoRA, "bias", "all", "model.lora.bias"),
    (LoRA, "bias", "lora_only", "model.lora.bias"),
    (LoRA, "rank_pattern", {"o_proj": 0}, "model.lora.rank_pattern.o_proj"),
    (LoRA, "alpha_pattern", {"o_proj": 0}, "model.lora.alpha_pattern.o_proj"),
    (LoRA, "enable_lora", {"qkv_proj": [True, False]}, "model.lora.enable_lora.qkv_proj"),
    (LoRA, "enable_lora", {"gate_up_proj": [True, True, True]}, "model.lora.enable_lora.gate_up_proj"),
    (LoRA, "enable_lora", {"qkv_proj": [False, False, False]}, "model.lora.enable_lora.qkv_proj"),
    (LoRA, "enable_lora", {"o_proj": [True]}, "model.lora.enable_lora.o_proj"),
    (LoRA, "init_lora_weights", "gausian", "model.lora.init_lora_weights"),
    (Optimizer, "name", "sgd", "model.optimizer.name"),
    (Optimizer, "lr", 0.0, "model.optimizer.lr"),
    (Optimizer, "weight_decay", -0.1, "model.optimizer.weight_decay"),
    (Optimizer, "betas", (0.9, 1.0), "model.optimizer.betas"),
    (Optimizer, "betas", (0.9,), "model.optimizer.betas"),
    (Optimizer, "eps", 0.0, "model.optimizer.eps"),
    (Schedule, "name", "cosin", "model.schedule.name"),
    (Schedule, "warmup", -1, "model.schedule.warmup"),
    (Schedule, "warmup", 1.0, "model.schedule.warmup"),
    (Generation, "max_new_tokens", 0, "model.generation.max_new_tokens"),
    (Generation, "temperature", 0.0, "model.generation.temperature"),
    (Generation, "top_p", 0.0, "model.generation.top_p"),
    (Generation, "top_p", 1.1, "model.generation.top_p"),
    (Generation, "temperature", 0.7, "model.generation"),
    (Objective, "name", "DPO", "model.objective.name"),
    (Objective, "beta", 0.2, "model.objective.beta"),  # supervised does not use it
]

AT_THE_EDGE = [
    (LoRA, {"r": 1, "lora_alpha": 0.5, "lora_dropout": 0.0, "target_modules": "all-linear"}),
    (Optimizer, {"weight_decay": 0.0, "betas": (0.0, 0.0), "lr": 1e-12}),
    (Schedule, {"warmup": 0}),
    (Schedule, {"warmup": 0.0}),
    (Schedule, {"warmup": 1}),
    (Generation, {"max_new_tokens": 1, "do_sample": True, "temperature": 0.7, "top_p": 0.1}),
    (Objective, {"name": "dpo", "beta": 1e-9, "label_smoothing": 0.49, "sft_weight": 2}),
    (Objective, {"name": "simpo", "simpo_gamma": 0.0}),
    (Objective, {"name": "kto", "desirable_weight": 0.0}),
]


@pytest.mark.parametrize(("kind", "field", "value", "key"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_named_with_its_key(kind, field, value, key):
    with pytest.raises(ConfigError, match=f"^{re.escape(key)}: .*cannot be used: "):
        kind(**{field: value})


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "mica"])
def test_an_unsupported_initialisation_is_refused_with_the_reason(start):
    with pytest.raises(ConfigError, match=rf"model\.lora\.init_lora_weights: '{start}' cannot be used: it .*use true"):
        LoRA(init_lora_weights=start)


def test_orthogonal_initialisation_needs_even_ranks():
    for ranks in ({"r": 3}, {"rank_pattern": {"o_proj": 5}}):
        with pytest.raises(ConfigError, match="every rank must be even"):
            LoRA(init_lora_weights="orthogonal", **ranks)


@pytest.mark.parametrize(
    "fields", [{"use_dora": True}, {"init_lora_weights": "gaussian"}, {"modules_to_save": ["lm_head"]}]
)
def test_options_unsupported_by_loralib_name_the_peft_backend(fields):
    assert LoRA(**fields)
    with pytest.raises(ConfigError, match=rf"model\.lora\.{next(iter(fields))}: .*backend: peft"):
        LoRA(backend="loralib", **fields)


def test_kto_gives_one_label_a_weight_at_least():
    with pytest.raises(ConfigError, match=r"model.objective.desirable_weight: 0 .*nothing is learnt"):
        Objective("kto", desirable_weight=0.0, undesirable_weight=0.0)


OBJECTIVE_VALUES = {
    "beta": 0.0, "label_smoothing": 0.5, "sft_weight": -1.0, "simpo_gamma": -0.1, "desirable_weight": -0.1,
    "undesirable_weight": -0.1,
}  # fmt: skip


@pytest.mark.parametrize("option", OBJECTIVE_VALUES)
@pytest.mark.parametrize("name", USED)
def test_an_objective_checks_what_it_uses_and_refuses_what_it_does_not(name, option):
    told = "cannot be used: it is" if option in USED[name] else rf"cannot be used: {name} does not use it, .* do; leave"
    with pytest.raises(ConfigError, match=rf"^model\.objective\.{option}: .* {told}"):
        Objective(name, **{option: OBJECTIVE_VALUES[option]})


@pytest.mark.parametrize(("kind", "fields"), AT_THE_EDGE)
def test_values_at_the_edge_are_taken(kind, fields):
    made = kind(**fields)
    assert {name: getattr(made, name) for name in fields} == fields


@pytest.mark.parametrize("kind", [LoRA, Optimizer, Schedule, Generation, Objective])
def test_a_mapping_gives_what_the_section_gives(kind):
    assert section(kind, asdict(kind())) == kind()
    given = kind()
    assert section(kind, given) is given


@pytest.mark.parametrize(
    ("kind", "key", "hint"),
    [
        (LoRA, "model.lora.alpha", "did you mean lora_alpha"),
        (LoRA, "model.lora.rank", "there are backend, r, lora_alpha"),
        (LoRA, "model.lora.target_module", "did you mean target_modules"),
        (Optimizer, "model.optimizer.weigth_decay", "did you mean weight_decay"),
        (Schedule, "model.schedule.warmup_steps", "did you mean warmup"),
        (Generation, "model.generation.top_k", "did you mean top_p"),
        (Objective, "model.objective.gamma", "did you mean simpo_gamma"),
    ],
)
def test_an_unknown_key_is_named_with_the_one_that_was_meant(kind, key, hint):
    with pytest.raises(ConfigError, match=f"^{re.escape(key)}: there is no such option; {hint}"):
        section(kind, {key.rpartition(".")[2]: 8})


@pytest.mark.parametrize(
    ("kind", "field", "value", "message"),
    [
        (LoRA, "r", "8", "model.lora.r: '8' cannot be used: give a whole number"),
        (LoRA, "r", 8.5, "model.lora.r: 8.5 cannot be used: give a whole number"),
        (LoRA, "r", True, "model.lora.r: True cannot be used: give a whole number"),
        (LoRA, "r", None, "model.lora.r: None cannot be used: give a whole number"),
        (LoRA, "lora_alpha", "32", "model.lora.lora_alpha: '32' cannot be used: give a number"),
        (LoRA, "use_dora", "no", "model.lora.use_dora: 'no' cannot be used: give true or false"),
        (LoRA, "target_modules", [1], "model.lora.target_modules: [1] cannot be used: give a list, each of it text"),
        (LoRA, "rank_pattern", {"o_proj": "2"}, "model.lora.rank_pattern.o_proj: '2' cannot be used: give a whole"),
        (LoRA, "rank_pattern", ["o_proj"], "model.lora.rank_pattern: ['o_proj'] cannot be used: give a mapping"),
        (
            LoRA,
            "enable_lora",
            {"qkv_proj": "yes"},
            "model.lora.enable_lora.qkv_proj: 'yes' cannot be used: give a",
        ),
        (LoRA, "layers_pattern", "h", "model.lora.layers_pattern: 'h' cannot be used: give layers or null"),
        (LoRA, "init_from", 3, "model.lora.init_from: 3 cannot be used: give text or null"),
        (Optimizer, "lr", "2e-4", "model.optimizer.lr: '2e-4' cannot be used: give a number"),
        (Optimizer, "betas", 0.9, "model.optimizer.betas: 0.9 cannot be used: give a list, each of it a number"),
        (Schedule, "warmup", "10", "model.schedule.warmup: '10' cannot be used: give a whole number or a number"),
        (Generation, "max_new_tokens", 2.5, "model.generation.max_new_tokens: 2.5 cannot be used: give a whole"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_key(kind, field, value, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        section(kind, {field: value})


@pytest.mark.parametrize("given", [None, "r=8", ["r", 8], LoraConfig(r=8)])
def test_a_section_that_is_no_mapping_is_refused(given):
    with pytest.raises(ConfigError, match=r"^model\.lora: .* cannot be used: give a mapping"):
        section(LoRA, given)


def test_a_peft_config_of_a_script_drops_in():
    peft_config = {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "target_modules": "all-linear",
        "modules_to_save": None,
    }
    assert asdict(section(LoRA, peft_config)) == asdict(LoRA()) | peft_config


def test_every_option_of_ours_is_read_from_a_saved_peft_config():
    saved = LoraConfig(r=8, target_modules=["o_proj"], task_type="CAUSAL_LM").to_dict()
    ours = {key: saved[key] for key in asdict(LoRA()) if key in saved}
    assert len(ours) == len(asdict(LoRA())) - 3  # all but backend, enable_lora and init_from
    assert section(LoRA, ours | {"target_modules": ["o_proj"]}).r == 8


def test_defaults_adapt_every_linear_layer():
    assert LoRA().target_modules == list(PHI3_LINEAR_LAYERS)


def test_sections_are_immutable():
    with pytest.raises(AttributeError):
        LoRA().r = 0


def test_config_errors_are_value_errors_of_the_package():
    assert issubclass(ConfigError, Phi3LightningError)
    assert issubclass(ConfigError, ValueError)
