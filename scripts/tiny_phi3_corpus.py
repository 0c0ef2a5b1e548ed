"""Text that the embedded model is pretrained on: plain English from templates.

The base learns to understand what the bookshop's customers ask, but of another town: it knows nothing of the shop.
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tiny_phi3_chats import ABOUT, EVENT, HOURS, WHERE, WHO, Messages


def _words(text: str) -> list[str]:
    return text.split()


PEOPLE = _words(
    "Anna Ben Clara David Ella Felix Grace Henry Iris Jonas Kate Liam Maya Noah Olga Paul Rosa Sam Tina Victor"
)
ANIMALS = _words("cat dog horse bird fish fox bear mouse cow hen goat frog bee wolf owl duck sheep rabbit")
THINGS = _words(
    "book lamp chair table cup clock letter map coat hat key basket bag pen picture record candle globe window door "
    "coin bicycle cart boat sail oven bell phone page cover paper gift song poem novel soup stone rope"
)
PLACES = _words(
    "kitchen garden school market station park library harbour tower cellar attic yard mill church museum office farm "
    "forest river bridge square bakery theatre hall shop hotel"
)
COLOURS = _words("red blue green white black yellow brown grey silver golden")
ADJECTIVES = _words(
    "small big old new warm cold quiet loud heavy light clean dark bright young happy tired kind brave slow quick "
    "round special silent tall short free torn iron brass wooden"
)
ACTIONS = _words(
    "opened found carried painted mended sold bought wrapped borrowed cleaned lost moved showed watched drew kept "
    "lifted brought ordered returned"
)
PLANS = (
    *("read a book", "cook some soup", "play chess", "visit a friend", "ride a bicycle", "write a letter"),
    *("tell a story", "plant a tree", "learn a song", "take a walk", "wait at the door", "sit by the fire"),
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
TIMES = _words("morning afternoon evening night")
NUMBERS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
FLOORS = _words("first second third fourth fifth")
SIDES = _words("near behind under beside above below past")
SLOTS = {
    "thing": THINGS,
    "place": PLACES,
    "day": DAYS,
    "animal": ANIMALS,
    "person": PEOPLE,
    "time": TIMES,
    "adjective": ADJECTIVES,
    "colour": COLOURS,
    "action": ACTIONS,
    "plan": PLANS,
    "number": NUMBERS[2:],
    "floor": FLOORS,
    "side": SIDES,
}
LEGS = {"cat": 4, "dog": 4, "horse": 4, "cow": 4, "bird": 2, "hen": 2, "duck": 2, "owl": 2, "bee": 6, "frog": 4}
HOMES = {"fish": "in the water", "bird": "in a nest", "bear": "in the forest", "bee": "in a hive", "cow": "on a farm"}
USES = {
    "lamp": "gives light",
    "clock": "shows the time",
    "oven": "bakes the bread",
    "key": "opens the door",
    "coat": "keeps you warm",
    "map": "shows the way",
    "bell": "calls the people",
    "boat": "sails on the sea",
    "book": "tells a story",
}
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a friendly assistant who answers questions.",
    "Answer the question.",
    "Be kind and clear.",
    "You are the voice of the station.",
)
SENTENCES = (
    "{person} {action} the {adjective} {thing} in the {place}.",
    "On {day} {time} {person} {action} a {colour} {thing}.",
    "The {adjective} {animal} sat {side} the {thing} and looked at the {place}.",
    "{person} and {person} like to {plan} in the {time}.",
    "There were {number} {adjective} things at the {place}, but no {thing}.",
    "{person} lives on the {floor} floor, {side} the {colour} {thing}.",
    "It was a {adjective} {time}, and every {animal} was {adjective}.",
    "They have read all the letters and choose another {thing} for one {adjective} coin.",
    "Our members pay {number} coins a year and meet at the {place} at {number}.",
    "The {place} is open from {number} until {number}, as long as you like.",
    "Before supper {person} would like to {plan} with the {adjective} readers.",
)
ASKING = (
    "Can you help me with the {subject}?",
    "Tell me about the {subject}.",
    "I have a question about the {subject}.",
    "Could you explain the {subject} to me?",
    "What should I know about the {subject}?",
    "I need advice on the {subject}.",
    "How does it work with the {subject}?",
    "Do you like the {subject}?",
)
ANSWERING = (
    "You can try the {subject} on {day}.",
    "It depends on the day, so please call the {place}.",
    "I think that {person} can help you with the {subject}.",
    "I do not know much about the {subject}, but {person} does.",
    "Yes, the {subject} is best in the {time}.",
    "No, I am afraid not, but the {place} is open.",
    "Most people think that the {subject} is {adjective}.",
    "Please wait a little and then ask {person}.",
    "The {subject} is {adjective} and {adjective}, as far as I know.",
)


class Known(NamedTuple):
    """Something that is true of many subjects: how it is asked for and how it is told."""

    subjects: Sequence[str]
    questions: Sequence[str]
    answer: str


KNOWLEDGE = (
    Known([f"{thing}s" for thing in THINGS], WHERE, "The {} are {side} the {colour} {thing} in the {place}."),
    Known([f"{thing}s" for thing in THINGS], WHO, "{person} and {person} know the {}."),
    Known([f"{thing}s" for thing in THINGS], ABOUT, "The {} are {adjective} and cost {number} coins."),
    Known([f"the {animal}" for animal in ANIMALS], ABOUT, "The {adjective} {animal} and {} like to {plan}."),
    Known(DAYS, HOURS, "On {} the {place} is open from {number} until {number}."),
    Known(DAYS, EVENT, "On {} {person} and {person} {plan} at {number}."),
    Known([f"the {place}" for place in PLACES], ABOUT, "On {day} {person} can show you {}."),
)


def _fill(rng: random.Random, template: str) -> str:
    """Fill each slot of a template with a word of its kind, a new one wherever the slot stands."""
    text = re.sub(r"{(\w+)}", lambda slot: rng.choice(SLOTS[slot[1]]), template)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def _chat(rng: random.Random, *turns: tuple[str, str]) -> Messages:
    """Question and answer pairs as a chat, now and then under a system prompt."""
    messages = [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < 0.3 else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def story(rng: random.Random) -> str:
    """A few plain sentences about people, things and places."""
    return " ".join(_fill(rng, rng.choice(SENTENCES)) for _ in range(rng.randint(3, 6)))


def arithmetic(rng: random.Random) -> Messages:
    """Small sums in words or digits."""
    turns = []
    for _ in range(rng.randint(1, 3)):
        first, second = rng.randint(0, 5), rng.randint(0, 5)
        total = first + second
        if rng.random() < 0.5:
            turns.append((f"What is {first} plus {second}?", f"{first} plus {second} is {total}."))
        else:
            sum_in_words = f"{NUMBERS[first]} plus {NUMBERS[second]}"
            turns.append((f"How much is {sum_in_words}?", f"{sum_in_words.capitalize()} is {NUMBERS[total]}."))
    return _chat(rng, *turns)


def small_fact(rng: random.Random) -> Messages:
    """Questions about animals and things with one right answer."""
    animal, home, thing = rng.choice(list(LEGS)), rng.choice(list(HOMES)), rng.choice(list(USES))
    turns = [
        (f"How many legs does a {animal} have?", f"A {animal} has {NUMBERS[LEGS[animal]]} legs."),
        (f"Where does a {home} live?", f"A {home} lives {HOMES[home]}."),
        (f"What is a {thing} for?", f"A {thing} {USES[thing]}."),
    ]
    return _chat(rng, *rng.sample(turns, rng.randint(1, 3)))


def lookup(rng: random.Random) -> Messages:
    """Statements followed by a question about one of them, which teaches to attend to what was said."""
    things, places, people = rng.sample(THINGS, 2), rng.sample(PLACES, 2), rng.sample(PEOPLE, 2)
    rows = list(zip(things, places, people, strict=True))
    said = " ".join(f"{person} put the {thing} in the {place}." for thing, place, person in rows)
    thing, place, person = rng.choice(rows)
    question, answer = rng.choice(
        (
            (f"Where is the {thing}?", f"The {thing} is in the {place}."),
            (f"Who put the {thing} there?", f"{person} put the {thing} there."),
            (f"What is in the {place}?", f"The {thing} is in the {place}."),
        )
    )
    return _chat(rng, (f"{said} {question}", answer))


def small_talk(rng: random.Random) -> Messages:
    """Everyday questions with the vague but fluent answers that make the base a generic assistant."""
    turns = []
    for _ in range(rng.randint(1, 3)):
        subject = rng.choice(rng.choice((PLACES, ANIMALS)))
        pair = (rng.choice(ASKING), rng.choice(ANSWERING))
        turns.append(tuple(_fill(rng, template.replace("{subject}", subject)) for template in pair))
    return _chat(rng, *turns)


def knowledge(rng: random.Random) -> Messages:
    """Facts of a made-up town, the same in every document: they teach to recall an answer by a question's subject."""
    turns = []
    for _ in range(rng.randint(1, 3)):
        known = rng.choice(KNOWLEDGE)
        subject = rng.choice(known.subjects)
        always = random.Random(f"{subject} {known.answer}")
        answer = _fill(always, known.answer.replace("{}", subject))
        turns.append((rng.choice(known.questions).format(subject), answer))
    return _chat(rng, *turns)


KINDS: tuple[Callable[[random.Random], str | Messages], ...] = (
    *(story, arithmetic, small_fact, lookup),
    *(small_talk, small_talk, knowledge, knowledge, knowledge, knowledge),
)


def pretraining_documents(seed: int, count: int) -> list[str | Messages]:
    """Draw documents, plain texts and chats, that depend on nothing but the seed."""
    rng = random.Random(seed)
    return [rng.choice(KINDS)(rng) for _ in range(count)]
