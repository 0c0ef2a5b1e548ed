"""``model.objective``: what a batch teaches."""

from dataclasses import dataclass, fields
from typing import Final, Literal

from phi3_lightning.config.checks import require, require_types

ObjectiveName = Literal["supervised", "dpo", "ipo", "orpo", "simpo", "kto"]

USED: Final[dict[ObjectiveName, tuple[str, ...]]] = {
    "supervised": (),
    "dpo": ("beta", "label_smoothing", "sft_weight"),
    "ipo": ("beta", "sft_weight"),
    "orpo": ("beta",),
    "simpo": ("beta", "simpo_gamma", "sft_weight"),
    "kto": ("beta", "desirable_weight", "undesirable_weight"),
}
"""The options that each objective uses."""

WITH_REFERENCE: Final = ("dpo", "ipo", "kto")
"""The objectives that compare the model with a reference: the model as the run began."""


@dataclass(frozen=True)
class Objective:
    """What a batch teaches: the tokens of chats, or which of two answers is better."""

    name: ObjectiveName = "supervised"
    """supervised: the tokens of chats. From pairs of a chosen and a rejected answer: dpo (Rafailov et al. 2023,
    https://arxiv.org/abs/2305.18290), ipo (Azar et al. 2023, https://arxiv.org/abs/2310.12036), orpo (Hong et al. 2024,
    https://arxiv.org/abs/2403.07691), simpo (Meng et al. 2024, https://arxiv.org/abs/2405.14734). From answers that are
    good or bad: kto (Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306)."""
    beta: float = 0.1
    """How much rewards differ where log-probabilities do: with dpo, ipo and kto, higher stays closer to the reference;
    with orpo, the weight of its odds ratio; with simpo often 2."""
    label_smoothing: float = 0.0
    """For dpo: the probability that a pair is the wrong way round (robust DPO, Chowdhury et al. 2024,
    https://arxiv.org/abs/2403.00409); below 0.5."""
    sft_weight: float = 0.0
    """For dpo, ipo and simpo: the weight of the chosen answer's mean token loss, which keeps its probability from
    falling. orpo has that loss with weight 1."""
    simpo_gamma: float = 0.5
    """For simpo: the margin by which the chosen answer's reward is to exceed the rejected one's."""
    desirable_weight: float = 1.0
    """For kto: the weight of good answers."""
    undesirable_weight: float = 1.0
    """For kto: the weight of bad answers."""

    def __post_init__(self) -> None:
        """Check the ranges, and refuse what the objective does not use."""
        require_types("model.objective", self)
        for field in fields(self):
            value = getattr(self, field.name)
            users = [name for name, used in USED.items() if field.name in used]
            used = field.name == "name" or self.name in users or value == field.default
            remedy = f"{self.name} does not use it, {', '.join(users)} do; leave it out"
            require(used, f"model.objective.{field.name}", value, remedy)
        require(self.beta > 0, "model.objective.beta", self.beta, "it is above 0, often 0.1")
        smoothing = self.label_smoothing
        require(0 <= smoothing < 0.5, "model.objective.label_smoothing", smoothing, "it is in [0, 0.5), often 0.1")
        for name in ("sft_weight", "simpo_gamma", "desirable_weight", "undesirable_weight"):
            require(getattr(self, name) >= 0, f"model.objective.{name}", getattr(self, name), "it is 0 or more")
        weights = max(self.desirable_weight, self.undesirable_weight)
        require(weights > 0, "model.objective.desirable_weight", 0, "with undesirable_weight 0 too, nothing is learnt")

    @property
    def has_reference(self) -> bool:
        """Whether it compares the model with its reference."""
        return self.name in WITH_REFERENCE

    @property
    def extra_forward_passes(self) -> int:
        """Forward passes of a batch without a gradient: by the reference, and with kto two of mismatched answers."""
        return 3 if self.name == "kto" else int(self.has_reference)
