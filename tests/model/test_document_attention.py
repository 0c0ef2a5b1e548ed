"""Attention by blocks of plain products equals attention with a mask in float64, in both directions."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from phi3_lightning.model import document_attention
from phi3_lightning.model.document_attention import attend_documents

HEADS, KEY_HEADS, SIZE, SCALING = 4, 2, 16, 0.25
LENGTHS = [30, 7, 500, 1, 193]
SHARED = [0, 12, 0, 400, 0]
"""The second and the fourth document begin with tokens of the one before."""
ALL = sum(LENGTHS)


def states(dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, ALL, SIZE, generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    return [tensor.to(dtype).requires_grad_() for tensor in (q * scale, k * scale, v)]


def by_mask(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    outputs, start, former = [], 0, 0
    for length, shared in zip(LENGTHS, SHARED, strict=True):
        places = torch.cat([torch.arange(former, former + shared), torch.arange(start, start + length)])
        seen = torch.ones(length, shared + length, dtype=torch.bool).tril(shared).triu(shared + 1 - window)
        keys, values = k[:, places], v[:, places]
        query = q[:, start : start + length]
        outputs.append(
            F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=SCALING, enable_gqa=True)
        )
        start, former = start + length, start
    return torch.cat(outputs, dim=1).transpose(0, 1)


def compare(dtype: torch.dtype, window: int, saved: int, scale: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    """Return output and the gradients of queries, keys and values, each beside that in float64."""
    grad = torch.randn(ALL, HEADS, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)
    inputs = states(dtype, scale)
    output, _ = attend_documents(*inputs, LENGTHS, SHARED, SCALING, window, saved)
    output.backward(grad)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = by_mask(*exact, window)
    expected.backward(grad.double())
    pairs = zip([output, *(tensor.grad for tensor in inputs)], [expected, *(t.grad for t in exact)], strict=True)
    return [(found.detach().double(), wanted.detach()) for found, wanted in pairs]


@pytest.fixture(params=[(192, 2**21), (64, 2**21), (64, 20_000)], ids=["blocks", "small blocks", "heads apart"])
def blocks(request, monkeypatch) -> None:
    monkeypatch.setattr(document_attention, "BLOCK", request.param[0])
    monkeypatch.setattr(document_attention, "MAX_SCORES", request.param[1])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("window", [ALL, 100, 3])
@pytest.mark.parametrize("saved", [0, 100, 1024])
def test_float32_equals_attention_with_a_mask(window, saved):
    for found, expected in compare(torch.float32, window, saved):
        # sums of at most 500 terms, each of which went through a product of 16
        tolerance = 500 * torch.finfo(torch.float32).eps * expected.abs().max()
        torch.testing.assert_close(found, expected, rtol=0, atol=float(tolerance))


@pytest.mark.parametrize("saved", [0, 1024])
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_bfloat16_is_rounded_where_flash_attention_rounds(scale, saved):
    (output, exact), *gradients = compare(torch.bfloat16, ALL, saved, scale)
    values = states(torch.bfloat16)[2].abs().max()
    # probabilities, which sum to 1, and the output are rounded to 8 significant bits: 2^-8 each of the largest value
    assert (output - exact).abs().max() <= 2**-7 * values
    for found, expected in gradients:
        # three such roundings of the terms of each gradient, and one of the sum
        assert (found - expected).norm() <= 4 * 2**-8 * expected.norm()


def test_the_softmax_gradient_is_subtracted_before_it_is_rounded(monkeypatch):
    """Where a query sees almost one key alone, the score's gradient is a small difference of large numbers."""

    def error() -> float:
        _, (found, expected), *_ = compare(torch.bfloat16, ALL, 1024, 6.0)
        return float((found - expected).norm() / expected.norm())

    precise = error()
    cat = torch.cat
    # negative control: without the column that has what rounding takes from the row's sum
    monkeypatch.setattr(
        torch, "cat", lambda parts, dim=0: cat([*parts[:2], parts[2] * 0] if len(parts) == 3 else parts, dim=dim)
    )
    assert error() > 1.5 * precise


def test_the_operator_is_registered_as_torch_checks_it():
    args = (*states(torch.float32), LENGTHS, SHARED, SCALING, 100, 1024)
    torch.library.opcheck(attend_documents, args)


def test_nothing_is_saved_without_gradients():
    q, k, v = states(torch.float32)
    _, saved = attend_documents(q, k, v, LENGTHS, SHARED, SCALING, ALL, 1024)
    assert sum(part.numel() for part in saved) > 0
    _, saved = attend_documents(q, k, v, LENGTHS, SHARED, SCALING, ALL, 0)
    assert saved == []
