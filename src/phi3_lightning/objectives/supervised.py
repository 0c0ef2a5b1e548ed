"""The likelihood of answers, as chats teach it.

With ``name: supervised`` the loss of a batch is the sum over its supervised tokens of -log p(token | tokens before it),
and its weight their number; :func:`phi3_lightning.model.loss.cross_entropy` computes it, chunk by chunk. Here is the
same loss for a preference objective, in which an answer counts once and not by its length.
"""

from torch import Tensor

from phi3_lightning.objectives.answers import Answers


def mean_token_loss(answers: Answers) -> Tensor:
    """Return -log p(y | x) / |y| of each answer y to its prompt x, shape (answers,)."""
    return -answers.mean_logps
