"""The built-in corpus: one derivation for every text, and the entropy that it claims.

`Reader` reads plays back with the grammar and the odds but without the generator, and fails on any text that has no
derivation. That no text has two follows from the LL(1) property, which is computed here from the grammar alone.
"""

import hashlib
import lzma
import math
import re
import time
from collections import Counter, defaultdict

import numpy as np
import pytest

from nanostudy.data import playhouse as ph

STARTS = ("OPEN", "ENTER", "S", "CLOSE", *(rule for rule in ph.grammar() if rule.startswith("A_")))
END = "end of speech"
TOKEN = re.compile(r"([ \n]?)([A-Za-z'-]+|[.,;:!?])")


def words_of(symbol: str) -> list[str]:
    """Every word, case folded, that a $ symbol can stand for, whatever is on the stage."""
    echoes = {"$same": "$n", "$sames": "$ns", "$again": "$vt", "$done": "$vtd", "$likewise": "$vis", "$topic": "$n"}
    people = ph.people()
    if symbol in ("$he", "$him", "$his"):
        return sorted({person.pronouns[symbol] for person in people.values()})
    if symbol in ("$voc", "$third", "$whose"):
        return [name.lower() + "'s" * (symbol == "$whose") for name in people]
    if symbol == "$sir":
        return sorted({person.sir for person in people.values()})
    if symbol == "$cry":
        return " ".join(ph.CRIES.values()).split()
    if symbol in ("$rhyme", "$chime"):
        return ph.RHYMES.replace(";", " ").split()
    return [word.text.lower() for word in ph.vocabulary(echoes.get(symbol, symbol))]


def lexicon() -> set[str]:
    """Every word that can occur in a verse, in lower case."""
    symbols = {symbol for rule in ph.grammar().values() for rest in rule.options for symbol in rest}
    symbols = {symbol for symbol in symbols - ph.grammar().keys() - ph.MARKS if symbol[0] not in "#/"}
    return {word for symbol in symbols for word in (words_of(symbol) if symbol[0] == "$" else [symbol.lower()])} | {
        "an"
    }


def speakers() -> set[str]:
    return {person.heading for person in ph.people().values()}


def closure(sets: dict[str, set], step) -> dict[str, set]:
    """The least fixed point of a step that only adds to the sets."""
    size = -1
    while size != (size := sum(map(len, sets.values()))):
        step()
    return sets


def prediction_table(rules: dict[str, list[tuple[str, ...]]], starts) -> tuple[dict, list[str]]:
    """(rule, next word) -> index of its alternative; and where two alternatives claim one word (none if LL(1))."""
    first = {rule: set() for rule in rules}  # None stands for the empty text
    follow = {rule: set() for rule in rules}

    def first_of(symbols):
        found = set()
        for symbol in symbols:
            if symbol[0] in "#/" and symbol not in rules:
                continue
            here = first[symbol] if symbol in rules else words_of(symbol) if symbol[0] == "$" else {symbol.lower()}
            found |= set(here) - {None}
            if None not in here:
                return found
        return found | {None}

    def grow_first():
        for rule, alternatives in rules.items():
            first[rule].update(*map(first_of, alternatives))

    def grow_follow():
        for rule, alternatives in rules.items():
            for symbols in alternatives:
                for i, symbol in enumerate(symbols):
                    if symbol in rules:
                        rest = first_of(symbols[i + 1 :])
                        follow[symbol].update(rest - {None}, follow[rule] if None in rest else ())

    closure(first, grow_first)
    for start in starts:  # after a sentence comes another, the couplet, or the end of the speech
        follow[start] = first.get("S", set()) | first.get("CLOSE", set()) | {END}
    closure(follow, grow_follow)
    table, conflicts = {}, []
    for rule, alternatives in rules.items():
        for at, symbols in enumerate(alternatives):
            ahead = first_of(symbols)
            for word in (ahead - {None}) | (follow[rule] if None in ahead else set()):
                if table.setdefault((rule, word), at) != at:
                    conflicts.append(f"{rule}: {word!r} begins alternatives {table[rule, word]} and {at}")
    return table, conflicts


def capitalised(word: str) -> str:
    return re.sub("[a-zA-Z]", lambda letter: letter[0].upper(), word, count=1)


