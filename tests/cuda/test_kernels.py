"""GPU kernels are as exact as those they replace."""

import pytest
import torch

import synthetic
from cuda.conftest import DEVICE, DRY
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.model import loss, packed_attention
from phi3_lightning.model.compile import choose_compilation

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]  # dynamo
SHAPES = {
    "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 1000,
    "max_position_embeddings": 1024, "original_max_position_embeddings": 1024,
}  # fmt: skip
BASES = {
    "heads of 96": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "grouped queries": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "a window": {"num_attention_heads": 4, "num_key_value_heads": 4, "sliding_window": 100},
}
LENGTHS = [[300, 5, 64], [1, 200]]


@pytest.fixture(params=["a window"] if DRY else BASES)
def base(request, tmp_path) -> str:
    return synthetic.save_tiny(tmp_path / "base", **SHAPES, **BASES[request.param])


def batch() -> dict:
    rows = [[synthetic.document(length, max(1, length // 2), length) for length in row] for row in LENGTHS]
    found = synthetic.batch_of(rows)
    return {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in found.items()}


def gradient(base: str, dtype: str, compile_layers: bool = False, **options) -> torch.Tensor:
    lora = {"r": 8, "lora_dropout": 0.0, **options.pop("lora", {})}
    module = synthetic.randomised(Phi3LoRAModule(base, dtype=dtype, lora=lora, **options).to(DEVICE)).to(DEVICE)
    module.model.train()
    with module.autocast():
        if compile_layers:
            choose_compilation(module.model, "layers", 1)
        found = batch()
        summed, count = module.compute_loss(module(found), module.head, found)
    (summed / count).backward()
    return torch.cat([parameter.grad.flatten() for parameter in module.trained_parameters()])


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("backend", ["peft", "loralib"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_flash_attention_and_compiled_layers_round_no_more_than_sdpa(base, monkeypatch, backend, checkpointing):
    options = {"lora": {"backend": backend}, "gradient_checkpointing": checkpointing}
    truth = gradient(base, "float32", **options)  # by sdpa, one document after the other
    flash = error(gradient(base, "bfloat16", **options), truth)
    fused = error(gradient(base, "bfloat16", compile_layers=True, **options), truth)
    with monkeypatch.context() as without:
        without.setattr(packed_attention, "takes_varlen", lambda model, device: False)
        plain = error(gradient(base, "bfloat16", **options), truth)
    # bfloat16 has 8 bits: a wrong mask or scale is off by far more than half of the rounding error
    assert plain < 0.1
    assert flash < 1.5 * plain
    assert fused < 1.5 * plain


def test_a_document_does_not_depend_on_its_neighbours(base):
    module = synthetic.randomised(Phi3LoRAModule(base, dtype="bfloat16", lora={"r": 8}).to(DEVICE)).to(DEVICE).eval()
    found = batch()
    with torch.no_grad(), module.autocast():
        before = module(found)[0, 305:369]
        found["input_ids"][0, :305] = 7
        after = module(found)[0, 305:369]
    assert torch.equal(before, after)


def test_larger_chunks_of_the_head_change_nothing(base, monkeypatch):
    one = gradient(base, "float32")
    monkeypatch.setattr(loss, "GPU_CHUNK", 16)
    # float32 sums of at most 1,000 terms in another order
    assert error(gradient(base, "float32"), one) < 1000 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("by_token", [False, True])
def test_the_gradient_of_the_head_rounds_no_more_than_autograd(by_token):
    """The gradient that is made beside the loss, over several chunks and a part of one."""
    torch.manual_seed(0)
    head = torch.nn.Linear(384, 1000, bias=False).requires_grad_(False)
    states, targets = torch.randn(2 * loss.GPU_CHUNK + 100, 384), torch.randint(1000, (2 * loss.GPU_CHUNK + 100,))

    def gradient_of(dtype: torch.dtype, ours: bool) -> torch.Tensor:
        inputs = states.detach().clone().to(DEVICE, dtype).requires_grad_()
        module, labels = head.to(DEVICE, dtype), targets.to(DEVICE)
        if ours:
            (
                loss.token_losses(inputs, labels, module).sum()
                if by_token
                else loss.summed_loss(inputs, labels, module)
            ).backward()
        else:
            torch.nn.functional.cross_entropy(module(inputs).float(), labels, reduction="sum").backward()
        return inputs.grad.float()

    truth = gradient_of(torch.float32, ours=False)
    assert error(gradient_of(torch.float32, ours=True), truth) < 1e-5
    assert error(gradient_of(torch.bfloat16, ours=True), truth) < 1.5 * error(
        gradient_of(torch.bfloat16, ours=False), truth
    )


def test_shared_prompts_round_no_more_than_two_documents(base):
    """The last query is on the last key in flash attention too, with fewer queries than keys and in a window."""

    def gradient_of(dtype: str, shared: bool) -> torch.Tensor:
        options = {"dtype": dtype, "lora": {"r": 8, "lora_dropout": 0.0}, "objective": {"name": "simpo"}}
        module = synthetic.randomised(Phi3LoRAModule(base, **options).to(DEVICE)).to(DEVICE)
        pairs = [synthetic.pair(200, 60, 90, 0), synthetic.pair(40, 5, 130, 1)]
        found = synthetic.pairs_of([pairs])
        if not shared:
            found["shared_lengths"] = [[0] * 4]
        found = {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in found.items()}
        with module.autocast():
            summed, count = module.compute_loss(module(found), module.head, found)
        (summed / count).backward()
        return torch.cat([parameter.grad.flatten() for parameter in module.trained_parameters()])

    truth = gradient_of("float32", False)
    apart, once = (error(gradient_of("bfloat16", shared), truth) for shared in (False, True))
    assert apart < 0.1
    assert once < 1.5 * apart
