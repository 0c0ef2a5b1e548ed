"""Each fault fails its own check, with a remedy, and no other check that can run."""

import json
import re
from itertools import islice

import pytest
import torch

from checks.conftest import TINY
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.checks import numerics
from phi3_lightning.checks.suite import (
    CHECKPOINTING,
    EIGHT_BITS,
    GRADIENTS,
    HELD_OUT,
    MY_ROWS,
    PACKED,
    REPEATED_ROWS,
    TEMPLATE,
)
from phi3_lightning.data.conversation import TokenizedDocument
from phi3_lightning.data.template import ChatTemplate
from phi3_lightning.model import int8_dynamic

FORWARD = Phi3LoRAModule.forward
CONFIGURE = Phi3LoRAModule.configure_model
QUICK = 7
"""Number of checks before the overfit diagnosis."""


def outcomes(suite) -> dict[str, str]:
    return {result.name: result.outcome for result in islice(suite.run(), QUICK)}


def failed(suite):
    """The one check that fails; all others pass or are skipped."""
    results = list(islice(suite.run(), QUICK))
    [fault] = [result for result in results if result.outcome == "FAIL"]
    return fault, {result.name: result.outcome for result in results}


def write(tmp_path, rows) -> dict:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"train": str(path)}


def chat(question: str, answer: str, **marks) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **marks}]}


@pytest.mark.parametrize("backend", ["peft", "loralib"])
@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", "float32"), ("bf16-mixed", "bfloat16"), ("bf16-true", "bfloat16")]
)
def test_a_sound_setup_passes_every_check(suite, backend, precision, dtype):
    pytest.importorskip(backend)
    made = suite(precision=precision, dtype=dtype, lora={"backend": backend}, gradient_checkpointing="full")
    assert set(outcomes(made).values()) == {"ok"}


@pytest.mark.parametrize(
    "lora", [{"use_dora": True}, {"modules_to_save": ["norm"]}, {"target_modules": ["embed_tokens"]}]
)
def test_other_adapters_pass(suite, lora):
    assert set(outcomes(suite(lora=lora)).values()) == {"ok"}


@pytest.mark.slow
@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx512_vnni"), reason="this CPU has no AVX-512 VNNI")
def test_the_gradient_in_8_bits_is_near_that_of_exact_products(suite, monkeypatch):
    made = suite(precision="bf16-mixed", dtype="bfloat16", quantization="int8_dynamic")
    results = {result.name: result for result in islice(made.run(), QUICK + 1)}
    assert {result.outcome for result in results.values()} == {"ok"}
    assert re.search(r"^[1-9]\.\d% off that of exact products .* cosine 0\.99", results[EIGHT_BITS].figure)
    monkeypatch.setattr(int8_dynamic, "LARGEST", 1)
    worse = {result.name: result for result in islice(made.run(), QUICK + 1)}[EIGHT_BITS]
    assert (worse.outcome, "leave model.quantization null" in worse.remedy) == ("FAIL", True)


def test_masked_answers_fail_the_check_of_rows(suite, tmp_path):
    rows = [chat(f"Question {number}?", "An answer.", train=False) for number in range(9)]
    fault, others = failed(suite(write(tmp_path, rows)))
    assert fault.name == MY_ROWS
    assert "0 are kept" in fault.figure
    assert "9 dropped (nothing to train)" in fault.figure
    assert "weight 0 or train false" in fault.remedy
    assert others[TEMPLATE] == "skipped"
    assert others[PACKED] == others[GRADIENTS] == "ok"  # these run on the package's rows


def test_empty_answers_are_named(suite, tmp_path):
    fault, _ = failed(suite(write(tmp_path, [chat(f"Question {number}?", "") for number in range(9)])))
    assert fault.name == MY_ROWS
    assert "9 with empty answers" in fault.figure


def test_truncated_answers_are_named(suite, tmp_path):
    rows = [chat(f"Question {number}?", "word " * 60) for number in range(9)]
    fault, _ = failed(suite(write(tmp_path, rows) | {"max_length": 40, "truncation": "truncate_end"}, lora={"r": 2}))
    assert fault.name == MY_ROWS
    assert "data.max_length" in fault.remedy


