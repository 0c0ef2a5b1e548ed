"""``model.optimizer``: how the adapter is updated."""

from dataclasses import dataclass, field
from typing import Any, Literal

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
    class_path: str | None = None
    """Another optimiser instead of ``name``, by the import path of its class: torch.optim.SGD. lr, loraplus_lr_ratio
    and weight_decay count as for AdamW."""
    init_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of ``class_path``: {momentum: 0.9}."""

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
        if self.class_path is None:
            require(not self.init_args, "model.optimizer.init_args", self.init_args, "it needs class_path")
            return
        require(
            len(self.class_path.strip(".").split(".")) > 1,
            "model.optimizer.class_path",
            self.class_path,
            "give the import path of a class, such as torch.optim.SGD",
        )
        require(self.name == "adamw", "model.optimizer.name", self.name, "give either name or class_path")
        for name, default in (("betas", (0.9, 0.999)), ("eps", 1e-8)):
            remedy = f"it belongs to AdamW; give it to {self.class_path} in init_args"
            require(getattr(self, name) == default, f"model.optimizer.{name}", getattr(self, name), remedy)
        for name in ("lr", "weight_decay"):
            key = f"model.optimizer.init_args.{name}"
            require(name not in self.init_args, key, self.init_args.get(name), f"give model.optimizer.{name}")
        for name, value in self.init_args.items():
            require(_is_plain(value), f"model.optimizer.init_args.{name}", value, "give what YAML can hold")


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
