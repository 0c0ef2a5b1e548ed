"""A checkpoint that does not bring everything back is found out."""

import pytest
import torch

from phi3_lightning import Phi3LoRAModule
from phi3_lightning.checks import overfit
from phi3_lightning.checks.overfit_diagnosis import OverfitDiagnosis
from phi3_lightning.checks.round_trip import CheckpointRoundTrip
from phi3_lightning.checks.rows import packaged_rows

LOAD = Phi3LoRAModule.load_state_dict


def changed(self, state_dict, *args, **kwargs):
    name = next(name for name in state_dict if "qkv_proj.lora_A" in name)
    return LOAD(self, {**state_dict, name: torch.nextafter(state_dict[name], state_dict[name] + 1)}, *args, **kwargs)


def nothing(self, state_dict, *args, **kwargs):
    return LOAD(self, {}, strict=False)


@pytest.mark.parametrize(("load", "told"), [(LOAD, None), (changed, "qkv_proj.lora_A"), (nothing, "lora_B")])
def test_what_does_not_come_back(suite, monkeypatch, load, told):
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
    assert (faults == []) == (told is None)
    assert told is None or any(told in fault for fault in faults)