def test_unreadable_rows_are_named(suite, tmp_path):
    rows = [chat("Question?", "An answer."), {"messages": [{"role": "robot", "content": "x"}]}]
    data = write(tmp_path, rows)
    fault, _ = failed(suite(data))
    assert fault.name == MY_ROWS
    assert "chats.jsonl:2" in fault.remedy
    assert outcomes(suite(data | {"on_bad_row": "skip"}))[MY_ROWS] == "ok"


def test_rows_that_are_there_twice_are_counted(suite, tmp_path):
    rows = [chat(f"Question {number % 7}?", "An answer.") for number in range(9)]
    results = {result.name: result for result in islice(suite(write(tmp_path, rows) | {"val_fraction": 0}).run(), 3)}
    path = tmp_path / "chats.jsonl"
    assert results[REPEATED_ROWS].outcome == "ok"
    assert (
        results[REPEATED_ROWS].figure
        == f"9 documents are trained, copies 2: {path}:8 is {path}:1, {path}:9 is {path}:2"
    )
    assert results[HELD_OUT].outcome == "skipped"


@pytest.mark.parametrize("split", ["val", "test", "val_fraction"])
def test_held_out_rows_that_are_trained_are_named(suite, tmp_path, split):
    data = write(
        tmp_path, [chat(f"Question {number // (1 + (split == 'val_fraction'))}?", "An answer.") for number in range(40)]
    )
    if split == "val_fraction":
        data["val_fraction"] = 0.5
    else:
        path = tmp_path / "held_out.jsonl"
        path.write_text("".join(json.dumps(chat(f"Question {number}?", "An answer.")) + "\n" for number in (99, 3, 5)))
        data |= {split: str(path), "val_fraction": 0}
    results = {result.name: result for result in islice(suite(data).run(), 3)}
    assert results[HELD_OUT].outcome == "FAIL"
    assert "data.group_by" in results[HELD_OUT].remedy
    if split != "val_fraction":
        assert results[HELD_OUT].figure == (
            f"of 3 in {split} 2: {path}:2 is {data['train']}:4, {path}:3 is {data['train']}:6"
        )


