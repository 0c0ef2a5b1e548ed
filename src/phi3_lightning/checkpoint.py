"""What a checkpoint holds, and what is checked when it is read. Pure functions on dictionaries."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from phi3_lightning.config import STRUCTURAL_LORA_KEYS
from phi3_lightning.errors import CheckpointError

FORMAT_VERSION = 1
"""Raised when a checkpoint of an older version can no longer be read as it stands."""

IDENTITY = "phi3_lightning"
"""Key of the identity block."""

NEW_RUN = "start a new run, or load the checkpoint into a module that is configured as it was written"


def identity(base: str | None, fingerprint: str, lora: dict[str, Any]) -> dict[str, Any]:
    """Return the block that ties a checkpoint to its base model.

    Args:
        base: The name of the base, never a local path; None where there is none.
        fingerprint: Hash of the frozen weights.
        lora: The LoRA section of the configuration, and the slices that are adapted of fused layers.
    """
    return {"format_version": FORMAT_VERSION, "base": base, "fingerprint": fingerprint, "lora": lora}


def check_identity(checkpoint: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that was written for another base or another adapter.

    Args:
        checkpoint: A loaded checkpoint.
        mine: The identity block of the module that wants to read it.

    Raises:
        CheckpointError: If the checkpoint is of another origin or version, or base or LoRA section differ.
    """
    theirs = checkpoint.get(IDENTITY)
    if theirs is None:
        raise CheckpointError("the checkpoint was not written by phi3_lightning: it has no identity block")
    if theirs["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint has format version {theirs['format_version']}, and this package reads {FORMAT_VERSION}"
        )
    if theirs["fingerprint"] != mine["fingerprint"]:
        raise CheckpointError(
            f"the checkpoint belongs to another base model: it was trained on {theirs['base'] or 'a local folder'} "
            f"({theirs['fingerprint'][:12]}), and model.base is {mine['base'] or 'a local folder'} "
            f"({mine['fingerprint'][:12]}); set model.base, revision, dtype and quantization as they were"
        )
    # dropout and the spelling of the targets may change; which weights exist and how they are scaled may not
    fixed = mine["lora"].keys() & {*STRUCTURAL_LORA_KEYS, "slices"}
    changed = [key for key in sorted(fixed) if theirs["lora"].get(key) != mine["lora"][key]]
    if changed:
        pairs = ", ".join(f"{key} is {mine['lora'][key]} and was {theirs['lora'].get(key)}" for key in changed)
        raise CheckpointError(f"the checkpoint holds another adapter: model.lora.{pairs}; {NEW_RUN}")


def plain_name(name: str) -> str:
    """Return the name of a tensor without the mark that :func:`torch.compile` leaves where it wraps a module.

    Args:
        name: A key of a state dictionary.
    """
    return name.replace("_orig_mod.", "")


def without_frozen(state: Mapping[str, Tensor], frozen: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors that training can change: all but the frozen parameters, and the scales of quantised ones.

    Args:
        state: The state dictionary of a module.
        frozen: Names of its frozen parameters.
    """
    return {name: tensor for name, tensor in state.items() if _of_parameter(name) not in frozen}


def _of_parameter(name: str) -> str:
    """The parameter that a tensor belongs to: bitsandbytes saves weight.absmax and the like, SCB and weight_format."""
    owner, _, last = name.rpartition(".")
    if last in ("SCB", "weight_format"):
        return f"{owner}.weight"
    layer, inside, _ = name.partition(".weight.")
    return f"{layer}.weight" if inside else name


def check_state(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse a state dictionary that does not fit, tensor by tensor.

    Args:
        found: What the checkpoint holds.
        expected: What the module would save now.

    Raises:
        CheckpointError: If a tensor is missing, unexpected or of another shape.
    """
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    problems += [
        f"{name} has shape {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(f"the checkpoint does not fit the adapter: {listed}. Hint: {NEW_RUN}")
