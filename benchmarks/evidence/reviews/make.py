"""Write train.csv and dev.csv: made-up reviews, for a base that was not made for them. One word of each tells."""

from __future__ import annotations

import csv
import itertools
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
GOOD = ("brilliant", "lovely", "great", "fun", "clever", "warm", "moving", "fresh", "superb", "charming")
BAD = ("awful", "boring", "dull", "terrible", "clumsy", "cold", "tedious", "stale", "dreadful", "lazy")
FRAMES = (
    "a {} {} from start to end",
    "what a {} {}",
    "we saw a {} {} last night",
    "my friends call it a {} {}",
    "not the first {} {} of this year",
    "they made a {} {} of it",
)
THINGS = ("film", "play", "book", "show", "song", "game", "story", "concert", "series", "tale")
TRAIN, DEV = 400, 300


def main() -> None:
    """Write both files; no text is in both."""
    words = [*((word, 5) for word in GOOD), *((word, 1) for word in BAD)]
    rows = [
        (frame.format(word, thing), stars) for frame, (word, stars), thing in itertools.product(FRAMES, words, THINGS)
    ]
    random.Random(0).shuffle(rows)
    for name, part in (("train", rows[:TRAIN]), ("dev", rows[TRAIN : TRAIN + DEV])):
        with (HERE / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("text", "stars"), *part])


if __name__ == "__main__":
    main()