def test_duplicates_of_one_group_are_held_out_together(suite, tmp_path):
    rows = [chat(f"Question {number // 2}?", "An answer.") | {"pair": number // 2} for number in range(40)]
    data = write(tmp_path, rows) | {"val_fraction": 0.5}
    results = [list(islice(suite(data | options).run(), 3))[2] for options in ({}, {"group_by": "pair"})]
    assert [(result.name, result.outcome) for result in results] == [(HELD_OUT, "FAIL"), (HELD_OUT, "ok")]


def test_a_bad_row_after_the_first_rows_is_found(suite, tmp_path):
    rows = [chat(f"Question {number}?", "An answer.") for number in range(600)] + [{"messages": 5}]
    fault, others = failed(suite(write(tmp_path, rows)))
    assert fault.name == REPEATED_ROWS
    assert "chats.jsonl:601" in fault.figure
    assert others[MY_ROWS] == "ok"


def test_a_template_whose_prompt_is_no_prefix_of_training_fails(suite, tmp_path):
    template = json.loads((TINY / "tokenizer_config.json").read_text())["chat_template"]
    (tmp_path / "own.jinja").write_text(template + "{% if add_generation_prompt %}Sure: {% endif %}")
    fault, _ = failed(suite({"chat_template": str(tmp_path / "own.jinja")}))
    assert fault.name == TEMPLATE
    assert "generation starts an answer after" in fault.figure
    assert "add_generation_prompt" in fault.remedy


@pytest.mark.parametrize(("start", "end"), [(1, 0), (-1, 0), (0, 1)])
def test_a_mask_that_is_off_by_one_fails(suite, monkeypatch, start, end):
    encode = ChatTemplate.encode

    def shifted(self, *args, **kwargs):
        found = encode(self, *args, **kwargs)
        return [TokenizedDocument(item.input_ids, [(a + start, b + end) for a, b in item.spans]) for item in found]

    made = suite()
    monkeypatch.setattr(ChatTemplate, "encode", shifted)
    fault, _ = failed(made)
    assert fault.name == TEMPLATE
    assert "chats_train.jsonl:" in fault.figure


def test_a_mask_without_the_end_of_turn_fails(suite, monkeypatch):
    supervise = ChatTemplate._supervise

    def endless(self, *args):
        found = supervise(self, *args)
        return TokenizedDocument(found.input_ids, [(start, end - 1) for start, end in found.spans])

    made = suite()
    monkeypatch.setattr(ChatTemplate, "_supervise", endless)
    results = list(islice(made.run(), QUICK))
    assert [result.name for result in results if result.outcome == "FAIL"] == [MY_ROWS, TEMPLATE]
    assert "without an end of turn that is trained" in results[0].figure
    assert "without a token that ends it" in next(result.figure for result in results if result.name == TEMPLATE)


@pytest.mark.parametrize("attention", ["documents", "sdpa", "eager"])
def test_packed_documents_that_see_each_other_fail(suite, monkeypatch, attention):
    def leaking(self, batch):
        rows, width = batch["input_ids"].shape
        one_document = {"position_ids": torch.arange(width).expand(rows, width)}
        one_document["document_lengths"] = [[sum(row)] for row in batch["document_lengths"]]
        return FORWARD(self, {**batch, **one_document})

    made = suite(attn_implementation=attention)
    monkeypatch.setattr(Phi3LoRAModule, "forward", leaking)
    fault, _ = failed(made)
    assert fault.name == PACKED
    assert "data.packing: false" in fault.remedy


def test_recomputation_with_other_dropout_fails(suite, monkeypatch):
    checkpoint = numerics.checkpoint_activations

    def careless(model, how):
        checkpoint(model, how)
        if how == "full":
            kwargs = {"use_reentrant": False, "preserve_rng_state": False}
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable(kwargs)

    made = suite()
    monkeypatch.setattr(numerics, "checkpoint_activations", careless)
    fault, _ = failed(made)
    assert fault.name == CHECKPOINTING
    assert "model.gradient_checkpointing: none" in fault.remedy


def test_a_layer_that_is_frozen_is_named(suite, monkeypatch):
    def freezing(self):
        CONFIGURE(self)
        self.model.model.layers[2].self_attn.o_proj.lora_B.default.weight.requires_grad_(False)

    made = suite()
    monkeypatch.setattr(Phi3LoRAModule, "configure_model", freezing)
    fault, _ = failed(made)
    assert fault.name == GRADIENTS
    assert "1 of 16 get none: model.layers.2.self_attn.o_proj" in fault.figure


def test_a_slice_without_a_gradient_is_named(suite, monkeypatch):
    pytest.importorskip("loralib")

    def silencing(self):
        CONFIGURE(self)
        layer = self.model.model.layers[1].self_attn.qkv_proj
        slices = next(target.slices for target in self.adapter.targets if target.name == "qkv_proj")
        queries, keys = slices["q_proj"], slices["k_proj"]
        mask = torch.ones_like(layer.lora_B)
        mask[queries : queries + keys] = 0
        layer.lora_B.register_hook(lambda gradient: gradient * mask)

    made = suite(lora={"backend": "loralib"})
    monkeypatch.setattr(Phi3LoRAModule, "configure_model", silencing)
    fault, _ = failed(made)
    assert "1 of 28 get none: model.layers.1.self_attn.qkv_proj (k_proj)" in fault.figure


def test_the_checks_leave_the_base_unchanged(suite):
    made = suite()
    with made.shared_base.module() as module:
        before = {n: p.clone() for n, p in module.named_parameters() if not p.requires_grad}
    list(islice(made.run(), QUICK))
    with made.shared_base.module() as module:
        after = {n: p for n, p in module.named_parameters() if not p.requires_grad}
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
