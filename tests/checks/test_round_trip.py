"""A checkpoint that does not restore everything is detected."""

import pytest
import torch

from phi3_lightning import Phi3LoRAModule
from phi3_lightning.checks import overfit
from phi3_lightning.checks.overfit_diagnosis import OverfitDiagnosis
from phi3_lightning.checks.round_trip import CheckpointRoundTrip
from phi3_lightning.checks.rows import packaged_rows

LOAD = Phi3LoRAModule.load_state_dict


def load_other(self, state_dict, *args, **kwargs):
    name = next(name for name in state_dict if "qkv_proj.lora_A" in name)
    return LOAD(self, {**state_dict, name: torch.nextafter(state_dict[name], state_dict[name] + 1)}, *args, **kwargs)


def load_none(self, state_dict, *args, **kwargs):
    return LOAD(self, {}, strict=False)


@pytest.mark.parametrize(("load", "message"), [(LOAD, None), (load_other, "qkv_proj.lora_A"), (load_none, "lora_B")])
def test_a_lossy_checkpoint_fails_the_check(suite, monkeypatch, load, message):
    monkeypatch.setattr(overfit, "OVERFIT_STEPS", 2)
    made = suite(lora={"lora_dropout": 0.1})
    diagnosis = OverfitDiagnosis(made.shared_base, made.template, 1.0, made.folder, lambda name: None, lambda: None)
    case = diagnosis.case(packaged_rows(made.template)[:2], [[[0, 1]]])
    with made.shared_base.module() as module:
        _, trainer = overfit.overfit(module, case, made.shared_base.make_trainer, 1.0, lambda: None)
        trip = CheckpointRoundTrip(made.shared_base, module, trainer, case.batches, made.folder / "a.ckpt")
    monkeypatch.setattr(Phi3LoRAModule, "load_state_dict", load)
    with made.shared_base.module() as fresh:
        faults = trip.faults(fresh)
    assert (faults == []) == (message is None)
    assert message is None or any(message in fault for fault in faults)
