"""The demo's made-up world: what is so, what the base model is told of it, and what the demo's tasks ask.

Each of 160 people has a value for each of six properties. Of these facts 30 % are *never told*: they stand in no text
that the base is pretrained on, so nothing can be known about them. Pretraining also shows how a question is answered
with a letter, but only about the *practised* people; the demo's tasks ask about the others, half of whose facts
are training rows and half evaluation rows. A model that is fine-tuned well picks the told facts, and should say of the
others that it does not know.

All of this is a function of seeds and needs the standard library only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

__all__ = [
    "JUDGE",
    "JUDGEMENTS",
    "LABELS",
    "LETTERS",
    "PROPERTIES",
    "SELECT",
    "STAGES",
    "TASKS",
    "Document",
    "Fact",
    "Task",
    "World",
    "ask_for_label",
    "ask_whether",
    "ask_which",
    "make_world",
    "random_document",
    "task_rows",
    "tell",
]

PEOPLE, PRACTISED = 160, 60
TOLD = 0.7
"""Share of the facts that some text tells, among practised people and among the others."""

PROPERTIES: Mapping[str, tuple[str, ...]] = {
    "color": ("red", "blue", "green", "black", "white", "brown", "yellow", "purple", "orange", "silver"),
    "home": ("valley", "island", "desert", "forest", "harbor", "village", "castle", "river", "mountain", "market"),
    "craft": ("baker", "weaver", "potter", "smith", "sailor", "farmer", "painter", "hunter", "doctor", "singer"),
    "food": ("bread", "honey", "cheese", "apple", "fish", "rice", "soup", "onion", "cherry", "pepper"),
    "animal": ("horse", "falcon", "rabbit", "tiger", "donkey", "raven", "turtle", "wolf", "goat", "spider"),
    "tool": ("hammer", "needle", "ladder", "lantern", "rope", "mirror", "shovel", "basket", "anchor", "candle"),
}
"""Property -> the values that it can have."""

FIRST = (
    "Bal",
    "Cor",
    "Dam",
    "Fen",
    "Gor",
    "Hul",
    "Jas",
    "Kel",
    "Lum",
    "Mor",
    "Nar",
    "Pol",
    "Quin",
    "Ras",
    "Sel",
    "Tur",
    "Vex",
    "Wil",
    "Yor",
    "Zan",
)
SECOND = (
    "bik",
    "dor",
    "fan",
    "gul",
    "hem",
    "jor",
    "kas",
    "lin",
    "mur",
    "nok",
    "pim",
    "rath",
    "sog",
    "tev",
    "vun",
    "wick",
    "yan",
    "zel",
)


@dataclass(frozen=True)
class Fact:
    """That a property of a person has a value."""

    person: str
    property: str
    value: str
    told: bool
    """Whether some text of the pretraining tells it."""

    @property
    def subject(self) -> str:
        """What has the value, in words."""
        return f"the {self.property} of {self.person}"

    @property
    def sentence(self) -> str:
        """The fact, in words.

        Example:
            >>> Fact("Zanbik", "color", "red", True).sentence
            'The color of Zanbik is red.'
        """
        return f"The {self.property} of {self.person} is {self.value}."


@dataclass(frozen=True)
class World:
    """All facts, by whether pretraining shows questions about the person that are answered with a letter."""

    practised: tuple[Fact, ...]
    asked: tuple[Fact, ...]
    """What the demo's tasks ask about."""

    @cached_property
    def told(self) -> tuple[Fact, ...]:
        """Every fact that pretraining tells."""
        return _told((*self.practised, *self.asked))

    @cached_property
    def practised_and_told(self) -> tuple[Fact, ...]:
        """The facts that pretraining shows such questions about."""
        return _told(self.practised)


def make_world(seed: int) -> World:
    """Make the world of a seed.

    Example:
        >>> world = make_world(0)
        >>> len(world.practised), len(world.asked), len(world.told)
        (360, 600, 672)
    """
    source = random.Random(seed)
    names = source.sample([first + second for first in FIRST for second in SECOND], PEOPLE)

    def facts(people: Sequence[str]) -> tuple[Fact, ...]:
        keys = [(person, property) for person in people for property in PROPERTIES]
        told = set(source.sample(keys, round(TOLD * len(keys))))
        return tuple(Fact(*key, source.choice(PROPERTIES[key[1]]), key in told) for key in keys)

    return World(facts(names[:PRACTISED]), facts(names[PRACTISED:]))


