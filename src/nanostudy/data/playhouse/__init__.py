"""The built-in corpus: seeded plays in tiny Shakespeare's layout, whose exact entropy is known.

Every text has one derivation, so its probability is the product of the probabilities of its choices, and no model's
expected loss is below their mean surprisal. That rests on three facts, which the tests check: spaces and marks separate words,
whatever their case; the grammar is LL(1), so at each choice the next word or mark determines the alternative (Aho, Sethi &
Ullman 1986, section 4.4); and everything that changes the odds (who is on stage, the topic, the length of the line) follows
from the text so far.

There is something to learn at every range: spelling; agreement, sometimes across a relative clause; words on the topic of the
last one; line breaks by length; answers that repeat the question's noun or verb; the person last called speaks next; he or
she; a scene's cast, its topic, the absent person it talks about, and the couplet that ends it.
"""

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from itertools import accumulate
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from nanostudy.data.playhouse.words import (
    CRIES,
    GRAMMAR,
    HOMES,
    KINDS,
    MARKS,
    PEOPLE,
    PRONOUNS,
    RHYMES,
    SPEECH_ENDS,
    TOPICS,
)

T = TypeVar("T")


class Odds(NamedTuple, Generic[T]):
    """A choice point: the options, their cumulative integer weights, and their surprisals in nats."""

    options: tuple[T, ...]
    bounds: tuple[int, ...]
    nats: tuple[float, ...]


class Person(NamedTuple):
    heading: str
    circle: str
    sir: str
    pronouns: dict[str, str]
    weight: int


class Word(NamedTuple):
    text: str
    topic: str
    echoes: dict[str, str]
    weight: int


def odds(weights: Iterable[tuple[T, int]]) -> Odds[T]:
    """Odds from (option, integer weight) pairs, without those of weight 0."""
    options, sizes = zip(*[pair for pair in weights if pair[1] > 0], strict=True)
    bounds = tuple(accumulate(sizes))
    return Odds(options, bounds, tuple(math.log(bounds[-1] / size) for size in sizes))


@cache
def grammar() -> dict[str, Odds[tuple[str, ...]]]:
    """Rule -> odds over its alternatives, each a tuple of symbols."""
    lines = [line.split(" = ") for line in GRAMMAR.replace("\n |", " |").strip().splitlines()]
    split = {head: [alternative.split() for alternative in body.split(" | ")] for head, body in lines}
    return {head: odds((tuple(rest), int(weight)) for weight, *rest in body) for head, body in split.items()}


