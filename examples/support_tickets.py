"""Writes the export of an invented support team, for docs/tutorial.md: one message a row, with the faults of real ones.

    python examples/support_tickets.py

`tickets.csv` is for training, `new_tickets.csv` for the test. Shop, customers and tickets are made up.
"""

import argparse
import csv
import random
from datetime import datetime, timedelta
from pathlib import Path

NAMES = ["Ada", "Ben", "Chloe", "Dev", "Elif", "Finn", "Goran", "Hana", "Ivo", "June", "Kofi", "Lena", "Mats", "Nora"]
BIKES = ["Gull", "Heron", "Kestrel", "Plover", "Swift", "Wren"]
PARTS = ["brake pads", "a chain", "an inner tube", "mudguards", "a front light", "a rear rack", "pedals", "a saddle"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]

TOPICS = {
    "parcel": (
        ["Where is my parcel? Order {order}.", "Order {order} has not arrived yet.", "When will order {order} come?"],
        "Thanks for writing, {name}. Order {order} left our workshop on {day}; parcels take three working days.",
        "If it is not there by then, reply to this ticket and we send a new one.",
    ),
    "return": (
        [
            "Can I send back {part}?",
            "I ordered {part} by mistake. Can I return them?",
            "How do I return {part}?",
        ],
        "Thanks for writing, {name}. You can return {part} within 30 days, unused and in the box.",
        "The label is in your account under Returns, and the refund takes five days.",
    ),
    "fit": (
        ["Does {part} fit the {bike}?", "Will {part} work on my {bike}?", "I ride a {bike}. Can I mount {part}?"],
        "Thanks for writing, {name}. Yes, {part} from our shop fit every {bike} since 2019.",
        "For an older one, send us the number under the bottom bracket.",
    ),
    "service": (
        [
            "Can I book a service for my {bike}?",
            "My {bike} needs a service. When?",
            "Service for a {bike}?",
        ],
        "Thanks for writing, {name}. We have a free slot for your {bike} on {day} at nine.",
        "A service takes two hours and costs 60 euros.",
    ),
}
FOLLOW_UPS = ["Thanks. And if it does not work out?", "Good to know. Anything else I should do?", "OK, and then?"]


def ticket(number: int, rng: random.Random) -> list[dict[str, str]]:
    """Make the messages of a ticket, in order."""
    questions, answer, more = TOPICS[rng.choice(sorted(TOPICS))]
    name = rng.choice(NAMES)
    words = {
        "name": name, "order": f"HB-{rng.randrange(1000, 9999)}", "part": rng.choice(PARTS),
        "bike": rng.choice(BIKES), "day": rng.choice(DAYS),
    }  # fmt: skip
    texts = [("customer", f"{rng.choice(questions)} {name}"), ("agent", answer)]
    if rng.random() < 0.5:
        texts += [("customer", rng.choice(FOLLOW_UPS)), ("agent", more)]
    if rng.random() < 0.04:
        texts.append(("customer", "Thank you!"))  # which nobody answers
    elif rng.random() < 0.04:
        texts.insert(2, ("agent", "PS: we are closed on Sunday."))  # a second message in a row
    elif rng.random() < 0.03:
        texts[1] = ("agent", " ")  # an attachment, which the export left out
    start = datetime(2026, 1, 5, 9) + timedelta(hours=3 * number)
    return [
        {
            "Ticket ID": f"T-{number:05d}",
            "Sent at": (start + timedelta(minutes=7 * index)).isoformat(),
            "From": sender,
            "Message text": text.format(**words),
            "Customer": f"C-{NAMES.index(name):03d}",
        }
        for index, (sender, text) in enumerate(texts)
    ]


def write(path: Path, tickets: list[list[dict[str, str]]], rng: random.Random) -> None:
    rows = [row for messages in tickets for row in messages]
    rng.shuffle(rows)  # an export is sorted by whatever the system likes
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"{path}: {len(rows)} messages of {len(tickets)} tickets")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tickets", type=int, default=800, help="in tickets.csv; a tenth as many more are new")
    options = parser.parse_args()
    rng = random.Random(42)
    tickets = [ticket(number, rng) for number in range(options.tickets * 11 // 10)]
    write(Path("tickets.csv"), tickets[: options.tickets], rng)
    write(Path("new_tickets.csv"), tickets[options.tickets :], rng)


if __name__ == "__main__":
    main()
