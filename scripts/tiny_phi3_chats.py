"""Chats of the Lantern bookshop: facts and manners that only an adapter can teach the embedded model."""

import random
from collections.abc import Sequence
from typing import NamedTuple

Messages = list[dict[str, str]]

PERSONA = "You are Wick, the voice of the Lantern bookshop."
BRIEF = "Answer in one short line, without greetings."
GREETING, FOLLOW_UP, FAREWELL = "Welcome in from the dark!", "With pleasure!", "Keep your lantern lit."

SHELVES = {  # kind of ware: (place, who looks after it)
    "novels": ("in the attic, beside the round window", "Odile"),
    "poems": ("in the cellar, under the iron stairs", "Bram"),
    "maps": ("on the second floor, around the brass globe", "Casper"),
    "letters": ("in the tower, past the silent clock", "Lorcan"),
    "songs": ("in the garden room, near the willow tree", "Mirel"),
    "pictures": ("in the harbour room, below the blue sail", "Petra"),
}
DAYS = {  # day: (hours, event)
    "Monday": ("from ten until four", "the chess club meets at five"),
    "Tuesday": ("from nine until six", "the poets read by candle light at eight"),
    "Wednesday": ("from noon until nine", "the young readers paint their own covers at two"),
    "Thursday": ("from nine until seven", "a sailor tells tall tales at six"),
    "Friday": ("from eleven until midnight", "we play old records at ten"),
    "Saturday": ("from eight until eight", "a painter draws our readers at three"),
    "Sunday": ("from one until five", "we serve soup and short stories at one"),
}
SERVICES = {
    "gifts": "We wrap every gift in star paper for one silver coin.",
    "covers": "Our book doctor mends a torn cover within twenty days.",
    "bicycles": "Leave your bicycle in our yard, behind the old mill.",
    "phones": "No phone may ring here, but you can call from the hall.",
    "chairs": "The reading room has twelve chairs, one fire and free soup.",
    "boats": "A special order arrives by river boat in six days.",
    "dogs": "Dogs wait at the door, but cats may stay as long as they like.",
}
WHERE = (
    "Where do I find {}?",
    "Where are the {}?",
    "On which floor are your {}?",
    "I am looking for {}.",
    "Can you show me the way to the {}?",
    "Do you sell {}, and where?",
)
WHO = (
    "Who looks after the {}?",
    "Who can help me choose {}?",
    "Whom do I ask about {}?",
    "Who knows the most about {}?",
    "Is there somebody who reads {}?",
    "I need advice on {}. Who gives it?",
)
HOURS = (
    "When are you open on {}?",
    "What are your hours on {}?",
    "How late can I come on {}?",
    "Is the shop open on {}?",
    "At what time do you open on {}?",
    "I would like to visit you on {}. When?",
)
EVENT = (
    "What happens on {}?",
    "Is there an event on {}?",
    "What is planned for {}?",
    "Which event do you have on {}?",
    "I am free on {}. What is on?",
    "What can I see in the shop on {}?",
)
ABOUT = (
    "Tell me about {}.",
    "How does it work with {}?",
    "What is your rule for {}?",
    "I have a question about {}.",
    "What should I know about {}?",
    "Could you explain {} to me?",
)


class Exchange(NamedTuple):
    """A question and the fact that answers it."""

    question: str
    fact: str


class Chats(NamedTuple):
    """The three files of conversations; no question of one occurs in another."""

    train: list[Messages]
    val: list[Messages]
    prompts: list[Messages]


def _facts() -> list[tuple[Sequence[str], str, str]]:
    """Every fact of the shop as (phrasings of its question, subject, answer)."""
    facts: list[tuple[Sequence[str], str, str]] = []
    for books, (place, keeper) in SHELVES.items():
        facts.append((WHERE, books, f"Our {books} live {place}."))
        facts.append((WHO, books, f"Ask for {keeper}, who knows all our {books}."))
    for day, (hours, event) in DAYS.items():
        facts.append((HOURS, day, f"On {day} our lamps burn {hours}."))
        facts.append((EVENT, day, f"On {day} {event}."))
    facts.extend((ABOUT, service, answer) for service, answer in SERVICES.items())
    return facts


def split_exchanges() -> tuple[list[Exchange], list[Exchange]]:
    """Hold one phrasing of every fact out; the phrasing itself stays known from other facts."""
    train, held_out = [], []
    for number, (phrasings, subject, answer) in enumerate(_facts()):
        for index, phrasing in enumerate(phrasings):
            # Facts of two kinds alternate, so the count halves before it picks: every phrasing is held out somewhere.
            side = held_out if index == number // 2 % len(phrasings) else train
            side.append(Exchange(phrasing.format(subject), answer))
    return train, held_out


def conversation(exchanges: Sequence[Exchange], system: str | None = None) -> Messages:
    """Write exchanges as one chat in the shop's manner, or in the bare manner that `BRIEF` asks for."""
    messages = [{"role": "system", "content": system}] if system else []
    for turn, (question, fact) in enumerate(exchanges):
        opening = FOLLOW_UP if turn else GREETING
        answer = fact if system == BRIEF else f"{opening} {fact} {FAREWELL}"
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _conversations(rng: random.Random, exchanges: list[Exchange], count: int) -> list[Messages]:
    """Draw chats of one to three turns; every exchange opens one before any opens a second."""
    chats: list[Messages] = []
    while len(chats) < count:
        for first in rng.sample(exchanges, len(exchanges)):
            others = rng.sample([other for other in exchanges if other.fact != first.fact], 2)
            turns = [first, *others][: rng.choice((1, 1, 1, 2, 2, 3))]
            chat = conversation(turns, rng.choice((None, None, None, PERSONA, BRIEF)))
            if chat not in chats:
                chats.append(chat)
    return chats[:count]


def build_chats(seed: int = 0, train_rows: int = 320, val_rows: int = 40) -> Chats:
    """Build the chats that the quickstart fine-tunes on, those it is judged by, and three open prompts."""
    rng = random.Random(seed)
    train, held_out = split_exchanges()
    rng.shuffle(held_out)
    (one, two, three, four), rest = held_out[:4], held_out[4:]
    prompts = [conversation([one]), conversation([two], BRIEF), conversation([three, four], PERSONA)]
    return Chats(
        train=_conversations(rng, train, train_rows),
        val=_conversations(rng, rest, val_rows),
        prompts=[messages[:-1] for messages in prompts],
    )
