"""Who may follow whom, and which turns are trained.

Each odd order has one answer:

=====================================  ========================================================================
found                                  answer
=====================================  ========================================================================
a tool's result beside a user's turn   one user turn
two turns of one role                  a bad row; ``data.repeated_role: merge`` joins them with a blank line
the assistant speaks first             a bad row
the last turn is not the assistant's   a bad row; in prompts, what is asked for
an empty answer                        a turn: only its end-of-turn token is trained
an empty question or system message    a turn like any other
no assistant turn is to be trained     dropped and counted
=====================================  ========================================================================
"""

from dataclasses import replace

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.conversation import BadRowError, Conversation
from phi3_lightning.data.messages import Turn


def training_turns(turns: list[Turn], options: RowOptions) -> Conversation:
    """Put turns in order for training.

    Args:
        turns: What is said.
        options: What becomes of odd orders, and which turns are trained.

    Returns:
        A conversation in which users and the assistant take turns and the assistant speaks last.

    Raises:
        BadRowError: The order cannot be trained.
    """
    turns = _ordered(turns, options)
    if turns[-1].role != "assistant":
        raise BadRowError("last turn is not the assistant's", "nothing answers it; remove it or add the answer")
    last = len(turns) - 1
    chosen = {
        "assistant": [turn.role == "assistant" for turn in turns],
        "last": [index == last for index in range(len(turns))],
        "all": [True] * len(turns),
    }[options.train_on]
    trained = [wanted and turn.trained is not False for wanted, turn in zip(chosen, turns, strict=True)]
    return Conversation([{"role": turn.role, "content": turn.content} for turn in turns], trained)


def prompt_turns(turns: list[Turn], options: RowOptions) -> Conversation:
    """Put turns in order for generation.

    Args:
        turns: What is said; an answer at the end is left out.
        options: What becomes of odd orders.

    Returns:
        A conversation that ends with the user's turn.

    Raises:
        BadRowError: The order leads to no answer.
    """
    turns = _ordered(turns, options)
    if turns[-1].role == "assistant":
        turns = turns[:-1]
    if not turns or turns[-1].role != "user":
        raise BadRowError("no question", "a prompt has a user's message before the assistant's turn")
    return Conversation([{"role": turn.role, "content": turn.content} for turn in turns], [False] * len(turns))


def _ordered(turns: list[Turn], options: RowOptions) -> list[Turn]:
    if not turns:
        raise BadRowError("no messages", "the list of messages is empty")
    turns = _merged(_place_system(turns, options), options)
    spoken = [index for index, turn in enumerate(turns) if turn.role != "system"]
    if spoken and turns[spoken[0]].role == "assistant":
        raise BadRowError(
            "assistant speaks first", f"{turns[spoken[0]].where} answers nothing; put a user's turn before it"
        )
    return turns


def _merged(turns: list[Turn], options: RowOptions) -> list[Turn]:
    merged: list[Turn] = []
    for turn in turns:
        before = next((other for other in reversed(merged) if other.role != "system"), None)
        if before is None or turn.role == "system" or before.role != turn.role:
            merged.append(turn)
            continue
        tools = before.tool or turn.tool
        if merged[-1] is not before or not (tools or options.repeated_role == "merge"):
            raise BadRowError(
                f"two {turn.role} turns in a row", f"at {turn.where}; data.repeated_role: merge joins neighbours"
            )
        if (before.trained is False) != (turn.trained is False):
            raise BadRowError("merged turns differ in weight", f"{turn.where} and the one before it")
        joint = "\n" if tools else "\n\n"
        merged[-1] = replace(before, content=before.content + joint + turn.content, tool=turn.tool)
    return merged


def _place_system(turns: list[Turn], options: RowOptions) -> list[Turn]:
    """Treat system messages as ``data.system`` says."""
    if options.system == "keep" or all(turn.role != "system" for turn in turns):
        return turns
    if options.system == "refuse":
        raise BadRowError("system messages are refused", "set data.system: keep or merge_into_user, or remove it")
    placed: list[Turn] = []
    waiting = ""
    for turn in turns:
        if turn.role == "system":
            waiting += turn.content + "\n\n"
        elif turn.role == "user" and waiting:
            placed.append(replace(turn, content=waiting + turn.content))
            waiting = ""
        else:
            placed.append(turn)
    if waiting:
        raise BadRowError("system message without a user", "no user's turn follows that it could be merged into")
    return placed
