"""Products in 8 bits: each error is that of rounding to 8 bits, and training works on such a base."""

import hashlib

import pytest
import torch
from torch import nn

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.config import Generation
from phi3_lightning.distributed.fsdp2 import FSDP2Strategy
from phi3_lightning.errors import CheckpointError, ConfigError, ModelError
from phi3_lightning.generation.decode import generate
from phi3_lightning.model import base as base_model
from phi3_lightning.model import int8_dynamic
from phi3_lightning.model.activation_checkpointing import checkpoint_activations

needs_vnni = pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_vnni"), reason="this CPU has no AVX-512 VNNI"
)
BATCH = synthetic.batch_of([[synthetic.document(12, 6, seed), synthetic.document(9, 5, seed + 5)] for seed in range(2)])
EPSILON = torch.finfo(torch.float32).eps


def quantized_layer(inputs: int, outputs: int) -> tuple[int8_dynamic.Int8DynamicLinear, torch.Tensor]:
    """A layer, and the weight that it was made from."""
    torch.manual_seed(inputs)
    holder = nn.Module()
    holder.model = nn.Sequential(nn.Linear(inputs, outputs, bias=False).requires_grad_(False))
    weight = holder.model[0].weight.clone()
    int8_dynamic.quantize_layers(holder)
    return holder.model[0], weight


def rotated(x: torch.Tensor) -> torch.Tensor:
    """By torch's own Kronecker products, as float64."""
    size = next(size for size in (64, 32, 16, 8, 4, 2, 1) if x.shape[-1] % size == 0)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return (x.double().unflatten(-1, (-1, size)) @ matrix).flatten(-2)


@pytest.mark.parametrize("inputs", [128, 96, 30, 7])
@pytest.mark.parametrize("rows", [(2, 3), (1,), (40,), (0,)])
def test_products_are_those_of_the_weights_within_a_rounding_to_8_bits(inputs, rows):
    """Each value is at most half a step from its own, which is a 127th of the largest of its token."""
    layer, weight = quantized_layer(inputs, 48)
    stored = layer.weight.double() * layer.scale.double()[:, None]
    # a weight: half a step, and a rotation adds up those of a block
    block = min(inputs & -inputs, 64)
    assert ((layer.dequantize() - weight).abs().amax(1) <= 1.001 * block * layer.scale / 2).all()
    x = torch.randn(*rows, inputs).requires_grad_()
    output = layer(x)
    turned = rotated(x.detach())
    step = turned.abs().amax(-1, keepdim=True) / 127
    expected = x.detach().double() @ layer.dequantize().double().T
    slack = 40 * EPSILON * turned.abs() @ stored.abs().T
    assert ((output.detach() - expected).abs() <= step / 2 * stored.abs().sum(1) + slack).all()
    gradient = torch.randn_like(output)
    before = gradient.clone()
    output.backward(gradient)
    assert torch.equal(gradient, before)
    scaled = gradient.double() * layer.scale
    errors = scaled.abs().amax(-1, keepdim=True) / 254 * layer.weight.double().abs().sum(0)
    bound = errors.unflatten(-1, (-1, block)).sum(-1, keepdim=True).expand(*rows, -1, block).flatten(-2)
    exact = gradient.double() @ layer.dequantize().double()
    assert ((x.grad - exact).abs() <= bound * 1.001 + 1e-5).all()


def test_an_outlier_costs_the_others_of_its_token_little(monkeypatch):
    def error() -> float:
        layer, weight = quantized_layer(256, 64)
        x = torch.randn(64, 256)
        x[:, 5] *= 100
        expected = x @ weight.T
        return ((layer(x) - expected).norm() / expected.norm()).item()

    turned = error()
    monkeypatch.setattr(int8_dynamic, "MAX_BLOCK", 1)
    assert error() > 3 * turned


def test_a_token_has_the_same_bits_whatever_is_computed_with_it(monkeypatch):
    layer, _ = quantized_layer(64, 48)
    x = torch.randn(30, 64)
    whole = layer(x)
    assert all(torch.equal(layer(x[row]), whole[row]) for row in range(3))
    monkeypatch.setattr(int8_dynamic, "PRODUCT_ELEMENTS", 7 * 64)
    monkeypatch.setattr(int8_dynamic, "CACHED_ELEMENTS", 2 * 48)
    assert torch.equal(layer(x), whole)


