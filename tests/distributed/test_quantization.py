"""A quantised base on two ranks of ddp has the gradient of one process, and only the adapter is communicated."""

import importlib.util

import pytest
import torch

import synthetic

from . import cases, ranks

DOCUMENTS = [synthetic.document(count + 4, count, count) for count in (5, 30)]


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            "nf4", marks=pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no qlora")
        ),
        pytest.param(
            "int8_dynamic",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx512_vnni"), reason="no AVX-512 VNNI"),
            ],
        ),
    ],
)
def test_two_ranks_have_the_gradient_of_one(base, tmp_path, kind):
    model = {"quantization": kind}

    def run(strategy, world):
        if world == 1:
            batches = [synthetic.batch_of([[d] for d in DOCUMENTS])]
        else:
            batches = [synthetic.batch_of([[d]]) for d in DOCUMENTS]
        return cases.fit(tmp_path, base, batches, strategy, world, model=model)

    alone = ranks.run(tmp_path, 1, run, "auto", 1)[0]
    for found in ranks.run(tmp_path, 2, run, "ddp", 2):
        assert found["fingerprint"] == alone["fingerprint"]
        # a rounding of float32 for each token
        assert found["losses"] == pytest.approx(alone["losses"], rel=35 * cases.EPSILON)
        largest = alone["gradients"][0].abs().max()
        assert (found["gradients"][0] - alone["gradients"][0]).abs().max() <= 35 * cases.EPSILON * largest