class Reader:
    """Reads whole plays speech by speech; counts what was chosen where; `nats` is -ln p of what was read so far."""

    def __init__(self, table: dict):
        self.table = table
        self.names = {person.heading: name for name, person in ph.people().items()}
        self.counts: dict[tuple, Counter] = defaultdict(Counter)
        self.odds: dict[tuple, ph.Odds] = {}
        self.places: dict[tuple, dict] = {}
        self.nats = 0.0
        self.last = self.before = ""
        self.new_scene()

    def new_scene(self):
        self.cast, self.speeches, self.rhyme, self.in_couplet, self.said = (), 0, "", False, {}
        self.called = self.absent = self.asked = self.topic = self.matter = ""

    def took(self, key: tuple, odds_at, *arguments, option=None, at=None):
        """Account for one choice; returns the option."""
        key = (*key, *arguments)
        if key not in self.odds:
            self.odds[key] = odds = odds_at(*arguments)
            labels = [getattr(each, "text", each) for each in odds.options]
            self.places[key] = {str(label).lower(): i for i, label in enumerate(labels)}
            assert len(self.places[key]) == len(labels), f"two options of {key} read the same"
        odds = self.odds[key]
        at = self.places[key][option.lower()] if at is None else at
        self.counts[key][at] += 1
        self.nats -= math.log((odds.bounds[at] - (odds.bounds[at - 1] if at else 0)) / odds.bounds[-1])
        return odds.options[at]

    def speech(self, block: str):
        heading, body = block.split(":\n", 1)
        stage = (self.cast, self.last, self.before, self.called, self.absent)
        name = self.took(("speaker",), ph.speaker_odds, *stage, option=self.names[heading])
        self.before, self.last, self.called = self.last, name, ""
        symbol = f"A_{self.asked}" if self.asked else "S"
        if name not in self.cast:
            symbol = "ENTER" if self.cast else "OPEN"
            self.cast += (name,)
        self.speeches += 1
        if self.before:
            self.said["$sir"] = ph.people()[self.before].sir
        self.tokens = TOKEN.findall(body)
        assert "".join(gap + word for gap, word in self.tokens) == body
        self.at = self.column = self.tail = 0
        sentences, self.sentence_begins, self.line_turns = 0, True, False
        while symbol != ph.SPEECH_ENDS:
            self.asked = ""
            self.sentence(symbol)
            sentences += 1
            symbol = ph.SPEECH_ENDS
            if not self.in_couplet:
                if self.at < len(self.tokens):
                    symbol = "CLOSE" if ("CLOSE", self.ahead()) in self.table else "S"
                self.took(("next",), ph.next_odds, sentences, self.asked != "", self.speeches, option=symbol)
        assert self.at == len(self.tokens)
        if self.in_couplet:
            self.new_scene()

    def ahead(self) -> str:
        word = self.tokens[self.at][1].lower() if self.at < len(self.tokens) else END
        return "a" if word == "an" else word

    def sentence(self, start: str):
        stack = [start]
        while stack:
            symbol = stack.pop()
            if symbol in ph.grammar():
                at = self.table[symbol, self.ahead()]
                stack += self.took((symbol,), lambda rule=symbol: ph.grammar()[rule], at=at)[::-1]
            elif symbol[0] == "$":
                self.word(self.stand_in(symbol, self.ahead()))
            elif symbol in ph.MARKS:
                assert self.tokens[self.at] == ("", symbol)
                self.at, self.column, self.tail = self.at + 1, self.column + 1, 0
                self.sentence_begins = symbol in ".!?"
            elif symbol[0] == "#":
                self.asked = symbol[1:]
            elif symbol == "/":
                self.in_couplet = self.line_turns = True
            elif symbol == "a":
                self.word("an" if self.tokens[self.at + 1][1][0].lower() in "aeiou" else "a")
            else:
                self.word(symbol)

    def stand_in(self, symbol: str, ahead: str) -> str:
        """What a $ symbol stands for here, given the word ahead where there is a choice."""
        people, first = ph.people(), self.cast[0]
        if symbol in ph.KINDS or symbol == "$topic":
            arguments = ("$n", *ph.HOMES[people[first].circle].split())
            if symbol in ph.KINDS:
                arguments = (symbol, self.topic, self.matter)
            word = self.took(("word",), ph.word_odds, *arguments, option=ahead)
            self.matter, self.topic = word.topic, word.topic if symbol == "$topic" else self.topic
            self.said |= word.echoes
            return word.text
        if symbol == "$voc":
            self.called = self.took(("called",), ph.called_odds, self.cast, self.last, self.before, option=ahead)
            self.cast += () if self.called in self.cast else (self.called,)
            self.said["$sir"] = people[self.called].sir
            return self.called
        if symbol in ("$third", "$whose"):
            possessive = "'s" if symbol == "$whose" else ""
            option = ahead.removesuffix("'s") if possessive else ahead
            self.absent = self.took(("absent",), ph.absent_odds, self.cast, self.absent, option=option)
            self.said |= people[self.absent].pronouns
            return self.absent + possessive
        if symbol == "$cry":
            return self.took(("cry",), ph.cry_odds, people[self.last].circle, option=ahead)
        if symbol in ("$rhyme", "$chime"):
            self.rhyme = self.took(("rhyme",), ph.rhyme_odds, self.rhyme, option=ahead)
            return self.rhyme
        return self.said[symbol]

    def word(self, expected: str):
        gap, word = self.tokens[self.at]
        if self.at == 0:
            assert gap == ""
        elif self.in_couplet:
            assert gap == (" \n"[self.line_turns])
        else:
            self.took(("gap",), ph.gap_odds, self.column, len(word), self.tail, option=gap)
        begins = self.sentence_begins or self.at == 0 or gap == "\n"
        assert word == (capitalised(expected) if begins else expected)
        self.column = len(word) + (self.column + 1 if gap == " " else 0)
        self.tail, self.sentence_begins, self.line_turns = len(word), False, False
        self.at += 1


