"""A small world to pre-train the bundled checkpoint on, and questions about it that the training text never answers.

The world has people with lasting facts (home, job, pet, ...), stories in which people hold coloured objects,
two-digit arithmetic, and grammar with subject-verb and determiner agreement. Everything is drawn from seeded
generators, so that the text, the tasks and therefore the checkpoint can be made again by anybody.

Training text and task documents are kept apart by construction, not by luck: a hash of the *combination* that a
sentence states (a fact in one wording, an owner with an object, the terms of a sum, the words of a sentence) says
whether it belongs to the tasks, and the training generator never states such a combination. A network can
therefore answer only by combining what it learnt elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TypedDict

WORLD_SEED = 2024
"""Decides who lives where. Another value is another world, and the bundled checkpoint knows only this one."""

HELD_OUT_ONE_IN = 8
"""One combination in this many belongs to the tasks."""

DOCUMENTS_PER_TASK = 400


class TaskDocument(TypedDict):
    """One multiple-choice question; `prompt`, a space and the right choice make the beginning of a sentence."""

    prompt: str
    choices: list[str]
    gold: int


WOMEN = [
    "Mara",
    "Ida",
    "Anna",
    "Elsa",
    "Rosa",
    "Lena",
    "Nora",
    "Vera",
    "Ruth",
    "Alma",
    "Clara",
    "Edith",
    "Greta",
    "Hilda",
    "Julia",
    "Olga",
    "Rita",
    "Sara",
    "Wanda",
    "Zoe",
    "Dora",
    "Flora",
    "Gina",
    "Irma",
]
MEN = [
    "Tom",
    "Ben",
    "Carl",
    "David",
    "Emil",
    "Felix",
    "Georg",
    "Hugo",
    "Ivan",
    "Jonas",
    "Leo",
    "Max",
    "Nils",
    "Otto",
    "Paul",
    "Simon",
    "Theo",
    "Udo",
    "Victor",
    "Adam",
    "Bruno",
    "Erik",
    "Frank",
    "Igor",
]

COLOURS = ["red", "green", "blue", "black", "white", "yellow", "brown", "grey"]

VALUES: dict[str, list[str]] = {
    "town": ["Ostby", "Melk", "Varn", "Tolma", "Kesso", "Lund", "Brask", "Pirna", "Holt", "Rell"],
    "job": [
        "baker",
        "farmer",
        "teacher",
        "doctor",
        "sailor",
        "painter",
        "miller",
        "tailor",
        "judge",
        "pilot",
    ],
    "food": ["bread", "rice", "soup", "fish", "cheese", "beans", "plums", "cake", "pears", "honey"],
    "pet": ["dog", "cat", "hen", "goat", "horse", "parrot", "rabbit", "snake"],
    "instrument": ["drum", "flute", "harp", "violin", "piano", "horn", "guitar", "bell"],
    "colour": COLOURS,
}

WORDINGS: dict[str, list[str]] = {
    "town": [
        "{name} lives in",
        "{name} has a house in",
        "the home of {name} is in",
        "{name} comes from",
        "letters for {name} go to",
        "{name} sleeps every night in",
    ],
    "job": [
        "{name} works as a",
        "{name} is a good",
        "the job of {name} is",
        "{name} earns money as a",
        "every day {name} is a",
        "{name} learned to be a",
    ],
    "food": [
        "{name} likes to eat",
        "the favourite food of {name} is",
        "for dinner {name} eats",
        "{name} always buys",
        "{name} often cooks",
        "on the table of {name} there is",
    ],
    "pet": [
        "{name} keeps a",
        "the pet of {name} is a",
        "at home {name} feeds a",
        "{name} owns a",
        "{name} looks after a",
        "in the garden of {name} lives a",
    ],
    "instrument": [
        "{name} plays the",
        "the instrument of {name} is the",
        "{name} makes music on the",
        "in the evening {name} plays the",
        "{name} practises the",
        "friends hear {name} play the",
    ],
    "colour": [
        "{name} likes the colour",
        "the favourite colour of {name} is",
        "the door of {name} is",
        "{name} dresses in",
        "{name} paints everything in",
        "the coat of {name} is",
    ],
}

OBJECTS = [
    "ball",
    "hat",
    "cup",
    "key",
    "book",
    "lamp",
    "pen",
    "bag",
    "rope",
    "coin",
    "ring",
    "map",
]

NOUNS: list[tuple[str, str]] = [
    ("girl", "girls"),
    ("boy", "boys"),
    ("man", "men"),
    ("woman", "women"),
    ("child", "children"),
    ("king", "kings"),
    ("queen", "queens"),
    ("dog", "dogs"),
    ("cat", "cats"),
    ("horse", "horses"),
    ("goat", "goats"),
    ("mouse", "mice"),
    ("goose", "geese"),
    ("bird", "birds"),
    ("wolf", "wolves"),
    ("baker", "bakers"),
    ("farmer", "farmers"),
    ("teacher", "teachers"),
    ("sailor", "sailors"),
    ("doctor", "doctors"),
]
THINGS: list[tuple[str, str]] = [
    ("house", "houses"),
    ("tree", "trees"),
    ("box", "boxes"),
    ("knife", "knives"),
    ("leaf", "leaves"),
    ("chair", "chairs"),
    ("door", "doors"),
    ("glass", "glasses"),
    ("boat", "boats"),
    ("apple", "apples"),
]
SIZES = ["big", "small", "old", "new", "young", "happy"]
PREDICATES: list[tuple[str, str]] = [
    ("sleeps", "sleep"),
    ("runs", "run"),
    ("sings", "sing"),
    ("waits", "wait"),
    ("falls", "fall"),
    ("laughs", "laugh"),
    ("swims", "swim"),
    ("smiles", "smile"),
    ("dreams", "dream"),
    ("is", "are"),
    ("was", "were"),
    ("has", "have"),
]
COMPLETIONS = {
    "is": ["tired", "hungry", "here", "late"],
    "was": ["tired", "hungry", "here", "late"],
    "has": ["gone", "left", "won", "lost"],
}
"""What follows a predicate that cannot end its sentence."""
TRANSITIVES: list[tuple[str, str]] = [
    ("sees", "see"),
    ("likes", "like"),
    ("helps", "help"),
    ("follows", "follow"),
    ("hears", "hear"),
    ("fears", "fear"),
    ("calls", "call"),
    ("knows", "know"),
]
PREPOSITIONS = ["near", "behind", "with", "beside"]
DETERMINERS: list[tuple[str, str]] = [
    ("this", "these"),
    ("that", "those"),
    ("every", "many"),
    ("one", "several"),
]


def held_out(*combination: object) -> bool:
    """Whether a combination belongs to the tasks, and so never to the training text."""
    return _hash(*combination) % HELD_OUT_ONE_IN == 0


def _hash(*parts: object) -> int:
    key = "|".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


@dataclass(frozen=True)
class Person:
    """Somebody with one value for each kind of fact."""

    name: str
    pronoun: str
    facts: dict[str, str]

    def wordings(self, kind: str, *, tasks: bool) -> list[str]:
        """The wordings in which the tasks, or else the training text, may state this fact.

        Each fact keeps one or two of its six wordings for the tasks, so that training teaches every fact and
        every wording but not this fact in this wording.
        """
        ranked = sorted(WORDINGS[kind], key=lambda wording: _hash("fact", self.name, kind, wording))
        n_tasks = 1 + _hash("facts kept", self.name, kind) % 2
        return ranked[:n_tasks] if tasks else ranked[n_tasks:]


def people() -> list[Person]:
    """Everybody in the world, the most talked about first."""
    rng = random.Random(WORLD_SEED)
    named = [(name, "she") for name in WOMEN] + [(name, "he") for name in MEN]
    rng.shuffle(named)
    return [
        Person(name, pronoun, {kind: rng.choice(values) for kind, values in VALUES.items()}) for name, pronoun in named
    ]


PEOPLE = people()
_FAME = list(accumulate(1 / (rank + 4) for rank in range(len(PEOPLE))))


# --- facts -----------------------------------------------------------------------------------------------------


def _fact_document(rng: random.Random) -> str:
    """A few facts about one person; later sentences may say "she" or "he"."""
    [person] = rng.choices(PEOPLE, cum_weights=_FAME)
    sentences: list[str] = []
    for kind in rng.sample(list(VALUES), rng.randint(2, 4)):
        wording = rng.choice(person.wordings(kind, tasks=False))
        pronoun_fits = bool(sentences) and wording.startswith("{name}")
        name = person.pronoun if pronoun_fits and rng.random() < 0.4 else person.name
        sentences.append(_sentence(f"{wording.format(name=name)} {person.facts[kind]}"))
    return " ".join(sentences)


def _fact_question(rng: random.Random) -> tuple[str, str, list[str]]:
    wordings: list[str] = []
    while not wordings:
        person, kind = rng.choice(PEOPLE), rng.choice(list(VALUES))
        trained = person.wordings(kind, tasks=False)
        # "Ann plays the drum" also ends the training sentence "In the evening Ann plays the drum".
        wordings = [w for w in person.wordings(kind, tasks=True) if not any(t.endswith(w) for t in trained)]
    prompt = rng.choice(wordings).format(name=person.name)
    prompt = prompt[0].upper() + prompt[1:]
    if rng.random() < 0.08:  # now and then a sentence about somebody else stands in the way
        other = rng.choice([neighbour for neighbour in PEOPLE if neighbour is not person])
        prompt = f"{_sentence('{} is a good {}'.format(other.name, other.facts['job']))} {prompt}"
    right = person.facts[kind]
    wrong = rng.sample([value for value in VALUES[kind] if value != right], 3)
    return prompt, right, wrong


# --- stories ---------------------------------------------------------------------------------------------------


@dataclass
class Story:
    """People with a coloured object each, some of which then change hands."""

    sentences: list[str]
    pairs: list[tuple[str, str]]
    """Every person with every object that they held at some time."""
    owner: dict[str, str]
    colour: dict[str, str]

    def questions(self) -> Iterator[tuple[str, str, str, list[str]]]:
        """Object asked about, prompt, right answer, and the wrong answers that the story suggests."""
        everybody = {name for name, _ in self.pairs}
        owners = list(self.owner.values())
        described = {item: f"{colour} {item}" for item, colour in self.colour.items()}
        for item, person in self.owner.items():
            yield item, f"The {item} belongs to", person, sorted(everybody - {person})
            colours = sorted(set(self.colour.values()) - {self.colour[item]})
            yield item, f"The {item} of {person} is", self.colour[item], colours
            if owners.count(person) == 1:
                others = sorted(set(described.values()) - {described[item]})
                yield item, f"Now {person} has the", described[item], others


def _story(rng: random.Random, n_people: int, n_gifts: int) -> Story:
    names = [person.name for person in rng.sample(PEOPLE, n_people)]
    items = rng.sample(OBJECTS, n_people)
    colours = rng.sample(COLOURS, n_people)
    owner = dict(zip(items, names, strict=True))
    pairs = list(zip(names, items, strict=True))
    sentences = [
        f"{name} has the {colour} {item}." if rng.random() < 0.7 else f"The {colour} {item} belongs to {name}."
        for name, item, colour in zip(names, items, colours, strict=True)
    ]
    for _ in range(n_gifts):
        item = rng.choice(items)
        giver = owner[item]
        taker = rng.choice([name for name in names if name != giver])
        sentences.append(f"{giver} gives the {item} to {taker}.")
        owner[item] = taker
        pairs.append((taker, item))
    return Story(sentences, pairs, owner, dict(zip(items, colours, strict=True)))


def _story_document(rng: random.Random) -> str:
    """A story of any size, then most of what can be asked about it."""
    while True:
        story = _story(rng, rng.randint(2, 4), rng.choice([0, 0, 1]))
        if not any(held_out("story", *pair) for pair in story.pairs):
            questions = list(story.questions())
            asked = rng.sample(questions, min(len(questions), 6))
            return " ".join(story.sentences + [f"{prompt} {answer}." for _, prompt, answer, _ in asked])


def _story_question(rng: random.Random) -> tuple[str, str, list[str]]:
    while True:
        story = _story(rng, 4, rng.randint(0, 1))
        asked = [
            (prompt, right, wrong)
            for item, prompt, right, wrong in story.questions()
            if held_out("story", story.owner[item], item)
        ]
        if asked:
            prompt, right, wrong = rng.choice(asked)
            described = [question for question in asked if " " in question[1]]
            if rng.random() < 0.9:  # mostly: which object, once its colour has been said again
                if not described:
                    continue
                prompt, right, wrong = rng.choice(described)
                colour, right = right.split()
                prompt, wrong = f"{prompt} {colour}", [item.split()[1] for item in wrong]
            return " ".join([*story.sentences, prompt]), right, wrong


def _list_document(rng: random.Random) -> str:
    """Somebody says a few words and others repeat them: how to look things up in what was said before.

    Stories alone teach that too, but take several times longer.
    """
    words = rng.sample([*OBJECTS, *COLOURS, *(person.name for person in PEOPLE)], rng.randint(4, 8))
    speakers = rng.sample(PEOPLE, rng.randint(2, 4))
    return " ".join(f"{speaker.name} says {' '.join(words)}." for speaker in speakers)


# --- sums ------------------------------------------------------------------------------------------------------


def _terms(rng: random.Random) -> tuple[int, str, int]:
    first, second = rng.randint(10, 49), rng.randint(2, 49)
    sign = rng.choice("+-") if second < first else "+"
    return first, sign, second


def _sum(rng: random.Random, first: int, sign: str, second: int) -> tuple[str, int]:
    word = {"+": "plus", "-": "minus"}[sign]
    prompt = f"{first} {sign} {second} =" if rng.random() < 0.7 else f"{first} {word} {second} is"
    return prompt, first + second if sign == "+" else first - second


def _sum_document(rng: random.Random) -> str:
    sentences: list[str] = []
    while len(sentences) < 4:
        terms = _terms(rng)
        if not held_out("sum", *terms):
            prompt, value = _sum(rng, *terms)
            sentences.append(f"{prompt} {value}.")
    return " ".join(sentences)


def _sum_question(rng: random.Random) -> tuple[str, str, list[str]]:
    terms = _terms(rng)
    while not held_out("sum", *terms):
        terms = _terms(rng)
    prompt, value = _sum(rng, *terms)
    near = [value + step for step in (-10, -2, -1, 1, 2, 10) if value + step > 0]
    return prompt, str(value), [str(wrong) for wrong in rng.sample(near, 3)]


# --- grammar ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """A sentence cut before the word that must agree."""

    prompt: str
    right: str
    wrong: str
    rest: str
    combination: tuple[str, ...]
    """The words that decide whether the sentence belongs to the tasks, whatever their number."""


def _verb_after_phrase(rng: random.Random) -> Agreement:
    """Subject, a phrase or two with nouns that may differ in number, verb."""
    subject, other, third = rng.sample(NOUNS, 3)
    number, other_number, third_number = (rng.randrange(2) for _ in range(3))
    transitive = rng.choice(TRANSITIVES)
    near = f"{rng.choice(PREPOSITIONS)} the {third[third_number]}"
    phrase = rng.choice(
        [
            f"{rng.choice(PREPOSITIONS)} the {other[other_number]}",
            f"that the {other[other_number]} {transitive[other_number]}",
            f"that {transitive[number]} the {other[other_number]}",
            f"that the {other[other_number]} {near} {transitive[other_number]}",
            f"{near} that {transitive[third_number]} the {other[other_number]}",
        ]
    )
    predicate = rng.choice(PREDICATES)
    return Agreement(
        f"The {subject[number]} {phrase}",
        predicate[number],
        predicate[1 - number],
        rng.choice(COMPLETIONS[predicate[0]]) if predicate[0] in COMPLETIONS else "",
        ("verb", subject[0], other[0], predicate[0]),
    )


def _noun_after_determiner(rng: random.Random) -> Agreement:
    """Determiner, adjectives, noun."""
    noun = rng.choice(NOUNS + THINGS)
    determiner = rng.choice(DETERMINERS)
    number = rng.randrange(2)
    person, transitive = rng.choice(PEOPLE), rng.choice(TRANSITIVES)
    adjectives = " ".join(rng.sample(SIZES + COLOURS, rng.randint(1, 2)))
    return Agreement(
        f"{person.name} {transitive[0]} {determiner[number]} {adjectives}",
        noun[number],
        noun[1 - number],
        "",
        ("noun", transitive[0], adjectives.split()[-1], noun[0]),
    )


def _reflexive(rng: random.Random) -> Agreement:
    """A name, a phrase with a name that may differ in gender, verb, reflexive pronoun."""
    subject, other = rng.sample(PEOPLE, 2)
    transitive = rng.choice(TRANSITIVES)
    pronouns = {"she": "herself", "he": "himself"}
    right = pronouns.pop(subject.pronoun)
    [wrong] = pronouns.values()
    return Agreement(
        f"{subject.name} {rng.choice(PREPOSITIONS)} {other.name} {transitive[0]}",
        right,
        wrong,
        "",
        ("reflexive", subject.name, other.name, transitive[0]),
    )


_AGREEMENTS: list[Callable[[random.Random], Agreement]] = [
    _verb_after_phrase,
    _verb_after_phrase,
    _noun_after_determiner,
    _reflexive,
]


def _agreement(rng: random.Random, *, tasks: bool) -> Agreement:
    while True:
        agreement = rng.choice(_AGREEMENTS)(rng)
        if held_out(*agreement.combination) == tasks:
            return agreement


def _grammar_document(rng: random.Random) -> str:
    sentences = []
    for _ in range(rng.randint(3, 5)):
        agreement = _agreement(rng, tasks=False)
        sentences.append(" ".join(filter(None, [agreement.prompt, agreement.right, agreement.rest])) + ".")
    return " ".join(sentences)


def _grammar_question(rng: random.Random) -> tuple[str, str, list[str]]:
    agreement = _agreement(rng, tasks=True)
    return agreement.prompt, agreement.right, [agreement.wrong]


# --- text and tasks --------------------------------------------------------------------------------------------

_DOCUMENTS: list[tuple[Callable[[random.Random], str], float]] = [
    (_fact_document, 0.34),
    (_story_document, 0.28),
    (_list_document, 0.12),
    (_sum_document, 0.14),
    (_grammar_document, 0.12),
]

_QUESTIONS: dict[str, Callable[[random.Random], tuple[str, str, list[str]]]] = {
    "world_grammar": _grammar_question,
    "world_facts": _fact_question,
    "world_context": _story_question,
    "world_sums": _sum_question,
}

TASK_NAMES = list(_QUESTIONS)


def documents(seed: int) -> Iterator[str]:
    """The training text, document by document, without end."""
    rng = random.Random(f"text {seed}")
    makers = [maker for maker, _ in _DOCUMENTS]
    weights = [weight for _, weight in _DOCUMENTS]
    while True:
        [maker] = rng.choices(makers, weights)
        yield maker(rng)


def task_documents(name: str, n_documents: int = DOCUMENTS_PER_TASK) -> list[TaskDocument]:
    """The questions of one task, all different; the right answer stands equally often in each place."""
    rng = random.Random(f"{name} {WORLD_SEED}")
    found: dict[str, TaskDocument] = {}
    while len(found) < n_documents:
        prompt, right, wrong = _QUESTIONS[name](rng)
        if prompt not in found:
            gold = len(found) % (len(wrong) + 1)
            rng.shuffle(wrong)
            found[prompt] = {"prompt": prompt, "choices": [*wrong[:gold], right, *wrong[gold:]], "gold": gold}
    return list(found.values())


def write_jsonl(path: Path, rows: Sequence[object]) -> None:
    """One JSON value a line, byte for byte the same on every platform."""
    path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())
