"""Strategies that would communicate or save the frozen base are refused by name."""

import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from phi3_lightning import FSDP2Strategy
from phi3_lightning.distributed.fsdp2 import check_strategy
from phi3_lightning.errors import ConfigError


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_other_sharding_strategies_are_refused(kind):
    strategy = kind.__new__(kind)  # without its constructor, which checks the machine
    with pytest.raises(ConfigError, match=rf"trainer\.strategy: {kind.__name__} is not supported: use ddp"):
        check_strategy(strategy)


def test_ddp_and_fsdp2_are_accepted():
    check_strategy(DDPStrategy())
    check_strategy(FSDP2Strategy())


@pytest.mark.parametrize(
    ("options", "backend"),
    [
        ({}, "nccl"),
        ({"cpu_offload": True}, "cpu:gloo,cuda:nccl"),
        ({"cpu_offload": True, "process_group_backend": "gloo"}, "gloo"),
    ],
)
def test_what_is_offloaded_is_exchanged_by_gloo(options, backend):
    strategy = FSDP2Strategy(**options)
    strategy.parallel_devices, strategy.cluster_environment = [torch.device("cuda", 0)], LightningEnvironment()
    assert strategy._get_process_group_backend() == backend
