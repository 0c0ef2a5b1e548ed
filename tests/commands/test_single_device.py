"""The devices of ``trainer.devices``, which Lightning takes as a number, a list or a text of either."""

import pytest
from jsonargparse import Namespace

from phi3_lightning.commands.plan import _ranks
from phi3_lightning.commands.single_device import device_list


@pytest.mark.parametrize(
    ("devices", "indices", "count"),
    [(2, None, 2), ("2", None, 2), ([1, 3], [1, 3], 2), ("1,3", [1, 3], 2), ("1,", [1], 1), ("auto", None, 1)],
)
def test_devices_are_a_list_or_a_number(devices, indices, count):
    assert device_list(devices) == indices
    assert _ranks(Namespace(devices=devices, num_nodes=2), on_gpu=False) == 2 * count
