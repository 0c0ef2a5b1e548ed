"""loralib's tensors <-> PEFT's, both ways, exact. Pure functions on dictionaries of tensors.

loralib keeps an update for each slice of a fused layer; PEFT has one for the whole layer. The slices' ``A`` stacked and
their ``B`` on the diagonal of a larger ``B`` are the same update. A whole adapter gets ONE rank and ONE scale, smaller
updates padded with zeros: there are servers that read no rank or alpha patterns.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F  # noqa: N812

from phi3_lightning.adapters.adapter import PeftForm
from phi3_lightning.adapters.targets import Target
from phi3_lightning.errors import CheckpointError


def block_diagonal(up: Tensor, slices: Sequence[int], enabled: Sequence[bool]) -> Tensor:
    """Place the slices' ``B`` so that stacked ``A`` and this are the update of the whole layer.

    Args:
        up: lora_B, shape (rows of the enabled slices, rank).
        slices: Rows of each slice.
        enabled: Whether each slice is adapted.

    Returns:
        Shape (rows of all slices, enabled slices x rank); exactly zero on the rows of disabled slices.
    """
    sizes = list(zip(slices, enabled, strict=True))
    blocks = iter(up.split([rows for rows, on in sizes if on]))
    diagonal: Tensor = torch.block_diag(*(next(blocks) if on else up.new_zeros(rows, 0) for rows, on in sizes))
    return diagonal


def on_cpu(tensor: Tensor) -> Tensor:
    """Return a float32 copy on the CPU; of a tensor that FSDP2 shards, all of it, which every rank asks for at once.

    Args:
        tensor: A weight of an adapter.
    """
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().float().cpu().clone()


def peft_keys(target: Target) -> tuple[str, str]:
    """Return the names of a layer's ``A`` and ``B`` in PEFT's files.

    Args:
        target: The layer.
    """
    if target.embedding:
        return f"base_model.model.{target.path}.lora_embedding_A", f"base_model.model.{target.path}.lora_embedding_B"
    return f"base_model.model.{target.path}.lora_A.weight", f"base_model.model.{target.path}.lora_B.weight"


def to_peft(
    state: Mapping[str, Tensor],
    targets: Collection[Target],
    names: list[str],
    dropout: float = 0.0,
    *,
    patterns: bool = False,
) -> PeftForm:
    """Turn what a loralib file holds into what PEFT's files hold.

    Scales that differ between layers are folded into ``B``, which is exact for powers of two.

    Args:
        state: ``lora_A`` and ``lora_B`` of each target, under the layer's path.
        targets: The adapted layers.
        names: What ``target_modules`` of the configuration says.
        dropout: What ``lora_dropout`` of the configuration says.
        patterns: Keep each layer's own rank and scale, in ``rank_pattern`` and ``alpha_pattern``.

    Returns:
        The files' content; float32 tensors of their own, on the CPU.
    """
    rank, scaling = max(_rank(target) for target in targets), _common_scaling(targets)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for target in targets:
        down, up = (on_cpu(state[f"{target.path}.lora_{half}"]) for half in "AB")
        up = block_diagonal(up, list(target.slices.values()), target.enabled)
        if patterns:
            ranks[target.path], alphas[target.path] = _rank(target), _plain(target.scaling * _rank(target))
        else:
            down = F.pad(down, (0, 0, 0, rank - len(down)))
            up = F.pad(up * (target.scaling / scaling), (0, rank - up.shape[1]))
        tensors |= dict(zip(peft_keys(target), (down.clone(), up.clone()), strict=True))
    config = LoraConfig(
        r=rank,
        lora_alpha=_plain(scaling * rank),  # type: ignore[arg-type]  # PEFT computes with floats as well
        lora_dropout=dropout,
        target_modules=names,
        task_type="CAUSAL_LM",
        rank_pattern={path: r for path, r in ranks.items() if r != rank},
        alpha_pattern={path: alpha for path, alpha in alphas.items() if alpha != scaling * rank},
    )
    return PeftForm(config, tensors)


def from_peft(form: PeftForm, targets: Collection[Target], source: str) -> dict[str, Tensor]:
    """Turn what PEFT's files hold into what a loralib file holds.

    An update that was made of slices is taken apart again; one of a whole fused layer, at most as large as the slices'
    rank, becomes its ``A`` for each slice with the slice's rows of its ``B``. Both are exact, and anything else is
    refused.

    Args:
        form: The files' content.
        targets: The layers of the adapter that is wanted.
        source: Where it comes from, for errors.

    Returns:
        ``lora_A`` and ``lora_B`` of each target, under the layer's path.

    Raises:
        CheckpointError: If layers, ranks or scales differ from those of ``targets``.
    """
    keys = {key for target in targets for key in peft_keys(target)}
    check_names(form.tensors, keys, source)
    state: dict[str, Tensor] = {}
    for target in targets:
        down, up = (form.tensors[key].float() for key in peft_keys(target))
        up = up * _unfold(form.config, target, targets, source)
        try:
            pair = _taken_apart(down, up, target) if len(target.slices) > 1 else _cut(down, up, target.r)
        except ValueError as error:
            raise CheckpointError(f"{source}: {target.path} {error}") from None
        state |= {f"{target.path}.lora_{half}": tensor.contiguous() for half, tensor in zip("AB", pair, strict=True)}
    return state


def scaling_of(config: LoraConfig, path: str) -> float:
    """Return the factor with which PEFT applies the update of a layer.

    Args:
        config: The adapter's configuration.
        path: The layer.
    """
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    r = ranks.get(get_pattern_key(list(ranks), path), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), path), config.lora_alpha)
    return float(alpha / math.sqrt(r) if config.use_rslora else alpha / r)


def check_scaling(config: LoraConfig, target: Target, source: str) -> None:
    """Refuse an adapter whose update of a layer has another factor.

    Args:
        config: The adapter's configuration.
        target: The layer as it is wanted.
        source: Where the adapter comes from.

    Raises:
        CheckpointError: If the factors differ.
    """
    found = scaling_of(config, target.path)
    if not math.isclose(found, target.scaling):
        raise CheckpointError(
            f"{source}: the update of {target.path} is scaled by {found:g} and model.lora scales it by "
            f"{target.scaling:g}; its r is {config.r} and its lora_alpha {config.lora_alpha:g}, write the same"
        )


def check_names(found: Collection[str], expected: Collection[str], source: str) -> None:
    """Refuse an adapter that has not the wanted tensors.

    Args:
        found: Names of its tensors.
        expected: Names of the wanted ones.
        source: Where it comes from.

    Raises:
        CheckpointError: If a name is missing or unexpected.
    """
    wrong = [f"missing {n}" for n in expected if n not in found] + [
        f"unexpected {n}" for n in found if n not in expected
    ]
    if wrong:
        listed = "; ".join(sorted(wrong)[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise CheckpointError(f"{source}: the adapter has other layers than model.lora asks for: {listed}")


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Refuse an adapter whose tensors have not the wanted names and shapes.

    Args:
        found: Its tensors.
        expected: Tensors of the wanted shapes.
        source: Where it comes from.

    Raises:
        CheckpointError: If a tensor is missing, unexpected or of another shape, or holds NaN or infinity.
    """
    check_names(found, expected, source)
    for name, tensor in expected.items():
        if not found[name].float().isfinite().all():
            raise CheckpointError(f"{source}: {name} is not finite; the adapter is spoilt, give another one")
        if found[name].shape != tensor.shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(found[name].shape)} and not {tuple(tensor.shape)}: its rank is not "
                "model.lora.r, or its base not model.base"
            )


