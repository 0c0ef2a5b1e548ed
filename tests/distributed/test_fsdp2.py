"""The base that FSDP2 loads in shards equals the one that a process loads whole, in every form of base."""

from collections import Counter

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import synthetic
from phi3_lightning.errors import ModelError

from . import cases, ranks
from .conftest import LONG

BATCHES = [synthetic.batch_of([[synthetic.document(n + 4, n, n)]]) for n in (5, 30)]
WHOLE = [synthetic.batch_of([[synthetic.document(n + 4, n, n)] for n in (5, 30)])]
TOLERANCE = 35 * cases.EPSILON
"""One rounding per token, as in the tests of the gradient."""


def compare(base: str, tmp_path, world: int = 2, torch_compile: str = "none", **model) -> None:
    """Compare loading, one step and one validation on FSDP2 ranks with one process, which compiles nothing."""
    alone = cases.fit(tmp_path, base, WHOLE, model=model)
    model["torch_compile"] = torch_compile
    batches = BATCHES + [cases.EMPTY] * (world - 2)

    def fit() -> dict:
        return cases.fit(tmp_path, base, batches, {}, world, model=model)

    for found in ranks.run(tmp_path, world, fit, seconds=240):  # compiling takes long where the machine is busy
        assert found["fingerprint"] == alone["fingerprint"]
        assert found["attention"] == alone["attention"] == "documents"
        largest = alone["gradients"][0].abs().max()
        assert (found["gradients"][0] - alone["gradients"][0]).abs().max() <= TOLERANCE * largest
        assert found["losses"] == pytest.approx(alone["losses"], rel=TOLERANCE)