def test_zeros_stay_zero_and_what_is_not_finite_shows_in_its_token_alone():
    layer, _ = quantized_layer(64, 48)
    x = torch.randn(3, 64)
    x[0], x[1, 3], x[2, 3] = 0, float("nan"), 1
    output = layer(x)
    assert not output[0].any()
    assert output[1].isnan().all()
    assert output[2].isfinite().all()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("eight_bits") / "base"
    return synthetic.save_tiny(folder, hidden_size=64, intermediate_size=128)


def made(base: str, quantization: str | None = "int8_dynamic", **options) -> Phi3LoRAModule:
    options = {"lora": {"lora_dropout": 0.0}, "gradient_checkpointing": "none"} | options
    return synthetic.randomised(Phi3LoRAModule(base, quantization=quantization, **options)).train()


def loss_and_gradient(module: Phi3LoRAModule) -> tuple[torch.Tensor, torch.Tensor]:
    with module.autocast():
        loss, _ = module.compute_loss(module(BATCH), module.head, BATCH)
    gradients = torch.autograd.grad(loss, list(module.trained_parameters()))
    return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])


@needs_vnni
@pytest.mark.parametrize("backend", ["peft", "loralib"])
def test_the_gradient_is_near_that_of_the_base_in_bfloat16(base, backend, monkeypatch):
    pytest.importorskip(backend)
    lora = {"backend": backend, "lora_dropout": 0.0}
    (loss, gradient), (exact_loss, exact) = (
        loss_and_gradient(made(base, kind, lora=lora)) for kind in ("int8_dynamic", None)
    )
    assert loss.item() == pytest.approx(exact_loss.item(), rel=0.01)
    assert (gradient - exact).norm() < 0.1 * exact.norm()
    monkeypatch.setattr(int8_dynamic, "LARGEST", 3)  # 3 bits
    assert (loss_and_gradient(made(base, lora=lora))[1] - exact).norm() > 0.1 * exact.norm()


@needs_vnni
def test_the_layers_take_half_the_memory_of_bfloat16(base):
    model = base_model.load(base, quantization="int8_dynamic")
    layer = model.model.layers[0].mlp.down_proj
    assert (layer.weight.dtype, layer.weight.nbytes, layer.scale.nbytes) == (torch.int8, 64 * 128, 4 * 64)
    assert not layer.weight.requires_grad
    assert model.lm_head.weight.dtype == torch.bfloat16


@needs_vnni
def test_recomputation_changes_no_bit_and_keeps_products(base):
    module = made(base)
    results = []
    for mode in ("none", "selective", "full", 2):
        checkpoint_activations(module.loaded_model, mode)
        calls = []
        with pytest.MonkeyPatch.context() as patch:
            multiply = int8_dynamic._multiply
            patch.setattr(int8_dynamic, "_multiply", lambda *a, _m=multiply, _c=calls, **k: (_c.append(1), _m(*a, **k)))
            results.append([*loss_and_gradient(module), len(calls)])
    assert all(torch.equal(result[1], results[0][1]) for result in results)
    none, selective, full, _ = (result[2] for result in results)
    assert selective == none < full


@needs_vnni
@pytest.mark.parametrize("backend", ["peft", "loralib"])
def test_an_adapter_that_is_off_gives_the_base(base, backend):
    pytest.importorskip(backend)
    bare = base_model.load(base, dtype="float32", quantization="int8_dynamic")
    module = made(base, dtype="float32", lora={"backend": backend})
    ids = torch.arange(8)[None]
    expected = bare(input_ids=ids).logits
    with module.base_answers():
        assert torch.equal(module.eval().loaded_model(input_ids=ids).logits, expected)
    assert not torch.allclose(module.loaded_model(input_ids=ids).logits, expected, atol=1e-3)
    assert torch.equal(module.detach_adapter()(input_ids=ids).logits, expected)


@needs_vnni
def test_the_reference_of_a_fresh_adapter_is_the_base(base):
    batch = synthetic.pairs_of([[synthetic.pair(9, 4, 3, seed) for seed in range(2)]])
    module = Phi3LoRAModule(base, quantization="int8_dynamic", lora={"lora_dropout": 0.0}, objective={"name": "dpo"})
    module.configure_model()
    with module.train().autocast():
        loss, count = module.compute_loss(module(batch), module.head, batch)
    assert (loss / count).item() == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-3)


