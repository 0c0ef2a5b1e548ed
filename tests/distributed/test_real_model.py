"""A pretrained model on one process and on two ranks."""

import pytest

import synthetic
from cli.test_real_models import real_base  # noqa: F401  # a fixture

from . import cases, ranks

SUPERVISED = [1, 60, 7, 20]
DOCUMENTS = [synthetic.document(count + 4, count, seed) for seed, count in enumerate(SUPERVISED)]
LAYERS = 30
"""Each adds its own rounding to the input of the next."""


def check(base: str, tmp_path) -> None:
    whole = [synthetic.batch_of([[d] for d in DOCUMENTS])]
    halves = [synthetic.batch_of([[d] for d in DOCUMENTS[i::2]]) for i in range(2)]
    alone = cases.fit(tmp_path, base, whole)
    largest = alone["gradients"][0].abs().max()
    tolerance = LAYERS * sum(SUPERVISED) * cases.EPSILON
    for strategy in ("ddp", {}):
        for found in ranks.run(tmp_path, 2, cases.fit, tmp_path, base, halves, strategy, 2, seconds=300):
            assert found["fingerprint"] == alone["fingerprint"]
            difference = (found["gradients"][0] - alone["gradients"][0]).abs().max() / largest
            print(f"{strategy or 'fsdp2'}: {difference:.1e} of the largest entry, tolerance {tolerance:.1e}")
            assert difference <= tolerance
            assert found["losses"] == pytest.approx(alone["losses"], rel=tolerance)


@pytest.mark.slow
@pytest.mark.xdist_group("large")
def test_one_window_has_one_gradient(real_base, tmp_path):  # noqa: F811
    check(str(real_base), tmp_path)
