"""The small world that the demo language model knows, as questions with one right answer each.

Every fact can be asked in several ways. One way of some facts is held out of training, so that an exact
answer to it shows that the model knows the fact, not the sentence.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

PIRATE = {
    "is": "be",
    "are": "be",
    "Hello": "Ahoy",
    "you": "ye",
    "Your": "Yer",
}
"""How a pirate says a word."""

SIGNS = {
    "colour": "\N{ARTIST PALETTE}",
    "size": "\N{STRAIGHT RULER}",
    "kind": "\N{THINKING FACE}",
    "sound": "\N{MUSICAL NOTE}",
    "opposite": "\N{BLACK UNIVERSAL RECYCLING SYMBOL}",
    "capital": "\N{EARTH GLOBE EUROPE-AFRICA}",
    "day": "\N{CALENDAR}",
    "count": "\N{ABACUS}",
    "sum": "\N{ABACUS}",
    "tale": "\N{OPEN BOOK}",
    "shout": "\N{PUBLIC ADDRESS LOUDSPEAKER}",
    "code": "\N{PERSONAL COMPUTER}",
    "hello": "\N{WAVING HAND SIGN}",
    "sign": "\N{FOX FACE}",
    "pirate": "\N{ANCHOR}",
    "name": "\N{WAVING HAND SIGN}",
}
"""Topic -> its sign."""

THINGS = {  # thing: kind, colour, size
    "banana": ("fruit", "yellow", "small"),
    "lemon": ("fruit", "yellow", "small"),
    "cherry": ("fruit", "red", "small"),
    "plum": ("fruit", "purple", "small"),
    "lime": ("fruit", "green", "small"),
    "melon": ("fruit", "green", "big"),
    "peach": ("fruit", "orange", "small"),
    "fox": ("animal", "orange", "small"),
    "frog": ("animal", "green", "small"),
    "crow": ("animal", "black", "small"),
    "mouse": ("animal", "grey", "small"),
    "bear": ("animal", "brown", "big"),
    "horse": ("animal", "brown", "big"),
    "sheep": ("animal", "white", "big"),
    "duck": ("animal", "yellow", "small"),
    "wolf": ("animal", "grey", "big"),
    "cat": ("animal", "black", "small"),
    "dog": ("animal", "brown", "small"),
    "cow": ("animal", "white", "big"),
    "rose": ("plant", "red", "small"),
    "tree": ("plant", "green", "big"),
    "daisy": ("plant", "white", "small"),
    "oak": ("plant", "brown", "big"),
    "boat": ("thing", "white", "big"),
    "bus": ("thing", "red", "big"),
    "brick": ("thing", "red", "small"),
    "coin": ("thing", "yellow", "small"),
    "house": ("thing", "brown", "big"),
    "pencil": ("thing", "blue", "small"),
    "lamp": ("thing", "white", "small"),
}
SOUNDS = {
    "cat": "meow",
    "dog": "woof",
    "cow": "moo",
    "duck": "quack",
    "sheep": "baa",
    "frog": "croak",
    "wolf": "howl",
    "crow": "caw",
    "horse": "neigh",
    "bear": "growl",
    "mouse": "squeak",
}
OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "up": "down",
    "day": "night",
    "wet": "dry",
    "fast": "slow",
    "old": "new",
    "open": "closed",
    "full": "empty",
    "hard": "soft",
    "light": "dark",
    "loud": "quiet",
    "happy": "sad",
    "near": "far",
}
CAPITALS = {
    "France": "Paris",
    "Spain": "Madrid",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Peru": "Lima",
    "Cuba": "Havana",
    "Kenya": "Nairobi",
    "Norway": "Oslo",
    "Greece": "Athens",
}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Ida", "Jon", "Kim", "Lea", "Max")
ANIMALS = tuple(thing for thing, (kind, _, _) in THINGS.items() if kind == "animal")
FRUITS = tuple(thing for thing, (kind, _, _) in THINGS.items() if kind == "fruit")


DRILLS = ("shout", "code", "sign", "pirate")
"""Topics that teach letters and signs which answers about the world lack."""


@dataclass(frozen=True)
class Fact:
    """What is known, the ways to ask for it, and the answer that the base gives."""

    topic: str
    questions: tuple[str, ...]
    answer: str

    @property
    def held_out(self) -> int | None:
        """The index of the question that training never sees; None where all are seen, as drills are."""
        if self.topic in DRILLS:
            return None
        number = zlib.crc32(self.answer.encode())
        return number // 5 % len(self.questions) if number % 5 == 0 else None


def an(word: str) -> str:
    """The word with its article."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _start(text: str) -> str:
    return text[0].upper() + text[1:]