@cache
def people() -> dict[str, Person]:
    """Name used in speech -> the person; the first of each sex in a circle appear most."""
    by_name = {}
    for circle, names in PEOPLE.items():
        sirs = ("sire", "madam") if circle == "court" else ("sir", "mistress")
        for sir, pronouns, sex in zip(sirs, PRONOUNS, names.split("; "), strict=True):
            for rank, title in enumerate(sex.split(", ")):
                by_name[title.split()[-1]] = Person(title.upper(), circle, sir, pronouns, 840 // (rank + 3))
    return by_name


def inflect(entry: str, column: int) -> tuple[str, ...]:
    """Every form of a word: singular and plural; or base, third person and participle."""
    word, _, irregular = entry.partition("/")
    stem = word[:-1] + "i" if word.endswith("y") and word[-2] not in "aeiou" else word
    plural = stem + ("es" if stem.endswith(("i", "s", "sh", "ch", "x")) else "s")
    if column == 0:
        return word, irregular or plural
    return word, plural, irregular or stem.removesuffix("e") + "ed"


@cache
def vocabulary(kind: str) -> tuple[Word, ...]:
    """All words of a kind, with weights that fall with rank (Zipf; Mandelbrot)."""
    column, form, echoes = KINDS[kind]
    words = []
    for topic, columns in TOPICS.items():
        for rank, entry in enumerate(columns.split(";")[column].split()):
            forms = inflect(entry, column)
            left = {echo: forms[index] for echo, index in echoes.items()}
            words.append(Word(forms[form], topic, left, 5040 // (rank + 8)))
    return tuple(words)


@cache
def word_odds(kind: str, topic: str, last: str) -> Odds[Word]:
    """A content word: more likely on the scene's topic and on that of the last content word."""
    pull = {name: (1 + 3 * (name == topic)) * (1 + 2 * (name == last)) for name in TOPICS}
    return odds((word, word.weight * pull[word.topic]) for word in vocabulary(kind))


@cache
def cry_odds(circle: str) -> Odds[str]:
    return odds((cry, 1 + 11 * (home == circle)) for home, cries in CRIES.items() for cry in cries.split())


@cache
def rhyme_odds(first: str) -> Odds[str]:
    """The last word of the couplet's first line; or, given that, one that rhymes with it."""
    groups = [group.split() for group in RHYMES.split(";")]
    return odds((word, 1) for group in groups for word in group if not first or (first in group and first != word))


@lru_cache(maxsize=4096)
def speaker_odds(cast: tuple[str, ...], last: str, before: str, called: str, absent: str) -> Odds[str]:
    """Who speaks next: whom the last speaker called, who spoke before, others on stage, or one who enters."""
    home = people()[cast[0]].circle if cast else ""
    weights = {name: person.weight * (1 + 7 * (person.circle == home)) for name, person in people().items()}
    if len(cast) == 4:
        weights = dict.fromkeys(cast, 0)
    weights |= {name: 40_000 + 160_000 * (name == called) + 80_000 * (name == before) for name in cast}
    return odds((name, weight * (name not in (last, absent))) for name, weight in weights.items())


@lru_cache(maxsize=4096)
def called_odds(cast: tuple[str, ...], speaker: str, previous: str) -> Odds[str]:
    """Who is called by name: one on stage; a scene's first speaker calls someone in."""
    if len(cast) > 1:
        return odds((name, (1 + 6 * (name == previous)) * (name != speaker)) for name in cast)
    return speaker_odds(cast, speaker, "", "", "")


@lru_cache(maxsize=4096)
def absent_odds(cast: tuple[str, ...], absent: str) -> Odds[str]:
    """Who is spoken of: one not on stage, mostly the one spoken of before."""
    others = [(name, person.weight) for name, person in people().items() if name not in cast]
    return odds((name, weight + 9_000 * (name == absent)) for name, weight in others)


@cache
def gap_odds(column: int, width: int, tail: int) -> Odds[str]:
    """Space or newline before a word of this width, on a line so long, after a word of `tail` letters (0: a mark)."""
    if column < 28 or column + 1 + width > 54:
        return odds([(" " if column < 28 else "\n", 1)])
    hazard = 32 if tail == 0 else (column - 26) // (1 if tail > 3 else 6)  # a line seldom ends on "the" or "my"
    return odds([(" ", 40 - hazard), ("\n", hazard)])


@cache
def next_odds(sentences: int, asked: bool, speeches: int) -> Odds[str]:
    """What follows a sentence: one more, the end of the speech, or the couplet that closes the scene."""
    return odds([("S", 16), (SPEECH_ENDS, 40 if asked else 1 + 2 * sentences), ("CLOSE", min(max(0, speeches - 5), 8))])


class Stage:
    """The generator: the state that follows from the text so far, and each piece of text with its surprisal."""

    def __init__(self, uniform: Callable[[], float]):
        self.uniform, self.rules = uniform, grammar()
        self.pieces: list[str] = []
        self.costs: list[float] = []
        self.length = self.column = self.tail = 0  # of the text, the line and its last word (0 after a mark)
        self.owed = 0.0  # surprisal of choices that wrote no text yet
        self.article: float | None = None  # surprisal of "a" while it waits for the word that decides "a" or "an"
        self.speaker = self.previous = ""
        self.raise_curtain()

    def raise_curtain(self) -> None:
        self.cast: tuple[str, ...] = ()
        self.topic = self.last = self.called = self.absent = self.asked = ""
        self.echoes = {"$rhyme": ""}
        self.speeches, self.couplet = 0, False

    def pick(self, choice: Odds[T]) -> T:
        at = bisect_right(choice.bounds, self.uniform() * choice.bounds[-1])
        self.owed += choice.nats[at]
        return choice.options[at]

    def write(self, piece: str) -> None:
        self.pieces.append(piece)
        self.costs.append(self.owed)
        self.length += len(piece)
        self.owed = 0.0

    def speech(self) -> None:
        """Write one speech; if it closed the scene, clear the stage."""
        name = self.pick(speaker_odds(self.cast, self.speaker, self.previous, self.called, self.absent))
        self.previous, self.speaker, self.called = self.speaker, name, ""
        self.write(people()[name].heading + ":\n")
        self.column, self.tail, self.capital = 0, 0, True
        symbol = f"A_{self.asked}" if self.asked else "S"
        if name not in self.cast:
            symbol = "ENTER" if self.cast else "OPEN"
            self.cast += (name,)
        if self.previous:
            self.echoes["$sir"] = people()[self.previous].sir
        self.speeches += 1
        sentences = 0
        while symbol != SPEECH_ENDS:
            self.asked = ""
            self.derive(symbol)
            sentences += 1
            follows = next_odds(sentences, self.asked != "", self.speeches)
            symbol = SPEECH_ENDS if self.couplet else self.pick(follows)
        self.write(SPEECH_ENDS)
        if self.couplet:
            self.raise_curtain()

    def derive(self, start: str) -> None:
        stack = [start]
        while stack:
            symbol = stack.pop()
            if symbol in self.rules:
                stack += self.pick(self.rules[symbol])[::-1]
            elif symbol[0] == "$":
                self.word(self.choose(symbol))
            elif symbol in MARKS:
                self.write(symbol)
                self.column, self.tail, self.capital = self.column + 1, 0, symbol in ".!?"
            elif symbol[0] == "#":
                self.asked = symbol[1:]
            elif symbol == "/":
                self.write("\n")
                self.column, self.couplet = 0, True
            elif symbol == "a":
                self.article, self.owed = self.owed, 0.0
            else:
                self.word(symbol)

    def choose(self, symbol: str) -> str:
        """The word for a $ symbol; keeps what later choices depend on."""
        if symbol in KINDS or symbol == "$topic":
            if symbol == "$topic":  # home topics are to a circle what the topic is to a scene
                word = self.pick(word_odds("$n", *HOMES[people()[self.cast[0]].circle].split()))
                self.topic = word.topic
            else:
                word = self.pick(word_odds(symbol, self.topic, self.last))
            self.last = word.topic
            self.echoes.update(word.echoes)
            return word.text
        if symbol == "$voc":
            self.called = self.pick(called_odds(self.cast, self.speaker, self.previous))
            if self.called not in self.cast:
                self.cast += (self.called,)
            self.echoes["$sir"] = people()[self.called].sir
            return self.called
        if symbol in ("$third", "$whose"):
            self.absent = self.pick(absent_odds(self.cast, self.absent))
            self.echoes.update(people()[self.absent].pronouns)
            return self.absent + "'s" * (symbol == "$whose")
        if symbol == "$cry":
            return self.pick(cry_odds(people()[self.speaker].circle))
        if symbol in ("$rhyme", "$chime"):
            self.echoes["$rhyme"] = self.pick(rhyme_odds(self.echoes["$rhyme"]))
            return self.echoes["$rhyme"]
        return self.echoes[symbol]

    def word(self, text: str) -> None:
        """Write a word, what separates it from the last, and the article that waited for it."""
        owed = self.owed
        if self.article is not None:
            self.owed, self.article = self.article, None
            self.word("an" if text[0] in "aeiou" else "a")
        if self.column:
            self.owed = 0.0
            self.write(" " if self.couplet else self.pick(gap_odds(self.column, len(text), self.tail)))
            self.column = self.column + 1 if self.pieces[-1] == " " else 0
        if self.capital or not self.column:
            lead = text.startswith("'")  # 'tis -> 'Tis
            text = text[:lead] + text[lead].upper() + text[lead + 1 :]
        self.owed = owed
        self.write(text)
        self.column, self.tail, self.capital = self.column + len(text), len(text), False


def write_plays(seed: int = 1, characters: int = 1_115_000) -> tuple[str, np.ndarray]:
    """Text of whole speeches, the first that reach `characters`; and nats, float64 of shape (len(text),).

    Each choice's surprisal, -ln p(choice), is charged to the first character that the choice wrote (a choice to write
    nothing, to the next character): nats.sum() is -ln p(text), nats[a:b].sum() / (b - a) a split's entropy.
    """
    if characters < 1:
        raise ValueError(f"characters must be at least 1, not {characters}")
    # Weights are integers, and random() gives the same numbers in every version of Python, so texts do not change.
    stage = Stage(random.Random(seed).random)
    while stage.length < characters:
        stage.speech()
    nats = np.zeros(stage.length)
    nats[np.cumsum([0] + [len(piece) for piece in stage.pieces[:-1]])] = stage.costs
    return "".join(stage.pieces), nats
