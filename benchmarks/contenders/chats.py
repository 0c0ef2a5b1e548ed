"""Chats whose lengths are like those of real ones, and the rows of a benchmark out of them."""

import json
import math
import random
from itertools import accumulate
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from contenders.task import IGNORE_INDEX, Row
from phi3_lightning import ChatDataModule

MEDIAN, SPREAD = 110, 0.55
"""Tokens of a chat: the median, and the standard deviation of the logarithm."""

FULLEST, EMPTIEST = 0.95, 0.85
"""What of a packed row the rows of a step fill: enough to count, and so little that any packer finds room."""

_COMMON = """
the of and to a in is it you that he was for on are with as his they be at one have this from or had by hot but some
what there we can out other were all your when up use word how said an each she which do their time if will way about
many then them would write like so these her long make thing see him two has look more day could go come did my sound
no most number who over know water than call first people may down side been now find any new work part take get place
made live where after back little only round man year came show every good me give our under name very through just
form much great think say help low line before turn cause same mean differ move right boy old too does tell
"""
WORDS = _COMMON.split()


def write_chats(path: Path, count: int, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> None:
    """Write conversations of one to three exchanges, of common words, log-normal in their number of tokens."""
    rng = random.Random(seed)
    shares = list(accumulate(1 / rank for rank in range(1, len(WORDS) + 1)))  # Zipf's law

    def say(words: float) -> str:
        return " ".join(rng.choices(WORDS, cum_weights=shares, k=max(1, round(words)))).capitalize() + "."

    words_a_token = 400 / len(tokenizer(say(400)).input_ids)
    with path.open("w") as file:
        for _ in range(count):
            exchanges = rng.choice((1, 1, 1, 2, 3))
            frame = 5 * exchanges  # role and end tokens
            words = max(2.0, rng.lognormvariate(math.log(MEDIAN), SPREAD) - frame) * words_a_token / exchanges
            messages = []
            for _ in range(exchanges):
                asked = rng.uniform(0.3, 0.6)
                messages.append({"role": "user", "content": say(asked * words)})
                messages.append({"role": "assistant", "content": say((1 - asked) * words)})
            file.write(json.dumps({"messages": messages}) + "\n")


def encode(chats: str, tokenizer: str, longest: int, cache: Path) -> list[Row]:
    """Return the tokens of all chats that are no longer than ``longest``, exactly the assistants' supervised.

    What a template puts behind the last turn is left out, so that the padding id is in no row and counts of real
    tokens need no mask.

    Args:
        chats: A file in any format that the package reads.
        tokenizer: Folder of the tokenizer.
        longest: Tokens of a row at most.
        cache: Where tokenised chats are kept.
    """
    data = ChatDataModule(
        train=chats, tokenizer=tokenizer, max_length=longest, packing=False, batch_size=1, val_fraction=0.0,
        num_workers=0, on_bad_row="skip", cache_dir=str(cache), seed=0,
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    pad = data.tokenizer.pad_token_id
    rows = []
    for batch in data.train_dataloader():
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        while ids[-1] == pad:
            del ids[-1], labels[-1]
        if pad not in ids and any(label != IGNORE_INDEX for label in labels):
            rows.append(Row(ids, labels))
    return rows


def choose(rows: list[Row], steps: int, per_step: int, row_tokens: int, held_out: int) -> tuple[list[Row], list[Row]]:
    """Choose the rows of a run, and others to judge it by.

    Those of each step fill 0.85 to 0.95 of a packed row: packed or padded, a step is the same amount of work.

    Args:
        rows: What to choose from.
        steps: How many steps.
        per_step: Rows of each.
        row_tokens: Tokens of a packed row.
        held_out: How many others.

    Raises:
        ValueError: If there are too few rows, or none that fit together.
    """
    rng = random.Random(0)
    pool = list(rows)
    rng.shuffle(pool)
    others, pool = pool[:held_out], pool[held_out:]
    chosen: list[Row] = []
    for _ in range(steps):
        if len(pool) < per_step:
            raise ValueError(f"{len(rows)} rows are too few for {steps} steps of {per_step} and {held_out} others")
        for _ in range(10_000):
            picked = rng.sample(range(len(pool)), per_step)
            if EMPTIEST <= sum(len(pool[i].input_ids) for i in picked) / row_tokens <= FULLEST:
                break
        else:
            raise ValueError(f"no {per_step} rows fill {EMPTIEST:.0%} to {FULLEST:.0%} of {row_tokens} tokens")
        chosen += [pool[i] for i in picked]
        pool = [row for i, row in enumerate(pool) if i not in set(picked)]
    return chosen, others


def tokenizer_of(folder: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)