@needs_vnni
def test_generation_with_a_cache_writes_what_the_whole_text_predicts(base):
    module = made(base, dtype="float32").eval()
    prompt = [5, 9, 14, 3]
    [answer] = generate(module.loaded_model, synthetic.prompt_batch([prompt], []), Generation(max_new_tokens=6))
    text = list(prompt)
    for _ in range(6):
        text.append(int(module.loaded_model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
    assert answer == text[len(prompt) :]


def frozen(module: Phi3LoRAModule) -> str:
    model = module.loaded_model
    tensors = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
    return hashlib.sha256(
        b"".join(t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
    ).hexdigest()


@needs_vnni
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_a_restart_ends_in_the_same_bits_and_the_base_stays(base, precision, tmp_path):
    def run(steps: int, ckpt=None):
        torch.manual_seed(3)
        dtype = "float32" if precision == "32-true" else "bfloat16"
        module = Phi3LoRAModule(base, quantization="int8_dynamic", dtype=dtype, optimizer={"lr": 1e-2},
                                schedule={"name": "constant", "warmup": 0})  # fmt: skip
        module.configure_model()
        before = frozen(module)
        trainer = synthetic.trainer(tmp_path, max_epochs=-1, max_steps=steps, precision=precision)
        trainer.fit(module, synthetic.loader([BATCH] * 2), ckpt_path=ckpt, weights_only=True)
        assert frozen(module) == before
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt", weights_only=False)
        return [parameter.detach().clone() for parameter in module.trained_parameters()]

    whole, _ = run(4), run(2)
    assert all(map(torch.equal, run(4, tmp_path / "2.ckpt"), whole))
    checkpoint = torch.load(tmp_path / "4.ckpt", weights_only=True)
    assert len(checkpoint["state_dict"]) == len(whole)
    if precision == "bf16-mixed":
        with pytest.raises(CheckpointError, match="dtype and quantization as they were"):
            Phi3LoRAModule.load_from_checkpoint(tmp_path / "4.ckpt", weights_only=True, quantization=None)


@needs_vnni
def test_random_weights_are_quantised_too(base):
    assert base_model.load(base, init="random", quantization="int8_dynamic").model.layers[0].mlp.down_proj.scale.all()


def test_what_cannot_work_is_refused_with_what_to_use(base, monkeypatch):
    with pytest.raises(ModelError, match=r"quantization: int8_dynamic runs on a CPU, .* uses cuda; use int8 or nf4"):
        int8_dynamic.check_device("cuda")
    with pytest.raises(ModelError, match="uses meta"):
        quantized_layer(64, 48)[0].to("meta")(torch.empty(2, 64, device="meta"))
    with pytest.raises(ModelError, match="uses cuda"):
        base_model.load(base, quantization="int8_dynamic", device="cuda")
    module = Phi3LoRAModule(base, quantization="int8_dynamic")
    sharded = synthetic.trainer(base, strategy=FSDP2Strategy(), devices=1)
    module._trainer = sharded
    with pytest.raises(ConfigError, match=r"model\.quantization: 'int8_dynamic' .* use trainer\.strategy: ddp"):
        module.configure_model()
    module._trainer = None
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    with pytest.raises(ModelError, match="needs a CPU with AVX-512 VNNI"):
        module.configure_model()
    with pytest.raises(ModelError, match="needs a CPU with AVX-512 VNNI"):  # before anything is loaded
        synthetic.trainer(base).fit(Phi3LoRAModule("nowhere", quantization="int8_dynamic"), synthetic.loader([BATCH]))


@needs_vnni
@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"use_dora": True}, r"model\.lora\.use_dora: .* set model\.quantization: nf4"),
        ({"target_modules": ["qkv_proj"], "modules_to_save": ["o_proj"]}, "o_proj is quantised"),
    ],
)
def test_adapters_that_need_the_weights_are_refused(base, lora, message):
    with pytest.raises(ModelError, match=message):
        Phi3LoRAModule(base, quantization="int8_dynamic", lora=lora).configure_model()
