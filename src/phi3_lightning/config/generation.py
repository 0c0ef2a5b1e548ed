"""``model.generation``: how answers are written."""

from dataclasses import dataclass

from phi3_lightning.config.checks import require, require_types


@dataclass(frozen=True)
class Generation:
    """How answers are written by ``predict``."""

    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    do_sample: bool = False
    """Sample each token instead of taking the most probable one."""
    temperature: float = 1.0
    """Divides the logits before a token is sampled; needs do_sample."""
    top_p: float = 1.0
    """Sample from the most probable tokens that hold this share of the probability; needs do_sample."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require_types("model.generation", self)
        require(self.max_new_tokens >= 1, "model.generation.max_new_tokens", self.max_new_tokens, "it is at least 1")
        require(self.temperature > 0, "model.generation.temperature", self.temperature, "it is above 0")
        require(0 < self.top_p <= 1, "model.generation.top_p", self.top_p, "it is in (0, 1]")
        sampled = (self.temperature, self.top_p) != (1.0, 1.0)
        require(
            self.do_sample or not sampled,
            "model.generation",
            {"temperature": self.temperature, "top_p": self.top_p},
            "set model.generation.do_sample: true, or leave both at 1.0",
        )