# --- what the base is pretrained on
#
# What ends in "Answer:" goes on with a word, in "Letter:" with a letter, in "Number:" with a number. The demo's prompts
# end in "Answer:" and want a letter, so the base answers them near chance: it knows, and does not know what is wanted.


@dataclass(frozen=True)
class Document:
    """A text of the pretraining, and the word with which it goes on: the one that counts for more."""

    text: str
    answer: str


def random_document(world: World, source: random.Random, stage: int = 1) -> Document:
    """Return a document of a random kind, by the shares of a stage of the pretraining."""
    return source.choices(list(STAGES[stage]), list(STAGES[stage].values()))[0](world, source)


def tell(fact: Fact) -> Document:
    """Tell a fact."""
    return Document(fact.sentence.removesuffix(f" {fact.value}."), fact.value)


def ask_for_word(fact: Fact, count: int, source: random.Random) -> Document:
    """Ask for a fact, with `count` choices or without, to be answered with the word."""
    choices = f" Choices: {_listed(_choices(fact, count, source)[0])}" if count else ""
    return Document(f"{_ask(fact, source)}{choices} Answer:", fact.value)


def ask_for_label(fact: Fact, count: int, source: random.Random, cue: str) -> Document:
    """Ask for a fact with `count` choices, to be answered with a letter or number."""
    choices, right = _choices(fact, count, source)
    return Document(f"{_ask(fact, source)} Choices: {_listed(choices, LABELS[cue])} {cue}:", LABELS[cue][right])


def ask_which(count: int, source: random.Random, cue: str) -> Document:
    """Ask which letter or number holds a word: this teaches to choose, and no fact."""
    choices, right = source.sample(PROPERTIES[source.choice(list(PROPERTIES))], count), source.randrange(count)
    text = f"Which is {choices[right]}? Choices: {_listed(choices, LABELS[cue])} {cue}:"
    return Document(text, LABELS[cue][right])


def ask_what(count: int, source: random.Random) -> Document:
    """Ask which of `count` words a letter holds."""
    choices, right = source.sample(PROPERTIES[source.choice(list(PROPERTIES))], count), source.randrange(count)
    return Document(f"What is {LETTERS[right]}? Choices: {_listed(choices)} Answer:", choices[right])


def ask_whether(fact: Fact, source: random.Random, cue: str) -> Document:
    """Ask whether something is so, to be answered in one of two pairs of words."""
    claim, true = _claim(fact, source)
    return Document(f"Is {fact.subject} {claim}? {cue}:", JUDGEMENTS[cue][true])


LETTERS = "ABCD"
LABELS: Mapping[str, str] = {"Letter": LETTERS, "Number": "1234"}
JUDGEMENTS: Mapping[str, tuple[str, str]] = {"Verdict": ("False", "True"), "Check": ("wrong", "right")}

Kind = Callable[[World, random.Random], Document]

KINDS: Mapping[str, Kind] = {
    "tell": lambda world, source: tell(source.choice(world.told)),
    "ask": lambda world, source: ask_for_word(source.choice(world.told), 0, source),
    "word": lambda world, source: ask_for_word(source.choice(world.told), source.randint(2, 4), source),
    # Looking a fact up and finding it among the choices is practised with numbers for all that is told ...
    "number": lambda world, source: ask_for_label(source.choice(world.told), source.randint(2, 4), source, "Number"),
    "check": lambda world, source: ask_whether(source.choice(world.told), source, "Check"),
    # ... and in the demo's letters and words only for some people.
    "letter": lambda world, source: ask_for_label(_practised(world, source), source.randint(2, 4), source, "Letter"),
    "verdict": lambda world, source: ask_whether(_practised(world, source), source, "Verdict"),
    "which": lambda world, source: ask_which(source.randint(2, 4), source, "Letter"),
    "which_number": lambda world, source: ask_which(source.randint(2, 4), source, "Number"),
    "what": lambda world, source: ask_what(source.randint(2, 4), source),
}
"""What the documents are, by name."""

STAGES: Sequence[Mapping[Kind, float]] = tuple(
    {KINDS[name]: share for name, share in shares.items()}
    for shares in (
        {"which": 0.60, "what": 0.25, "tell": 0.03, "word": 0.06, "letter": 0.03, "verdict": 0.03},
        {"tell": 0.12, "ask": 0.08, "word": 0.08, "number": 0.24, "letter": 0.13, "check": 0.10, "verdict": 0.08}
        | {"which": 0.07, "which_number": 0.07, "what": 0.03},
    )
)
"""Kind of document -> its share among the documents: first while choosing is learned, then while facts are.

Learned beside the facts from the start, choosing takes several times as long to appear."""


