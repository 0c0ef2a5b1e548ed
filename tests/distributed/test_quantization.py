"""A quantised base on two ranks of ddp has the gradient of one process, and only the adapter is communicated."""

import pytest

import synthetic

from . import cases, ranks

pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
DOCUMENTS = [synthetic.document(count + 4, count, count) for count in (5, 30)]


def test_nf4_on_two_ranks_has_the_gradient_of_one(base, tmp_path):
    model = {"quantization": "nf4"}

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
