"""What a checkpoint holds, and what is checked when it is read. Pure functions on dictionaries."""

from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from phi3_lightning.config.lora import STRUCTURAL_LORA_KEYS
from phi3_lightning.errors import CheckpointError

FORMAT_VERSION = 2
"""Raised when the identity block changes; :func:`read_identity` migrates what an older version wrote.

1 had no revision, tokenizer, template, layers and packages. 2 has them.
"""

IDENTITY = "phi3_lightning"
"""Key of the identity block."""

PACKAGES = ("phi3-lightning", "torch", "lightning", "transformers", "peft")

FIXED = (*STRUCTURAL_LORA_KEYS, "slices")
"""What of the LoRA section decides which weights exist and how they are scaled; dropout and spelling may change."""

NEW_RUN = "start a new run, from these weights with model.lora.init_from, or configure the module as it was"

Mismatch = Literal["refuse", "warn"]


def identity(
    base: str | None,
    fingerprint: str,
    lora: Mapping[str, Any],
    layers: Mapping[str, int],
    revision: str | None = None,
) -> dict[str, Any]:
    """Return the block that ties a checkpoint to its base model.

    Args:
        base: The name of the base, never a local path; None where there is none.
        fingerprint: Hash of the frozen weights.
        lora: The LoRA section of the configuration, and the slices that are adapted of fused layers.
        layers: How many layers of each name are adapted.
        revision: Branch, tag or commit of the base.
    """
    return {
        "format_version": FORMAT_VERSION,
        "base": base,
        "revision": revision,
        "fingerprint": fingerprint,
        "lora": dict(lora),
        "layers": dict(layers),
        "tokenizer": None,
        "template": None,
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a folder of sources
        return "unknown"


def read_identity(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity block of a checkpoint, migrated where an older version wrote it.

    Args:
        checkpoint: A loaded checkpoint.

    Raises:
        CheckpointError: If the checkpoint is of another origin, or of a version that this package does not know.
    """
    block = checkpoint.get(IDENTITY)
    if block is None:
        raise CheckpointError(
            "the checkpoint was not written by phi3_lightning: it has no identity block. Adapters of other origin "
            "start a new run: give them as model.lora.init_from"
        )
    if block["format_version"] == 1:
        unknown = dict.fromkeys(("revision", "layers", "tokenizer", "template"))
        return {**block, **unknown, "format_version": FORMAT_VERSION, "packages": {}}
    if block["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint has format version {block['format_version']}, and this package reads 1 to "
            f"{FORMAT_VERSION}: it was written by phi3-lightning {block.get('packages', {}).get('phi3-lightning')}, "
            "use that one or a newer one"
        )
    return dict(block)


def check_identity(checkpoint: Mapping[str, Any], mine: Mapping[str, Any], on_mismatch: Mismatch = "refuse") -> None:
    """Refuse a checkpoint that was written for another base, tokenizer or adapter.

    What either side does not know is not compared: a checkpoint of an older version, a module without a datamodule.

    Args:
        checkpoint: A loaded checkpoint.
        mine: The identity block of the module that wants to read it.
        on_mismatch: Whether a difference is an error, or a warning. Shapes that do not fit are an error in any case.

    Raises:
        CheckpointError: If the checkpoint is of another origin or version, or something differs.
    """
    problems = _differences(read_identity(checkpoint), mine)
    if problems and on_mismatch == "refuse":
        raise CheckpointError("; ".join(problems))
    for problem in problems:
        rank_zero_warn(f"{problem}. It is loaded all the same, as checkpoint.on_mismatch: warn asks for")


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    problems = []
    if theirs["fingerprint"] != mine["fingerprint"]:
        problems.append(
            f"the checkpoint belongs to another base model: it was trained on {_base(theirs)}, and model.base is "
            f"{_base(mine)}; set model.base, revision, dtype and quantization as they were"
        )
    for key, where in (("tokenizer", "data.tokenizer"), ("template", "data.chat_template")):
        if None not in (theirs[key], mine[key]) and theirs[key] != mine[key]:
            problems.append(
                f"the checkpoint was trained with another {key} ({theirs[key][:12]}) than this one ({mine[key][:12]}), "
                f"which makes other tokens of the same chat; set {where} as it was"
            )
    if changes := changed_adapter(theirs, mine):
        problems.append(f"the checkpoint holds another adapter: {changes}; {NEW_RUN}")
    return problems


def changed_adapter(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """Say in what two adapters differ; empty where they have the same weights with the same effect.

    Args:
        theirs: The identity block of a checkpoint, as :func:`read_identity` returns it.
        mine: ``lora`` and ``layers`` of the module's own, as :func:`identity` takes them.
    """
    changed = [key for key in FIXED if (theirs["lora"].get(key) or None) != (mine["lora"].get(key) or None)]
    changes = [f"{key} is {mine['lora'].get(key)} and was {theirs['lora'].get(key)}" for key in changed]
    if theirs["layers"] is not None and theirs["layers"] != mine["layers"]:
        changes.append(f"target_modules adapts {_layers(mine)} and adapted {_layers(theirs)}")
    return f"model.lora.{', '.join(changes)}" if changes else ""


def _base(block: Mapping[str, Any]) -> str:
    revision = "" if block["revision"] is None else f" at {block['revision']}"
    return f"{block['base'] or 'a local folder'}{revision} ({block['fingerprint'][:12]})"


def _layers(block: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} in {count} layers" for name, count in block["layers"].items()) or "nothing"


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
        CheckpointError: If a tensor is missing, unexpected, of another shape, or holds NaN or infinity.
    """
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    problems += [
        f"{name} has shape {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    problems += [f"{name} is not finite" for name in found if name in expected and not found[name].isfinite().all()]
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(f"the checkpoint does not fit the adapter: {listed}. Hint: {NEW_RUN}")


def check_moments(optimizer_states: list[dict[str, Any]]) -> None:
    """Refuse optimiser states that would spoil the weights at the first step.

    Args:
        optimizer_states: As a checkpoint holds them.

    Raises:
        CheckpointError: If a moment holds NaN or infinity.
    """
    spoilt = [
        f"{name} of parameter {index}"
        for states in optimizer_states
        for index, moments in states["state"].items()
        for name, value in moments.items()
        if isinstance(value, Tensor) and not value.isfinite().all()
    ]
    if spoilt:
        raise CheckpointError(
            f"the checkpoint's optimiser state is not finite ({', '.join(spoilt[:5])}); give another one, such as "
            "best.ckpt beside it"
        )
