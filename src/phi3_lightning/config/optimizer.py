"""``model.optimizer``: how the adapter is updated."""

from dataclasses import dataclass
from typing import Literal

from phi3_lightning.config.checks import require, require_types


@dataclass(frozen=True)
class Optimizer:
    """How the adapters are updated."""

    name: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    """AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101), or bitsandbytes' with a state of 8 bits
    (https://arxiv.org/abs/2110.02861) that moves out of a GPU whose memory is short; it needs the extra qlora."""
    lr: float = 2.0e-4
    """Highest learning rate of the schedule. LoRA learns at 1e-4 to 5e-4; 5e-6 needs many thousand steps."""
    loraplus_lr_ratio: float = 1.0
    """The B matrices learn this many times as fast as the A matrices: LoRA+ (Hayou et al. 2024,
    https://arxiv.org/abs/2402.12354), which tries 2 to 24 with half the usual lr. 1 is plain LoRA."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running averages of the gradient and of its square."""
    eps: float = 1.0e-8
    """Added to the denominator of the update."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require_types("model.optimizer", self)
        object.__setattr__(self, "betas", tuple(self.betas))  # YAML has lists
        require(self.lr > 0, "model.optimizer.lr", self.lr, "it is above 0, for LoRA often 2e-4")
        require(
            self.loraplus_lr_ratio >= 1,
            "model.optimizer.loraplus_lr_ratio",
            self.loraplus_lr_ratio,
            "it is 1 (plain LoRA) or more",
        )
        require(self.weight_decay >= 0, "model.optimizer.weight_decay", self.weight_decay, "it is 0 or more")
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "model.optimizer.betas",
            self.betas,
            "two numbers in [0, 1), often [0.9, 0.999]",
        )
        require(self.eps > 0, "model.optimizer.eps", self.eps, "it is above 0, often 1e-8")