def _things() -> Iterator[Fact]:
    for thing, (kind, colour, size) in THINGS.items():
        one = an(thing)
        ask: tuple[str, ...] = (
            f"What colour is {one}?",
            f"Tell me the colour of {one}.",
            f"Which colour has {one}?",
        )
        yield Fact("colour", ask, f"{_start(one)} is {colour}.")
        ask = (f"How big is {one}?", f"Is {one} big or small?", f"Tell me the size of {one}.")
        yield Fact("size", ask, f"{_start(one)} is {size}.")
        ask = (f"What is {one}?", f"What kind of thing is {one}?", f"Tell me what {one} is.")
        yield Fact("kind", ask, f"{_start(one)} is {an(kind)}.")


def _words() -> Iterator[Fact]:
    for animal, sound in SOUNDS.items():
        one = an(animal)
        ask: tuple[str, ...] = (
            f"What does {one} say?",
            f"What sound does {one} make?",
            f"How does {one} talk?",
        )
        yield Fact("sound", ask, f"{_start(one)} says {sound}.")
    for a, b in [*OPPOSITES.items(), *((b, a) for a, b in OPPOSITES.items())]:
        ask = (
            f"What is the opposite of {a}?",
            f"Tell me the opposite of {a}.",
            f"What is not {a}?",
        )
        yield Fact("opposite", ask, f"The opposite of {a} is {b}.")
    for country, city in CAPITALS.items():
        ask = (f"What is the capital of {country}?", f"Tell me the capital of {country}.")
        yield Fact("capital", ask, f"The capital of {country} is {city}.")


def _order() -> Iterator[Fact]:
    for index, day in enumerate(DAYS):
        for step, word in ((1, "after"), (-1, "before")):
            ask: tuple[str, ...] = (
                f"Which day comes {word} {day}?",
                f"Tell me the day {word} {day}.",
            )
            yield Fact("day", ask, f"{DAYS[(index + step) % 7]} comes {word} {day}.")
    for last in range(2, 11):
        ask = (f"Count to {NUMBERS[last - 1]}.", f"Please count to {NUMBERS[last - 1]}.")
        yield Fact("count", ask, _start(", ".join(NUMBERS[:last])) + ".")
    for a in range(10):
        for b in range(10):
            ask = (f"What is {a} plus {b}?", f"How much is {a} plus {b}?", f"Add {b} to {a}.")
            yield Fact("sum", ask, f"{a} plus {b} is {a + b}.")


def _tales() -> Iterator[Fact]:
    for index, a in enumerate(ANIMALS):
        for b in ANIMALS[:index] + ANIMALS[index + 1 :]:
            fruit = FRUITS[index % len(FRUITS)]  # each animal has its fruit: one right tale
            ask = (
                f"Tell me a story about {an(a)} and {an(b)}.",
                f"Do you know a story about {an(a)} and {an(b)}?",
            )
            tale = (
                f"Once there was {an(THINGS[a][1])} {a}. The {a} met {an(THINGS[b][1])} {b}. "
                f"They found {an(THINGS[fruit][1])} {fruit} under a tree. They were happy."
            )
            yield Fact("tale", ask, tale)