def _practised(world: World, source: random.Random) -> Fact:
    return source.choice(world.practised_and_told)


# --- what the demo's tasks ask

SELECT = "Select one of the choices that answers the following question: {question} Choices: {choices} Answer:"
JUDGE = "Answer the question with only True or False: {question} Context: {context}"


@dataclass(frozen=True)
class Task:
    """A task of the demo, in a format of the paper's."""

    like: str
    """The tasks of the paper that have this format."""
    description: Mapping[str, Any]
    """Prompt and answers, as in a task file."""
    row: Callable[[Fact, World, random.Random], dict[str, Any]]
    """Make a row that asks about a fact."""


def _two_choices(fact: Fact, world: World, source: random.Random) -> dict[str, Any]:
    choices, label = _choices(fact, 2, source)
    return {"question": _cloze(fact), "choices": choices, "answer": LETTERS[label]}


def _four_choices(fact: Fact, world: World, source: random.Random) -> dict[str, Any]:
    choices, label = _choices(fact, 4, source)
    return {"question": _question(fact), "choices": choices, "answer": LETTERS[label]}


def _true_or_false(fact: Fact, world: World, source: random.Random) -> dict[str, Any]:
    claim, true = _claim(fact, source)
    others = [other for other in _told(world.asked) if other.person == fact.person and other != fact]
    context = source.choice(others).sentence if others else f"{fact.person} has a {fact.property}."
    return {"question": f"Is {fact.subject} {claim}?", "context": context, "answer": true}


TASKS: Mapping[str, Task] = {
    "two_choices": Task("WinoGrande", {"prompt": SELECT, "choices": "choices"}, _two_choices),
    "four_choices": Task("ARC and OpenBookQA", {"prompt": SELECT, "choices": "choices"}, _four_choices),
    "true_or_false": Task(
        "BoolQ", {"prompt": JUDGE, "answers": {"false": "False", "true": "True"}, "cut": "context"}, _true_or_false
    ),
}
"""Name -> task."""


def task_rows(world: World, task: str, split: str, questions: int = 2) -> list[dict[str, Any]]:
    """Return the rows of a split: some questions about each of its facts, in random order.

    The facts of one split are in no other, and the same for all tasks. As many facts are told in each.

    Args:
        world: what is so.
        task: key in TASKS.
        split: train or dev.
        questions: questions about each fact, no two the same.
    """
    source = random.Random(f"{task} {split}")
    rows = []
    for name, facts in (("told", _told(world.asked)), ("never told", _never_told(world.asked))):
        facts = random.Random("split").sample(facts, len(facts))
        middle = len(facts) // 2
        for fact in facts[:middle] if split == "train" else facts[middle:]:
            asked: list[dict[str, Any]] = []
            while len(asked) < questions:
                row = TASKS[task].row(fact, world, source)
                if row not in asked:
                    asked.append(row)
            key = f"{fact.person}-{fact.property}"
            rows += [{"id": f"{key}-{number}", **row, "fact": name} for number, row in enumerate(asked)]
    source.shuffle(rows)
    return rows


# --- wording


def _told(facts: Sequence[Fact]) -> tuple[Fact, ...]:
    return tuple(fact for fact in facts if fact.told)


def _never_told(facts: Sequence[Fact]) -> tuple[Fact, ...]:
    return tuple(fact for fact in facts if not fact.told)


def _question(fact: Fact) -> str:
    return f"What is {fact.subject}?"


def _cloze(fact: Fact) -> str:
    return fact.sentence.replace(f" {fact.value}.", " _.")


def _ask(fact: Fact, source: random.Random) -> str:
    return source.choice((_question, _cloze))(fact)


def _listed(choices: Sequence[str], labels: str = LETTERS) -> str:
    return " ".join(f"{label}. {choice}" for label, choice in zip(labels, choices))


def _choices(fact: Fact, count: int, source: random.Random) -> tuple[list[str], int]:
    """Return the right value among others of its property, and its index."""
    others = [value for value in PROPERTIES[fact.property] if value != fact.value]
    choices, label = source.sample(others, count - 1), source.randrange(count)
    choices.insert(label, fact.value)
    return choices, label


def _claim(fact: Fact, source: random.Random) -> tuple[str, bool]:
    """Return the right value or, as often, another of its property, and whether it is the right one."""
    true = source.random() < 0.5
    others = [value for value in PROPERTIES[fact.property] if value != fact.value]
    return (fact.value if true else source.choice(others)), true
