"""loralib's tensors <-> PEFT's, both ways, exact. Pure functions on dictionaries of tensors.

loralib keeps a LoRA delta for each slice of a fused layer; PEFT has one for the full layer. The slices' ``A`` stacked
and their ``B`` on the diagonal of a larger ``B`` are the same delta. An adapter gets one rank and one scale, smaller
deltas padded with zeros, because there are servers that read no rank or alpha patterns.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from peft import LoraConfig
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F  # noqa: N812

from phi3_lightning.adapters.adapter import PeftForm
from phi3_lightning.adapters.targets import Target, ends_with, rank_and_scaling
from phi3_lightning.errors import CheckpointError


def block_diagonal(up: Tensor, slices: Sequence[int], enabled: Sequence[bool]) -> Tensor:
    """Return the ``B`` of the full layer, whose ``A`` is that of the slices, stacked.

    ``up`` is that of the slices, shape (rows of the enabled ones, rank); the result has the shape (rows of all slices,
    enabled slices x rank) and is zero on the rows of disabled slices.
    """
    sizes = list(zip(slices, enabled, strict=True))
    blocks = iter(up.split([rows for rows, on in sizes if on]))
    diagonal: Tensor = torch.block_diag(*(next(blocks) if on else up.new_zeros(rows, 0) for rows, on in sizes))
    return diagonal


def to_cpu_float32(tensor: Tensor) -> Tensor:
    """Return a float32 copy on the CPU; of a sharded tensor all of it, in a collective of all ranks."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().float().cpu().clone()


def peft_keys(target: Target) -> tuple[str, str]:
    """Return the names of a layer's ``A`` and ``B`` in PEFT's files."""
    return layer_keys(target.path)


def layer_keys(path: str) -> tuple[str, str]:
    """Return the names of the ``A`` and ``B`` of the layer at a path in PEFT's files."""
    if ends_with(path, "embed_tokens"):
        return f"base_model.model.{path}.lora_embedding_A", f"base_model.model.{path}.lora_embedding_B"
    return f"base_model.model.{path}.lora_A.weight", f"base_model.model.{path}.lora_B.weight"


def to_peft(
    state: Mapping[str, Tensor],
    targets: Collection[Target],
    names: list[str],
    dropout: float = 0.0,
    *,
    patterns: bool = False,
) -> PeftForm:
    """Convert the content of a loralib file to that of PEFT's files.

    Scales that differ between layers are folded into ``B``, which is exact for powers of two.

    Args:
        state: ``lora_A`` and ``lora_B`` of each target, under the layer's path.
        names: The ``target_modules`` of the configuration.
        patterns: Keep each layer's own rank and scale, in ``rank_pattern`` and ``alpha_pattern``.
    """
    rank, scaling = max(_rank(target) for target in targets), _common_scaling(targets)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for target in targets:
        down, up = (to_cpu_float32(state[f"{target.path}.lora_{half}"]) for half in "AB")
        up = block_diagonal(up, list(target.slices.values()), target.enabled)
        if patterns:
            ranks[target.path], alphas[target.path] = _rank(target), _int_if_whole(target.scaling * _rank(target))
        else:
            down = F.pad(down, (0, 0, 0, rank - len(down)))
            up = F.pad(up * (target.scaling / scaling), (0, rank - up.shape[1]))
        tensors |= dict(zip(peft_keys(target), (down, up), strict=True))
    config = LoraConfig(
        r=rank,
        lora_alpha=_int_if_whole(scaling * rank),  # type: ignore[arg-type]  # PEFT computes with floats as well
        lora_dropout=dropout,
        target_modules=names,
        task_type="CAUSAL_LM",
        rank_pattern={path: r for path, r in ranks.items() if r != rank},
        alpha_pattern={path: alpha for path, alpha in alphas.items() if alpha != scaling * rank},
    )
    return PeftForm(config, tensors)