class Operators(TorchDispatchMode):
    """Counts what is sent, by the name of its operator, and products with the head."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.counts[function._opname] += 1
        if function is torch.ops.aten.mm.default and synthetic.VOCABULARY in (*args[0].shape, *args[1].shape):
            self.counts["head"] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("targets", "gathers"), [(["o_proj"], 5), (["embed_tokens", "o_proj"], 6)])
def test_a_step_neither_gathers_nor_computes_more_than_it_needs(base, tmp_path, targets, gathers, monkeypatch):
    """Of two layers the first is gathered twice and the last once; the head once; the embedding once, or twice with an
    adapter. Each chunk of the loss takes two products with the head."""
    monkeypatch.setattr("phi3_lightning.model.loss.CHUNK", 8)  # four chunks

    def step() -> Counter[str]:
        module = cases.module(base, **adapted(*targets))
        trainer = cases.trainer(tmp_path, cases.fsdp2(), 2, use_distributed_sampler=False)
        backward, operators = module.backward, Operators()

        def backward_counted(*args, **kwargs):
            backward(*args, **kwargs)
            operators.__exit__(None, None, None)

        module.backward = backward_counted
        module.on_train_batch_start = lambda *_: operators.__enter__() and None
        trainer.fit(module, synthetic.loader(BATCHES[1:]))
        return operators.counts

    for counts in ranks.run(tmp_path, 2, step):
        assert counts["_allgather_base_"] == gathers
        assert counts["_reduce_scatter_base_"] == gathers - 3  # one for each unit with an adapter
        assert counts["head"] == 2 * 4


def test_validation_leaves_no_layer_gathered(base, tmp_path):
    def validate() -> int:
        module = cases.module(base)
        trainer = cases.trainer(tmp_path, cases.fsdp2(), 2, use_distributed_sampler=False)
        trainer.validate(module, synthetic.loader([cases.EMPTY]), verbose=False)
        return sum(not isinstance(parameter, cases.DTensor) for parameter in module.parameters())

    assert ranks.run(tmp_path, 2, validate) == [1, 1]  # the weight of the last norm, which is not sharded


def adapted(*layers: str) -> dict:
    return {"lora": {"r": 4, "lora_dropout": 0.0, "target_modules": list(layers)}}


FORMS = {
    "pretrained": {},
    "random": {"init": "random"},
    "an adapter on the head, called chunk by chunk": adapted("lm_head", "o_proj"),
    "an adapter on the embedding": adapted("embed_tokens", "o_proj"),
    "slices adapted by loralib": {
        "lora": {"backend": "loralib", "r": 4, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj", "o_proj"]}
    },
    "NEFTune's hook": {"neftune_noise_alpha": 1e-12},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_base_equals_one_process(base, tmp_path, form, monkeypatch):
    monkeypatch.setattr("phi3_lightning.model.loss.CHUNK", 8)  # several calls of the head
    compare(base, tmp_path, **FORMS[form])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_layers_equal_one_process(base, tmp_path, as_on_a_gpu):
    compare(base, tmp_path, torch_compile="layers")


def test_init_from_equals_one_process(base, tmp_path):
    trained = cases.module(base)
    trained.configure_model()
    trained.give_values()
    form = trained.adapter.to_peft()
    form.config.save_pretrained(tmp_path / "adapter")
    save_file(form.tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    lora = {"r": 4, "lora_dropout": 0.0, "init_from": str(tmp_path / "adapter")}

    def start() -> torch.Tensor:
        module = cases.Phi3LoRAModule(base, dtype="float32", lora=lora)
        trainer = cases.trainer(tmp_path, cases.fsdp2(), 2, use_distributed_sampler=False)
        trainer.validate(module, synthetic.loader([cases.EMPTY]), verbose=False)
        return torch.cat([cases.whole(parameter).flatten() for parameter in module.trained_parameters()])

    expected = torch.cat([parameter.detach().flatten() for parameter in trained.trained_parameters()])
    for found in ranks.run(tmp_path, 2, start):
        assert torch.equal(found, expected)


def test_weights_that_do_not_divide_by_the_ranks_equal_one_process(tmp_path):
    odd = synthetic.save_tiny(tmp_path / "odd", vocab_size=100, **LONG)  # 34, 34 and 32 rows of the embedding
    compare(odd, tmp_path, world=3)


@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_tied_embeddings_equal_one_process(tmp_path, init):
    compare(synthetic.save_tiny(tmp_path / "tied", tie_word_embeddings=True, **LONG), tmp_path, init=init)


def test_a_base_in_several_files_equals_one_process(base, tmp_path):
    from transformers import Phi3ForCausalLM

    Phi3ForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "split", max_shard_size="20KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 2
    compare(str(tmp_path / "split"), tmp_path)


def test_files_of_another_model_are_refused(base, tmp_path):
    other = tmp_path / "other"
    synthetic.save_tiny(other, **LONG)
    synthetic.tiny_config(intermediate_size=128, **LONG).save_pretrained(other)

    def run() -> str:
        with pytest.raises(ModelError, match="gate_up_proj") as caught:
            cases.fit(tmp_path, str(other), BATCHES, {}, 2)
        return str(caught.value)

    assert "do not belong together" in ranks.run(tmp_path, 2, run)[0]


def initial(base: str, folder, strategy, world: int) -> torch.Tensor:
    cases.pl.seed_everything(9, verbose=False)
    module = cases.Phi3LoRAModule(base, dtype="float32")
    strategy = cases.fsdp2() if isinstance(strategy, dict) else strategy
    trainer = cases.trainer(folder, strategy, world, use_distributed_sampler=False)
    trainer.validate(module, synthetic.loader([cases.EMPTY]), verbose=False)
    return torch.cat([cases.whole(parameter).flatten() for parameter in module.trained_parameters()])


def test_adapters_begin_as_on_one_process(base, tmp_path):
    expected = initial(base, tmp_path, "auto", 1)
    assert expected.abs().max() > 0
    for strategy in ("ddp", {}):
        for found in ranks.run(tmp_path, 2, initial, base, tmp_path, strategy, 2):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_a_bfloat16_base_computes_in_it_and_keeps_adapters_in_float32(base, tmp_path, precision):
    model = {"dtype": "bfloat16"}

    def run(strategy):
        found = cases.fit(tmp_path, base, BATCHES, strategy, 2, model=model, precision=precision)
        return found | {"dtypes": {str(w.dtype) for w in (found["weights"], found["gradients"][0])}}

    (fsdp2, _), (ddp, _) = ranks.run(tmp_path, 2, run, {}), ranks.run(tmp_path, 2, run, "ddp")
    assert fsdp2["dtypes"] == {"torch.float32"}
    assert fsdp2["fingerprint"] == ddp["fingerprint"]
    # the same products of the same bfloat16 numbers; a rank's gradient is rounded to bfloat16 (2^-8) before the sum
    assert fsdp2["losses"] == pytest.approx(ddp["losses"], rel=TOLERANCE)
    assert (fsdp2["gradients"][0] - ddp["gradients"][0]).abs().max() <= 2**-7 * ddp["gradients"][0].abs().max()


@pytest.mark.parametrize("backend", ["peft", "loralib"])
def test_the_adapter_is_whole_on_each_rank_and_the_base_on_none(base, tmp_path, backend):
    lora = {"backend": backend, "r": 4, "target_modules": ["qkv_proj", "o_proj"]}

    def start(world: int) -> tuple[dict, str]:
        cases.pl.seed_everything(9, verbose=False)
        module = cases.module(base, lora=lora)
        strategy = "auto" if world == 1 else cases.fsdp2()
        trainer = cases.trainer(tmp_path, strategy, world, use_distributed_sampler=False)
        trainer.validate(module, synthetic.loader([cases.EMPTY]), verbose=False)
        form = module.adapter.to_peft()
        if world == 1:
            return form.tensors, ""
        with pytest.raises(ModelError, match="FSDP2 has sharded the base") as caught:
            module.detach_adapter()
        return form.tensors, str(caught.value)

    expected, _ = start(1)
    for found, error in ranks.run(tmp_path, 2, start, 2):
        assert "on one process" in error
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