@pytest.fixture(scope="module")
def plays() -> tuple[str, np.ndarray]:
    return ph.write_plays()


@pytest.fixture(scope="module")
def table() -> dict:
    return prediction_table({rule: odds.options for rule, odds in ph.grammar().items()}, STARTS)[0]


@pytest.fixture(scope="module")
def reading(plays, table) -> tuple[Reader, np.ndarray]:
    """The whole text read back, and -ln p of each speech."""
    reader, before, speeches = Reader(table), 0.0, []
    for block in plays[0].removesuffix("\n\n").split("\n\n"):
        reader.speech(block)
        speeches.append(reader.nats - before)
        before = reader.nats
    return reader, np.array(speeches)


def test_the_grammar_is_ll1():
    rules = {rule: odds.options for rule, odds in ph.grammar().items()}
    table, conflicts = prediction_table(rules, STARTS)
    assert conflicts == []
    assert not {word for rule, word in table if rule == "CLOSE"} & {word for rule, word in table if rule == "S"}
    used = {symbol for alternatives in rules.values() for symbols in alternatives for symbol in symbols}
    assert rules.keys() == (used & rules.keys()) | set(STARTS), "a rule that nothing uses"
    assert {symbol[1:] for symbol in used if symbol[0] == "#"} == {rule[2:] for rule in rules if rule[:2] == "A_"}


@pytest.mark.parametrize(
    "rules",
    [
        {"S": [("the", "$n", "."), ("the", "$ns", ".")]},  # one beginning
        {"S": [("$n", "."), ("KING", ".")], "KING": [("king",)]},  # a word in two classes
        {"S": [("MOD", "of", ".")], "MOD": [(), ("of", "$n")]},  # written or not?
        {"S": [("$n", "MORE")], "MORE": [(".",), (".", "S")]},  # one sentence or two?
    ],
)
def test_the_ll1_check_sees_ambiguity(rules):
    assert prediction_table(rules, ["S"])[1]


def test_words_cannot_be_confused():
    for kind in ph.KINDS:
        words = words_of(kind)
        assert len(words) == len(set(words)), [word for word, n in Counter(words).items() if n > 1]
    assert all(re.fullmatch(r"'?[a-z]+(?:['-][a-z]+)*", word) for word in lexicon())
    assert len(speakers()) == len(ph.people()) == len({name.lower() for name in ph.people()})


def test_text_reads_back_with_its_nats(plays, reading):
    text, nats = plays
    reader, speeches = reading
    ends = np.cumsum([len(block) + 2 for block in text.removesuffix("\n\n").split("\n\n")])
    assert ends[-1] == len(text)
    claimed = np.add.reduceat(nats, np.concatenate([[0], ends[:-1]]))
    np.testing.assert_allclose(claimed, speeches, rtol=1e-9)
    assert nats.sum() == pytest.approx(reader.nats, rel=1e-10)


def test_reader_rejects_what_was_not_written(plays, table):
    start = plays[0].removesuffix("\n\n").split("\n\n")[:20]

    def read(speeches):
        reader = Reader(table)
        for speech in speeches:
            reader.speech(speech)
        return reader.nats

    assert read(start) > 0
    for right, wrong in [(" the ", " the the "), (" the ", " The "), (" the ", " zeppelin "), (", ", " "), (".", "?")]:
        at = next(i for i, speech in enumerate(start) if right in speech)
        with pytest.raises((AssertionError, KeyError)):
            read([*start[:at], start[at].replace(right, wrong, 1), *start[at + 1 :]])
    with pytest.raises((AssertionError, KeyError)):
        read([start[0], *start])  # nobody speaks twice running


