"""Pairs of answers of the Lantern bookshop: a customer in a hurry prefers the bare fact, any other the shop's manner.

Chats alone do not teach this, since none of their customers is in a hurry.
"""

import random
from typing import Any, NamedTuple

from tiny_phi3_chats import BRIEF, PERSONA, Exchange, conversation, split_exchanges

Pair = dict[str, Any]

HURRY = ("I am in a hurry.", "Please be quick.", "I have no time.")


class Pairs(NamedTuple):
    """The two files of pairs; no question of one occurs in the other."""

    train: list[Pair]
    val: list[Pair]


def _pair(rng: random.Random, exchange: Exchange, hurry: str) -> Pair:
    """Write a question with both answers; the bare one is better in a hurry."""
    question = f"{hurry} {exchange.question}".lstrip()
    *prompt, welcoming = conversation([Exchange(question, exchange.fact)], rng.choice((None, PERSONA)))
    bare = conversation([exchange], BRIEF)[-1]
    chosen, rejected = (bare, welcoming) if hurry else (welcoming, bare)
    return {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}


def build_pairs(seed: int = 0, train_rows: int = 120, val_rows: int = 32) -> Pairs:
    """Build the pairs that follow the quickstart's chats, and those that they are judged by; half are of a hurry."""
    rng = random.Random(seed)
    return Pairs(
        *(
            [
                _pair(rng, exchange, rng.choice(HURRY) if number % 2 else "")
                for number, exchange in enumerate(rng.sample(exchanges, rows))
            ]
            for exchanges, rows in zip(split_exchanges(), (train_rows, val_rows), strict=True)
        )
    )
