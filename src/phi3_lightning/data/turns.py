"""Which turn may follow which, and which turns are trained.

Each odd order has one answer:

=====================================  ==========================================================================
in the row                             answer
=====================================  ==========================================================================
a tool's result beside a user's turn   one user turn; under ``data.tools: native`` each is a turn of its own
two turns of one role                  a bad row; ``data.repeated_role: merge`` joins them with a blank line
the assistant speaks first             a bad row
the last turn is not the assistant's   a bad row; in a prompt, the turn to answer
an empty answer                        a turn: only its end-of-turn token is trained
an empty question or system message    a turn like any other
no assistant turn is to be trained     dropped and counted
=====================================  ==========================================================================
"""

from dataclasses import replace

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.conversation import BadRowError, Conversation, Message
from phi3_lightning.data.messages import Turn


def training_turns(turns: list[Turn], options: RowOptions) -> Conversation:
    """Put turns in order for training: users and the assistant alternate, and the assistant speaks last.

    Raises:
        BadRowError: If the order cannot be trained.
    """
    turns = order_turns(turns, options)
    if turns[-1].role != "assistant":
        raise BadRowError("last turn is not the assistant's", "nothing answers it; remove it or add the answer")
    last = len(turns) - 1
    flags = {
        "assistant": [turn.role == "assistant" for turn in turns],
        "last": [index == last for index in range(len(turns))],
        "all": [True] * len(turns),
    }[options.train_on]
    return _conversation(turns, [flag and turn.trained is not False for flag, turn in zip(flags, turns, strict=True)])


def prompt_turns(turns: list[Turn], options: RowOptions) -> Conversation:
    """Put turns in order for generation: a user or a tool has spoken last; an answer at the end is left out.

    Raises:
        BadRowError: If there is no turn to answer.
    """
    turns = order_turns(turns, options)
    if turns[-1].role == "assistant":
        turns = turns[:-1]
    if not turns or turns[-1].role not in ("user", "tool"):
        raise BadRowError("no question", "a prompt has a user's message before the assistant's turn")
    return _conversation(turns, [False] * len(turns))


def _conversation(turns: list[Turn], trained: list[bool]) -> Conversation:
    return Conversation([_message(turn) for turn in turns], trained, turns[0].tools)


def _message(turn: Turn) -> Message:
    message: Message = {"role": turn.role, "content": turn.content}
    if turn.calls:
        message["tool_calls"] = turn.calls
    if turn.tool_call_id is not None:
        message["tool_call_id"] = turn.tool_call_id
    if turn.name is not None:
        message["name"] = turn.name
    return message


def order_turns(turns: list[Turn], options: RowOptions) -> list[Turn]:
    """Place system messages, and merge neighbouring turns of one role.

    Raises:
        BadRowError: If there is no turn, a role is repeated, or the assistant speaks first.
    """
    if not turns:
        raise BadRowError("no messages", "the list of messages is empty")
    turns = _merge(_place_system(turns, options), options)
    first = next((turn for turn in turns if turn.role != "system"), None)
    if first and first.role == "assistant":
        raise BadRowError("assistant speaks first", f"{first.where} answers nothing; put a user's turn before it")
    return turns


def _merge(turns: list[Turn], options: RowOptions) -> list[Turn]:
    merged: list[Turn] = []
    for turn in turns:
        before = next((other for other in reversed(merged) if other.role != "system"), None)
        if before is None or turn.role in ("system", "tool") or before.role != turn.role:
            merged.append(turn)
            continue
        tools = before.is_tool_result or turn.is_tool_result
        mergeable = merged[-1] is before and not before.calls  # text would go before the calls
        if not mergeable or not (tools or options.repeated_role == "merge"):
            raise BadRowError(
                f"two {turn.role} turns in a row", f"at {turn.where}; data.repeated_role: merge joins neighbours"
            )
        if (before.trained is False) != (turn.trained is False):
            raise BadRowError("merged turns differ in weight", f"{turn.where} and the one before it")
        content = before.content + ("\n" if tools else "\n\n") + turn.content
        merged[-1] = replace(before, content=content, is_tool_result=turn.is_tool_result, calls=turn.calls)
    return merged


def _place_system(turns: list[Turn], options: RowOptions) -> list[Turn]:
    """Keep, merge or refuse system messages, by ``data.system``."""
    if options.system == "keep" or all(turn.role != "system" for turn in turns):
        return turns
    if options.system == "refuse":
        raise BadRowError("system messages are refused", "set data.system: keep or merge_into_user, or remove it")
    result: list[Turn] = []
    pending = ""
    for turn in turns:
        if turn.role == "system":
            pending += turn.content + "\n\n"
        elif turn.role == "user" and pending:
            result.append(replace(turn, content=pending + turn.content))
            pending = ""
        else:
            result.append(turn)
    if pending:
        raise BadRowError("system message without a user", "no user's turn follows that it could be merged into")
    return result