def _taken_apart(down: Tensor, up: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """One update of a fused layer as one for each slice; ValueError where that is not exact."""
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
            f"has one update for all of {', '.join(target.slices)}, which is no update of rank {r} for each; "
            f"set model.lora.r to its rank, or backend to peft"
        )
    if not all(target.enabled):
        raise ValueError(f"has an update of all of {', '.join(target.slices)}; enable all, or set backend to peft")
    if len(down) > r:
        raise ValueError(f"has rank {len(down)} and model.lora gives its slices {r}")
    down, up = F.pad(down, (0, 0, 0, r - len(down))), F.pad(up, (0, r - up.shape[1]))
    return down.repeat(len(rows), 1), up


def _cut(down: Tensor, up: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Take padding away, or add it; ValueError where more than padding would go."""
    if bool((down[r:] != 0).any()) or bool((up[:, r:] != 0).any()):
        raise ValueError(f"has rank {len(down)} and model.lora gives it {r}")
    missing = max(r - len(down), 0)
    return F.pad(down[:r], (0, 0, 0, missing)), F.pad(up[:, :r], (0, missing))


def _unfold(config: LoraConfig, target: Target, targets: Collection[Target], source: str) -> float:
    """The factor that makes a file's ``B`` that of ``target``."""
    common = _common_scaling(targets)
    folded = math.isclose(scaling_of(config, target.path), common) and not (config.rank_pattern or config.alpha_pattern)
    if folded:
        return common / target.scaling
    check_scaling(config, target, source)
    return 1.0


def _rank(target: Target) -> int:
    """Rank of the update of the whole layer."""
    return target.r * sum(target.enabled)


def _common_scaling(targets: Collection[Target]) -> float:
    return Counter(target.scaling for target in targets).most_common(1)[0][0]


def _plain(number: float) -> float:
    """An int where it is one: configuration files hold alphas as such."""
    return int(number) if float(number).is_integer() else number
