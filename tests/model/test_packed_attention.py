"""Attention within each document equals transformers' own kernels on the document alone."""

import pytest
import torch
from torch.nn import functional as F
from transformers import Phi3ForCausalLM

import synthetic
from phi3_lightning.model import base, packed_attention

EPSILON = torch.finfo(torch.float32).eps
LONG = {"max_position_embeddings": 1024, "original_max_position_embeddings": 1024}
LENGTHS = [3, 191, 1, 192, 193, 30, 400]
"""Lengths on both sides of a block's of the kernel on a CPU."""


@pytest.fixture(params=[{}, {"num_key_value_heads": 4}, {"sliding_window": 50}], ids=["GQA", "MHA", "window"])
def folder(request, tmp_path) -> str:
    return synthetic.save_tiny(tmp_path / "base", **LONG, **request.param)


def loaded(folder: str, kernel: str) -> Phi3ForCausalLM:
    return base.load(folder, dtype="float32", attn_implementation=kernel)


def test_each_document_is_as_if_it_were_alone(folder):
    made = [synthetic.document(length, length - 1, length) for length in LENGTHS]
    batch = synthetic.batch_of([made[:3], made[3:]])  # the first row ends in padding
    weights = torch.randn(batch["input_ids"].numel(), 32, generator=torch.Generator().manual_seed(0))
    packed, alone = loaded(folder, "documents"), loaded(folder, "eager")
    for model in (packed, alone):
        model.model.embed_tokens.requires_grad_()
    hidden = packed_attention.last_hidden_state(packed, batch)
    places, lengths = packed_attention.one_row(batch)
    assert lengths == LENGTHS
    expected = [alone.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0] for ids, _ in made]
    # float32 products of at most 400 terms in another order, through two layers of a residual stream of size about 1
    tolerance = 400 * EPSILON
    torch.testing.assert_close(hidden.flatten(0, 1)[places], torch.cat(expected), rtol=0, atol=tolerance * 10)
    (hidden.flatten(0, 1) * weights)[places].sum().backward()
    (torch.cat(expected) * weights[places]).sum().backward()
    found, expected = (model.model.embed_tokens.weight.grad for model in (packed, alone))
    assert (found - expected).abs().max() <= tolerance * 10 * expected.abs().max()


def test_a_batch_without_documents_gives_zeros_to_every_gradient(tiny_base):
    model = loaded(tiny_base, "documents")
    model.model.embed_tokens.requires_grad_()
    hidden = packed_attention.last_hidden_state(model, synthetic.batch_of([[]]))
    assert hidden.shape == (1, 2, 32)
    (hidden.sum() * 0).backward()
    assert not model.model.embed_tokens.weight.grad.any()


@pytest.mark.parametrize("length", [40, 300, 1030])
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_bfloat16_rounding_is_that_of_flash_attention(length, scale):
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, heads, length, 16, generator=generator) for heads in (4, 2, 2))
    q, k, v = (tensor.bfloat16() for tensor in (q * scale, k * scale, v))  # scores of up to about 150
    found, _ = packed_attention.attend(torch.nn.Module(), q, k, v, None, scaling=0.25, documents=[length])
    exact = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True, scale=0.25, enable_gqa=True
    ).transpose(1, 2)
    # weights of a sum of 1, and the output, are rounded to 8 significant bits: 2^-8 each of the largest value
    assert (found.double() - exact).abs().max() <= 2**-7 * v.abs().max()
    # negative control: bfloat16 scores, as in eager attention, are off by far more where they are large
    scores = (q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.25).float()
    scores += torch.full((length, length), float("-inf")).triu(1)
    eager = scores.softmax(-1).bfloat16() @ v.repeat_interleave(2, 1)
    if scale > 1:
        assert (eager.transpose(1, 2).double() - exact).abs().max() > 2**-7 * v.abs().max()


def test_attention_dropout_is_applied(tmp_path):
    folder = synthetic.save_tiny(tmp_path / "base", attention_dropout=0.5)
    model = loaded(folder, "documents")
    batch = synthetic.batch_of([[synthetic.document(9, 5, 0)]])
    with torch.no_grad():
        first, second = (packed_attention.last_hidden_state(model.train(), batch) for _ in range(2))
        assert not torch.equal(first, second)
        third, fourth = (packed_attention.last_hidden_state(model.eval(), batch) for _ in range(2))
    assert torch.equal(third, fourth)


def test_generation_with_padded_prompts_is_that_of_sdpa(tiny_base):
    prompts = synthetic.prompt_batch([[5, 6, 7], [8, 9, 10, 11, 12, 13]], stop_ids=[2])
    answers = [
        loaded(tiny_base, kernel).generate(
            input_ids=prompts["input_ids"], attention_mask=prompts["attention_mask"], max_new_tokens=8, do_sample=False
        )
        for kernel in ("documents", "sdpa")
    ]
    assert torch.equal(*answers)


def test_memory_of_a_packed_row_is_linear_in_its_length(tiny_base):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.entries = max(self.entries, result.numel())
            return result

    batch = synthetic.batch_of([[synthetic.document(32, 20, seed) for seed in range(64)]])
    entries = {}
    for kernel in ("documents", "sdpa"):
        with torch.no_grad(), Largest() as largest:
            packed_attention.last_hidden_state(loaded(tiny_base, kernel), batch)
        entries[kernel] = largest.entries
    tokens = 64 * 32
    assert entries["sdpa"] >= tokens**2  # the mask alone
    assert entries["documents"] <= tokens * 4 * 128  # the widest output has 256 values per token, and so its delta
