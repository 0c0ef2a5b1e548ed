"""The time that answers in validation take."""

from dataclasses import dataclass

from phi3_lightning.callbacks import ValidationAnswers
from phi3_lightning.config import Generation
from phi3_lightning.planning.spec import RunSpec
from phi3_lightning.planning.speed import answering_seconds
from phi3_lightning.planning.step import BatchShape


@dataclass(frozen=True)
class PlannedAnswers:
    """What the answers of one validation take at the most."""

    rows: int
    """Validation rows that are answered."""
    new_tokens: int
    """Tokens of each answer."""
    seconds: float
    """The time that they take."""
    every: int
    """Validations from one that answers rows to the next."""

    def times(self, validations: float) -> float:
        """Return how many of some validations answer rows; the first one does."""
        return -(-validations // self.every)


def planned_answers(
    answers: ValidationAnswers, spec: RunSpec, shape: BatchShape, generation: Generation, device: str
) -> PlannedAnswers:
    """Return the time of the answers of a validation, whose rows are taken to be as long as those of a batch."""
    documents = sum(map(len, shape.lengths))
    new_tokens = generation.max_new_tokens
    prompt = max((shape.tokens - min(shape.supervised, new_tokens * documents)) // documents, 1)
    seconds = answering_seconds(spec, answers.val_rows, answers.batch_size, prompt, new_tokens, device=device)
    return PlannedAnswers(answers.val_rows, new_tokens, seconds, answers.every_n_validations)
