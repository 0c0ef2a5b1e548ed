"""The prompt of a pair, computed once, against two whole documents."""

import pytest
import torch
from torch.nn import functional as F
from transformers import Phi3ForCausalLM

import synthetic
from phi3_lightning.model import base, packed_attention
from phi3_lightning.model.shared_prompts import computed_row

EPSILON = torch.finfo(torch.float32).eps
LONG = {"max_position_embeddings": 1024, "original_max_position_embeddings": 1024}
ROWS = [
    [synthetic.pair(1, 3, 5, 0), synthetic.pair(9, 4, 1, 1), synthetic.pair(250, 3, 30, 2)],
    [synthetic.pair(300, 60, 5, 3)],
    [synthetic.pair(20, 280, 7, 4), synthetic.pair(2, 1, 1, 5)],
    [synthetic.pair(660, 5, 330, 6)],
]
"""Prompts of one token, of which nothing is shared, and documents, shared tokens and what follows them on both sides of
the length from which a CPU takes its flash kernel."""


@pytest.fixture(params=[{}, {"num_key_value_heads": 4}, {"sliding_window": 50}], ids=["GQA", "MHA", "window"])
def model(request, tmp_path) -> Phi3ForCausalLM:
    folder = synthetic.save_tiny(tmp_path / "base", **LONG, **request.param)
    loaded = base.load(folder, dtype="float32", attn_implementation="documents")
    loaded.model.embed_tokens.requires_grad_()
    return loaded


def whole(batch) -> dict:
    return {name: value for name, value in batch.items() if name != "shared_lengths"}


def computed_tokens(model, batch) -> int:
    seen = []
    handle = model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    with torch.no_grad():
        packed_attention.last_hidden_state(model, batch)
    handle.remove()
    return seen[0][:2].numel()


@pytest.mark.parametrize("kernel", ["one after the other", "one kernel"])
def test_shared_tokens_give_what_two_documents_give(model, kernel, request):
    if kernel == "one kernel":
        request.getfixturevalue("as_on_a_gpu")
    batch = synthetic.pairs_of(ROWS)
    weights = torch.randn(*batch["input_ids"].shape, 32, generator=torch.Generator().manual_seed(0))
    gradients, states = [], []
    for each in (batch, whole(batch)):
        hidden = packed_attention.last_hidden_state(model, each)
        model.zero_grad()
        (hidden * weights).sum().backward()
        states.append(hidden)
        gradients.append(model.model.embed_tokens.weight.grad.clone())
    # float32 products of at most 990 terms in another order, through two layers of a residual stream of size about 1
    tolerance = 10 * 990 * EPSILON
    torch.testing.assert_close(*states, rtol=0, atol=tolerance)
    assert (gradients[0] - gradients[1]).abs().max() <= tolerance * gradients[1].abs().max()


def test_shared_tokens_are_computed_once(model):
    batch = synthetic.pairs_of(ROWS)
    shared = sum(map(sum, batch["shared_lengths"]))
    assert shared == 0 + 8 + 249 + 299 + 19 + 1 + 659
    assert computed_tokens(model, whole(batch)) - computed_tokens(model, batch) == shared


def test_other_kernels_get_two_documents(tmp_path):
    folder = synthetic.save_tiny(tmp_path / "base", **LONG)
    batch = synthetic.pairs_of([[synthetic.pair(9, 4, 3, 1)]])
    sdpa = base.load(folder, dtype="float32", attn_implementation="sdpa")
    assert packed_attention.shared_lengths(sdpa, batch) is None
    assert computed_tokens(sdpa, batch) == batch["input_ids"].numel()


def test_the_row_that_is_computed():
    batch = synthetic.pairs_of([[synthetic.pair(4, 2, 3, 0)], [synthetic.pair(2, 1, 1, 1)]])
    row = computed_row(batch)
    assert row.lengths == [6, 4, 3, 2]
    assert row.shared == [0, 3, 0, 1]
    width = 13  # two documents of 6 and 7 tokens; the other row ends in padding
    assert row.places.tolist() == [*range(6), *range(9, 13), width, width + 1, width + 2, width + 4, width + 5]
    assert row.sources.tolist() == [*range(6), 0, 1, 2, *range(6, 10), 10, 11, 12, 10, 13, 14]


def test_the_last_query_is_on_the_last_key():
    """torch's own ``is_causal`` puts the first query on the first key: the negative control."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 8, generator=generator) for length in (3, 7, 7))
    found = packed_attention._attend_one(q, k, v, 0.3, 0.0, None)
    expected = [
        F.scaled_dot_product_attention(q[:, :, at : at + 1], k[:, :, : 5 + at], v[:, :, : 5 + at], scale=0.3)
        for at in range(3)
    ]
    torch.testing.assert_close(found, torch.cat(expected, dim=2), rtol=0, atol=16 * EPSILON * v.abs().max())
    upper_left = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    assert (upper_left - found).abs().max() > 0.1