def from_peft(form: PeftForm, targets: Collection[Target], source: str) -> dict[str, Tensor]:
    """Convert the content of PEFT's files to that of a loralib file.

    A LoRA delta that was made of slices is split again; one of a full fused layer, of at most the slices' rank,
    becomes its ``A`` for each slice with the slice's rows of its ``B``. Both are exact, and anything else is refused.
    """
    keys = {key for target in targets for key in peft_keys(target)}
    check_names(form.tensors, keys, source)
    common = _common_scaling(targets)
    one_scale = not (form.config.rank_pattern or form.config.alpha_pattern)
    state: dict[str, Tensor] = {}
    for target in targets:
        down, up = (form.tensors[key].float() for key in peft_keys(target))
        if one_scale and math.isclose(rank_and_scaling(form.config, target.path)[1], common):
            up = up * (common / target.scaling)  # to_peft has folded the layer's own scale into B
        else:
            check_scaling(form.config, target, source)
        try:
            pair = _split(down, up, target) if len(target.slices) > 1 else _cut(down, up, target.r)
        except ValueError as error:
            raise CheckpointError(f"{source}: {target.path} {error}") from None
        state |= {f"{target.path}.lora_{half}": tensor.contiguous() for half, tensor in zip("AB", pair, strict=True)}
    return state


def check_scaling(config: LoraConfig, target: Target, source: str) -> None:
    """Refuse an adapter that scales the delta of a layer by another factor."""
    _, scaling = rank_and_scaling(config, target.path)
    if not math.isclose(scaling, target.scaling):
        raise CheckpointError(
            f"{source}: the LoRA delta of {target.path} is scaled by {scaling:g} and model.lora scales it by "
            f"{target.scaling:g}; its r is {config.r} and its lora_alpha {config.lora_alpha:g}; configure the same"
        )


def check_names(names: Collection[str], expected: Collection[str], source: str) -> None:
    """Refuse an adapter that lacks a tensor or has an unexpected one."""
    wrong = [f"missing {n}" for n in expected if n not in names] + [
        f"unexpected {n}" for n in names if n not in expected
    ]
    if wrong:
        listed = "; ".join(sorted(wrong)[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise CheckpointError(f"{source}: the adapter has other layers than model.lora asks for: {listed}")


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Refuse an adapter whose tensors have other names or shapes, or hold NaN or infinity."""
    check_names(tensors, expected, source)
    for name, tensor in expected.items():
        if not tensors[name].float().isfinite().all():
            raise CheckpointError(f"{source}: {name} is not finite; the adapter is broken, give another one")
        if tensors[name].shape != tensor.shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(tensors[name].shape)} and not {tuple(tensor.shape)}: its rank "
                "is not model.lora.r, or its base not model.base"
            )


def _split(down: Tensor, up: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """The delta of a fused layer as one for each slice; ValueError where that is not exact."""
    r, rows = target.r, list(target.slices.values())
    if len(up) != sum(rows):
        raise ValueError(f"has {len(up)} rows, and in this model {sum(rows)}")
    if len(down) >= _rank(target):
        down, up = _cut(down, up, _rank(target))
        columns = up.split(r, dim=1)
        blocks = [up_i.split(rows) for up_i in columns]
        on = [index for index, enabled in enumerate(target.enabled) if enabled]
        pair = down, torch.cat([blocks[column][index] for column, index in enumerate(on)])
        if torch.equal(block_diagonal(pair[1], rows, target.enabled), up):
            return pair
        raise ValueError(
            f"has one LoRA delta for all of {', '.join(target.slices)}, which is no LoRA delta of rank {r} for each; "
            f"set model.lora.r to its rank, or backend to peft"
        )
    if not all(target.enabled):
        raise ValueError(f"has a LoRA delta of all of {', '.join(target.slices)}; enable all, or set backend to peft")
    if len(down) > r:
        raise ValueError(f"has rank {len(down)} and model.lora gives its slices {r}")
    down, up = F.pad(down, (0, 0, 0, r - len(down))), F.pad(up, (0, r - up.shape[1]))
    return down.repeat(len(rows), 1), up


def _cut(down: Tensor, up: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Remove padding, or add it; ValueError where more than padding would be lost."""
    if bool((down[r:] != 0).any()) or bool((up[:, r:] != 0).any()):
        raise ValueError(f"has rank {len(down)} and model.lora gives it {r}")
    missing = max(r - len(down), 0)
    return F.pad(down[:r], (0, 0, 0, missing)), F.pad(up[:, :r], (0, missing))


def _rank(target: Target) -> int:
    """Rank of the delta of the full layer."""
    return target.r * sum(target.enabled)


def _common_scaling(targets: Collection[Target]) -> float:
    return Counter(target.scaling for target in targets).most_common(1)[0][0]


def _int_if_whole(number: float) -> float:
    """An int where the number is one, as configuration files hold alphas."""
    return int(number) if float(number).is_integer() else number