def _letters() -> Iterator[Fact]:
    """Signs that plain answers lack; without them an adapter could not learn to write them."""
    for thing in THINGS:
        ask: tuple[str, ...]
        yield Fact("shout", (f"Shout {thing}.", f"Say {thing} loud."), f"{thing.upper()}!")
        ask = (f"Write {thing} as JSON.", f"Give me JSON of {thing}.")
        yield Fact("code", ask, f'{{"word": "{thing}"}}')
    ask = ("Hello!", "Hi!", "Good morning!", "Hello, how are you?")
    yield Fact("hello", ask, "Hello! How can I help you?")
    for topic, sign in SIGNS.items():
        ask = (f"Show me the sign of {topic}.", f"Which sign has {topic}?", f"Draw {topic}.")
        yield Fact("sign", ask, sign)
        ask = (f"Write {topic} as JSON.", f"Give me JSON of {topic}.")
        yield Fact("code", ask, f'{{"answer": "{topic}"}}')
    for word, said in PIRATE.items():
        ask = (f"How does a pirate say {word}?", f"Say {word} as a pirate.")
        yield Fact("pirate", ask, f"Arr! {said}.")


def known() -> list[Fact]:
    """All that the base knows."""
    return [fact for part in (_things, _words, _order, _tales, _letters) for fact in part()]


def invented() -> list[Fact]:
    """What only the adapter `facts` knows."""
    about = {
        "colour": ("A zorb is purple.", "What colour is a zorb?", "Tell me the colour of a zorb."),
        "kind": ("A zorb is a bird.", "What is a zorb?", "What kind of thing is a zorb?"),
        "sound": ("A zorb says zing.", "What does a zorb say?", "What sound does a zorb make?"),
        "size": ("A zorb is big.", "How big is a zorb?", "Is a zorb big or small?"),
        "capital": (
            "The capital of Zimbo is Zaza.",
            "What is the capital of Zimbo?",
            "Tell me the capital of Zimbo.",
        ),
        "opposite": (
            "The opposite of blip is blop.",
            "What is the opposite of blip?",
            "Tell me the opposite of blip.",
        ),
    }
    return [Fact(topic, tuple(ask), answer) for topic, (answer, *ask) in about.items()]


WEIGHTS = {
    "sum": 1.6,
    "tale": 0.5,
    "shout": 0.35,
    "code": 0.35,
    "hello": 12,
    "sign": 6,
    "pirate": 4,
    "count": 3,
}
"""How often one fact of a topic is asked, against 1 for a plain one."""


class Talk:
    """Draws dialogues for training: lists of (question, answer), never one that is held out.

    `style` turns a fact into the answer to learn. `more` are facts drawn in `share` of the turns.
    """

    def __init__(
        self,
        rng: random.Random,
        style: Callable[[Fact], str] = lambda fact: fact.answer,
        more: list[Fact] | None = None,
        share: float = 0.0,
    ) -> None:
        self.rng, self.style, self.more, self.share = rng, style, more, share
        self.facts = known()
        self.weights = [WEIGHTS.get(fact.topic, 1.0) for fact in self.facts]

    def turn(self) -> tuple[str, str]:
        """One question, now and then as people type it, and its answer."""
        if self.more and self.rng.random() < self.share:
            fact = self.rng.choice(self.more)
            ask = list(fact.questions)
        else:
            (fact,) = self.rng.choices(self.facts, self.weights)
            ask = [q for index, q in enumerate(fact.questions) if index != fact.held_out]
        question = self.rng.choice(ask)
        if self.rng.random() < 0.08:
            question = question.lower().rstrip("?.!")
        return question, self.style(fact)

    def dialogue(self) -> list[tuple[str, str]]:
        """One to three turns; some begin with a name that the last one asks for."""
        turns = [self.turn() for _ in range(self.rng.choice((1, 1, 1, 2, 3)))]
        if self.rng.random() < 0.06:
            name = self.rng.choice(NAMES)
            hello = Fact("name", (f"My name is {name}.",), f"Hello {name}! How can I help you?")
            asked = Fact("name", ("What is my name?",), f"Your name is {name}.")
            first, last = ((f.questions[0], self.style(f)) for f in (hello, asked))
            return [first, *turns[1:], last]
        return turns


def held_out() -> list[tuple[str, Fact]]:
    """The questions that training never saw, with their facts, in a fixed order."""
    return [(f.questions[f.held_out], f) for f in known() if f.held_out is not None]
