"""Each architecture of the family, from its published config.json, against plain transformers."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.adapters import targets

SWITCH = 32
"""Positions from which longrope's long factors apply, instead of 4,096."""


def published(heads: int, key_value_heads: int, head: int = 16, **own) -> dict:
    """The fields of a config.json on the hub, with small sizes."""
    fields = {
        "architectures": ["Phi3ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "model_type": "phi3",
        "hidden_act": "silu",
        "hidden_size": heads * head,
        "intermediate_size": 3 * heads * head,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "num_hidden_layers": 2,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-05,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "sliding_window": 262144,
        "tie_word_embeddings": False,
        "vocab_size": synthetic.VOCABULARY,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    return fields | own


def longrope(kind: str, pairs: int) -> dict:
    """Factors with an effect: the long ones stretch slow angles most, as the real ones do."""
    short = [1.0 + 0.1 * pair for pair in range(pairs)]
    long = [1.0 + 4.0 * pair for pair in range(pairs)]
    scaling = {"type": kind, "short_factor": short, "long_factor": long}
    return {"rope_scaling": scaling, "original_max_position_embeddings": SWITCH}


FAMILY = {
    "phi3_mini_4k": published(4, 4, sliding_window=24),
    "phi3_mini_128k": published(4, 4, **longrope("su", 8)),
    "phi35_mini": published(4, 4, **longrope("longrope", 8)),
    "phi3_medium_4k": published(8, 2, sliding_window=24),
    "phi4_mini": published(6, 2, tie_word_embeddings=True, partial_rotary_factor=0.75, **longrope("longrope", 6)),
    "phi4": published(8, 2, rope_theta=250000.0, sliding_window=None),
    "phi4_reasoning": published(8, 2, rope_theta=500000.0, sliding_window=None),
}
LONG = [name for name, fields in FAMILY.items() if fields["rope_scaling"]]


def oracle(fields: dict) -> Phi3ForCausalLM:
    """The same architecture with the names of current transformers, and random weights."""
    rope = dict(fields["rope_scaling"] or {"type": "default"})
    rope |= {
        "rope_type": "longrope" if rope.pop("type") != "default" else "default",
        "rope_theta": fields["rope_theta"],
        "partial_rotary_factor": fields.get("partial_rotary_factor", 1.0),
    }
    plain = {name: value for name, value in fields.items() if name not in ("rope_scaling", "rope_theta", "auto_map")}
    torch.manual_seed(3)
    model = Phi3ForCausalLM(Phi3Config(**plain | {"rope_parameters": rope}))
    return model.float().eval()


@pytest.fixture(params=FAMILY)
def pair(request, tmp_path) -> tuple[Phi3LoRAModule, Phi3ForCausalLM]:
    """Our module with the published config and a random adapter, and plain transformers with the adapter merged."""
    return make_pair(request.param, tmp_path)


def make_pair(name: str, folder: Path) -> tuple[Phi3LoRAModule, Phi3ForCausalLM]:
    plain = oracle(FAMILY[name])
    plain.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(FAMILY[name]), encoding="utf-8")
    module = Phi3LoRAModule(
        str(folder), dtype="float32", lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.0},
        generation={"max_new_tokens": 12},
    )  # fmt: skip
    synthetic.randomised(module)
    module.model.eval()
    for target in targets.resolve(plain, module.lora):
        layer = module.model.get_submodule(target.path)
        update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        plain.get_submodule(target.path).weight.data += 2 * update.detach()  # alpha / r
    return module, plain


def document(length: int, seed: int) -> list[int]:
    return synthetic.document(length, length, seed)[0]


def logits(module: Phi3LoRAModule, row: list[list[int]]) -> list[torch.Tensor]:
    """The logits of our module for documents that share a row."""
    batch = synthetic.batch_of([[(ids, ids) for ids in row]])
    with torch.no_grad():
        found = module.head(module(batch))[0]
    return list(found[: sum(map(len, row))].split([len(ids) for ids in row]))


def assert_same(found: torch.Tensor, plain: Phi3ForCausalLM, ids: list[int]) -> None:
    with torch.no_grad():
        expected = plain(torch.tensor([ids]), use_cache=False).logits[0]
    # nine successive products, each a float32 sum of at most 3 x hidden terms in another order, whose rounding
    # adds up in squares; each of the two layers may double what comes in
    terms = 9 * 3 * plain.config.hidden_size
    tolerance = 4 * terms**0.5 * torch.finfo(torch.float32).eps * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("length", [5, SWITCH, SWITCH + 1, 90])
def test_one_document_has_the_logits_of_plain_transformers(pair, length):
    module, plain = pair
    ids = document(length, length)
    [found] = logits(module, [ids])
    assert_same(found, plain, ids)
    with module.base_answers():
        [base] = logits(module, [ids])
    assert (base - found).abs().max() > 0.1  # the adapter has an effect


@pytest.mark.parametrize("lengths", [(20, 7, SWITCH), (40, 90, SWITCH + 1)])
def test_packed_documents_have_the_logits_of_each_alone(pair, lengths):
    module, plain = pair
    row = [document(length, length) for length in lengths]
    for ids, found in zip(row, logits(module, row), strict=True):
        assert_same(found, plain, ids)


@pytest.mark.parametrize("name", LONG)
def test_negative_control_longrope_mixes_long_and_short_documents(tmp_path, name):
    """This is why the data never puts both kinds into one forward; it also shows that the factors are in use."""
    module, _ = make_pair(name, tmp_path)
    short, long = document(20, 1), document(40, 2)
    assert (logits(module, [short, long])[0] - logits(module, [short])[0]).abs().max() > 0.01


@pytest.mark.parametrize("lengths", [(9, 20, 14), (9, SWITCH - 4), (SWITCH + 1,), (70, 40, 9)])
def test_answers_are_those_of_plain_transformers(pair, lengths):
    """Prompts are within the short factors, switch in the middle of an answer, or lie beyond."""
    module, plain = pair
    prompts = [document(length, 50 + length) for length in lengths]
    answers = module.predict_step(synthetic.prompt_batch(prompts, [2]), 0)
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():  # with a cache, some releases lose the text at the switch (transformers 5.17)
            expected = plain.generate(
                torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0,
                use_cache=False,
            )  # fmt: skip
        assert answer == expected[0, len(prompt) :].tolist()
    assert len({token for answer in answers for token in answer}) > 2  # not a constant, which would agree anyway


def test_phi4_mini_has_partial_rotary_and_tied_embeddings(tmp_path):
    module, plain = make_pair("phi4_mini", tmp_path)
    assert module.model.model.rotary_emb.inv_freq.numel() == 6  # pairs, of 8 in a head
    assert module.model.lm_head.weight is module.model.model.embed_tokens.weight
    assert torch.equal(module.model.lm_head.weight, plain.lm_head.weight)