def pooled(expected: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rarest options put together until at least 5 of each bin are expected."""
    bins = [[0.0, 0]]
    for at in np.argsort(-expected):  # so that what is left over at the end joins the rarest bin
        if bins[-1][0] >= 5:
            bins.append([0.0, 0])
        bins[-1][0] += expected[at]
        bins[-1][1] += seen[at]
    if bins[-1][0] < 5 and len(bins) > 1:
        rest = bins.pop()
        bins[-1] = [bins[-1][0] + rest[0], bins[-1][1] + rest[1]]
    return tuple(np.array(bins).T)


def test_frequencies_agree_with_the_claimed_entropy(plays, reading):
    """For each kind of choice, claimed nats against counts, and against the entropy of the odds.

    If p is right, 2 (claimed - plug-in nats) of the choices at one point is a G statistic: chi-squared with as many
    degrees of freedom as options less one. And claimed nats less the odds' entropies, summed over choices, is a
    martingale whose variance is known. Tolerance: five standard deviations of each; a draw biased by one percent fails
    among the grammar's choices. (Stages seldom recur, so names have no degrees of freedom, but they have a martingale.)
    """
    g, freedom, claimed, entropy, variance = Counter(), Counter(), Counter(), Counter(), Counter()
    for key, counts in reading[0].counts.items():
        kind = "grammar" if key[0] in ph.grammar() else key[0]
        p = np.diff(reading[0].odds[key].bounds, prepend=0) / reading[0].odds[key].bounds[-1]
        seen, nats, n = np.array([counts[at] for at in range(len(p))]), -np.log(p), counts.total()
        claimed[kind] += seen @ nats
        entropy[kind] += n * (p @ nats)
        variance[kind] += n * (p @ nats**2 - (p @ nats) ** 2)
        expected, seen = pooled(n * p, seen)
        g[kind] += 2 * (seen * np.log(np.maximum(seen, 1) / expected)).sum()
        freedom[kind] += len(expected) - 1
    assert set(freedom) == {"grammar", "word", "gap", "next", "speaker", "called", "absent", "cry", "rhyme"}
    assert freedom["word"] > 5000
    assert freedom["grammar"] > 200
    assert freedom["gap"] > 200
    for kind in freedom:
        assert abs(g[kind] - freedom[kind]) <= 5 * math.sqrt(2 * freedom[kind]) + 1e-6, kind
        assert abs(claimed[kind] - entropy[kind]) <= 5 * math.sqrt(variance[kind]) + 1e-6, kind
    assert plays[1].sum() == pytest.approx(entropy.total(), rel=0.004)  # five standard deviations are 0.0033


def test_no_compressor_beats_the_entropy(plays):
    text, nats = plays
    compressed = len(lzma.compress(text.encode("ascii"), preset=9)) * 8 * math.log(2)
    assert nats.sum() < compressed < 3 * nats.sum()


def test_nats(plays):
    text, nats = plays
    assert nats.shape == (len(text),)
    assert nats.dtype == np.float64
    assert np.isfinite(nats).all()
    assert (nats >= 0).all()
    assert 0.6 < nats.mean() < 1.0
    half = len(text) // 2
    assert nats[:half].mean() == pytest.approx(nats[half:].mean(), rel=0.01)


def test_layout(plays):
    text, _ = plays
    assert 1_115_000 <= len(text) < 1_120_000
    assert text.isascii()
    assert set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ\n ,.!?':;-") == set(text)
    assert text.endswith("\n\n")
    assert "\n\n\n" not in text
    widths = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        heading, *lines = block.split("\n")
        assert heading[-1] == ":"
        assert heading[:-1] in speakers()
        assert lines
        assert all(re.match(r"'?[A-Z]", line) for line in lines)
        assert lines[-1][-1] in ".!?"
        widths += [len(line) for line in lines]
    assert max(widths) <= 64
    assert np.mean([28 <= width <= 55 for width in widths]) > 0.8


def test_lexicon_and_speakers_are_what_is_written(plays):
    text, _ = plays
    headings = re.findall(r"(?:\A|\n\n)([A-Z ]+):\n", text)
    assert set(headings) == speakers()
    assert 25 <= len(speakers()) <= 40
    verses = re.sub(r"(?:\A|\n\n)[A-Z ]+:\n", "\n", text)
    written = {word.lower() for word in re.findall(r"[A-Za-z'-]+", verses)}
    assert written <= lexicon()
    assert len(written) > 0.99 * len(lexicon())


def test_seed_decides_the_text(plays):
    text, nats = plays
    digest = hashlib.sha256(text.encode("ascii")).hexdigest()
    assert digest == "9e7a1f7941f0679b6607cc687067545b5dd24a17472e3bb43303a4fbbf1996e9", (
        "a changed text is another corpus: new results, new name"
    )
    start, start_nats = ph.write_plays(seed=1, characters=20_000)
    assert text.startswith(start)
    assert len(start) >= 20_000
    np.testing.assert_array_equal(start_nats, nats[: len(start)])
    assert ph.write_plays(seed=2, characters=20_000)[0][:200] != start[:200]


def test_at_least_one_character():
    assert ph.write_plays(characters=1)[0].count("\n\n") == 1
    with pytest.raises(ValueError, match="characters"):
        ph.write_plays(characters=0)


def test_writing_is_fast():
    begin = time.process_time()
    ph.write_plays(seed=3)
    assert time.process_time() - begin < 5
