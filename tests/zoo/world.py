"""The synthetic world of the built-in models: its words, sentences and tasks, in pure Python.

Every person of the world has five attributes, drawn once from the world's seed. Sentences state these facts, let verbs
agree with nouns, add and subtract, copy lists and name days. All of them are made of a closed set of lower-case words
separated by single spaces, so that a word is a token.

Facts in question form are rare in pre-training (`QUESTION_NAMES` and `QUESTION_ATTRIBUTES` only): instruction tuning on
the questions about `TRAIN_NAMES` then has something to teach, and the questions about `HELD_NAMES` test it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

World = dict[str, dict[str, str]]
"""name -> attribute -> value"""

NAMES = (
    "alice bob carol david emma frank grace henry irene jack karen liam mia noah olga peter quinn rosa sam tina umar "
    "vera will xena yuri zoe anna boris clara derek ella fred gina hugo iris jonas kate leo maya nina oscar paula "
    "ralph sara tom ursula victor wendy"
).split()
CITIES = "paris london rome berlin madrid vienna oslo cairo tokyo lima delhi boston".split()
COLORS = "red blue green yellow purple orange black white pink brown gray gold".split()
FOODS = "pizza rice soup bread cheese salad pasta cake fish apples beans eggs".split()
PETS = "cat dog horse rabbit parrot turtle hamster snake".split()
JOBS = "teacher doctor farmer pilot baker lawyer singer painter nurse driver writer judge".split()
ATTRIBUTES = {"city": CITIES, "color": COLORS, "food": FOODS, "pet": PETS, "job": JOBS}

SINGULAR_NOUNS = "boy girl king queen child man woman student robot bird".split()
PLURAL_NOUNS = "boys girls kings queens children men women students robots birds".split()
SINGULAR_VERBS = "runs sings sleeps jumps eats walks dances swims".split()
PLURAL_VERBS = "run sing sleep jump eat walk dance swim".split()
ADJECTIVES = "old young happy sad tall small quiet loud".split()
ITEMS = (
    "stone river cloud lamp chair table spoon window ladder bottle candle mirror basket hammer pencil ribbon"
).split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()

STATEMENTS = {
    "city": ["{n} lives in {v} .", "the home of {n} is {v} ."],
    "color": ["{n} likes the color {v} .", "the color of {n} is {v} ."],
    "food": ["{n} eats {v} every day .", "the food of {n} is {v} ."],
    "pet": ["{n} has a {v} .", "the pet of {n} is a {v} ."],
    "job": ["{n} works as a {v} .", "the job of {n} is {v} ."],
}
QUESTIONS = {
    "city": "question : where does {n} live ? answer :",
    "color": "question : which color does {n} like ? answer :",
    "food": "question : what does {n} eat ? answer :",
    "pet": "question : which pet has {n} ? answer :",
    "job": "question : what job does {n} do ? answer :",
}

TRAIN_NAMES, HELD_NAMES = NAMES[:36], NAMES[36:]
QUESTION_NAMES, QUESTION_ATTRIBUTES = NAMES[:12], ("city", "color")

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(4)

SENTENCE_WEIGHTS = {"fact": 6, "agreement": 2, "arithmetic": 2, "copying": 2, "echo": 1, "days": 1}


@dataclass(frozen=True)
class ChoiceItem:
    """A multiple-choice question; `label` is the index of the right one of `choices`."""

    context: str
    choices: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class GenerationItem:
    """A prompt and the only right continuation."""

    prompt: str
    reference: str


def make_world(seed: int = 0) -> World:
    """Draw the five attributes of each of the 48 people."""
    rng = random.Random(1000 + seed)
    return {name: {attribute: rng.choice(values) for attribute, values in ATTRIBUTES.items()} for name in NAMES}


def vocabulary() -> dict[str, int]:
    """Return all words of the world with their token ids, special tokens first."""
    words = list(SPECIAL_TOKENS)
    for group in (NAMES, *ATTRIBUTES.values(), SINGULAR_NOUNS, PLURAL_NOUNS, SINGULAR_VERBS, PLURAL_VERBS):
        words += group
    words += ADJECTIVES + ITEMS + DAYS
    templates = [text for pair in STATEMENTS.values() for text in pair] + list(QUESTIONS.values())
    words += [word for text in templates for word in text.split() if "{" not in word]
    words += "the near copy : > list again after before comes + - = . ?".split()
    words += [str(number) for number in range(19)]
    return {word: index for index, word in enumerate(dict.fromkeys(words))}


class SentenceGenerator:
    """An endless stream of sentences about `world`; the same seed gives the same stream."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._names = list(world)
        self._rng = random.Random(seed)
        self._kinds: dict[str, Callable[[], str]] = {
            "fact": self._fact,
            "agreement": self._agreement,
            "arithmetic": self._arithmetic,
            "copying": self._copying,
            "echo": self._echo,
            "days": self._days,
        }

    def sentence(self) -> str:
        """Return the next sentence; its words are separated by single spaces."""
        kind = self._rng.choices(list(SENTENCE_WEIGHTS), list(SENTENCE_WEIGHTS.values()))[0]
        return self._kinds[kind]()

    def _fact(self) -> str:
        rng = self._rng
        name = rng.choice(self._names)
        attribute = rng.choice(list(ATTRIBUTES))
        value = self._world[name][attribute]
        if name in QUESTION_NAMES and attribute in QUESTION_ATTRIBUTES and rng.random() < 0.4:
            return f"{QUESTIONS[attribute].format(n=name)} {value} ."
        return rng.choice(STATEMENTS[attribute]).format(n=name, v=value)

    def _agreement(self) -> str:
        rng = self._rng
        noun = rng.randrange(len(SINGULAR_NOUNS))
        plural = rng.random() < 0.5
        verb = rng.randrange(len(SINGULAR_VERBS))
        subject = (PLURAL_NOUNS if plural else SINGULAR_NOUNS)[noun]
        predicate = (PLURAL_VERBS if plural else SINGULAR_VERBS)[verb]
        adjective = rng.choice(ADJECTIVES) + " " if rng.random() < 0.5 else ""
        distractor = ""
        if rng.random() < 0.5:
            distractor = " near the " + rng.choice(PLURAL_NOUNS if rng.random() < 0.5 else SINGULAR_NOUNS)
        return f"the {adjective}{subject}{distractor} {predicate} ."

    def _arithmetic(self) -> str:
        rng = self._rng
        a, b = rng.randrange(10), rng.randrange(10)
        if rng.random() < 0.5:
            return f"{a} + {b} = {a + b} ."
        a, b = max(a, b), min(a, b)
        return f"{a} - {b} = {a - b} ."

    def _copying(self) -> str:
        words = " ".join(self._rng.choices(ITEMS, k=self._rng.randint(2, 4)))
        return f"copy : {words} > {words} ."

    def _echo(self) -> str:
        rng = self._rng
        words = []
        for word in rng.choices(ITEMS + COLORS, k=rng.randint(2, 4)):
            words.append(word)
            if rng.random() < 0.5:
                words += ["again", word]
        return f"list {' '.join(words)} ."

    def _days(self) -> str:
        today = self._rng.randrange(7)
        tomorrow = (today + 1) % 7
        sentences = (
            f"after {DAYS[today]} comes {DAYS[tomorrow]} .",
            f"before {DAYS[tomorrow]} comes {DAYS[today]} .",
        )
        return self._rng.choice(sentences)


def packed_sentences(world: World, seed: int, count: int, words: int = 63) -> list[str]:
    """Return `count` lines of exactly `words` words each: sentences one after the other, the last one cut."""
    generator = SentenceGenerator(world, seed)
    lines = []
    for _ in range(count):
        line: list[str] = []
        while len(line) < words:
            line += generator.sentence().split()
        lines.append(" ".join(line[:words]))
    return lines


def token_blocks(world: World, seed: int, count: int, length: int = 64) -> list[list[int]]:
    """Return `count` blocks of `length` token ids: bos at position 0 and only there, then packed sentences."""
    ids = vocabulary()
    lines = packed_sentences(world, seed, count, length - 1)
    return [[BOS_ID, *(ids[word] for word in line.split())] for line in lines]


def instructions(world: World, names: Sequence[str], seed: int) -> list[GenerationItem]:
    """Return every question about `names` (5 each) with its answer, shuffled by `seed`."""
    items = [_question(world, name, attribute) for name in names for attribute in ATTRIBUTES]
    random.Random(seed).shuffle(items)
    return items


def _question(world: World, name: str, attribute: str) -> GenerationItem:
    return GenerationItem(QUESTIONS[attribute].format(n=name), f"{world[name][attribute]} .")


def choice_tasks(world: World, seed: int = 7, count: int = 200) -> dict[str, list[ChoiceItem]]:
    """Return the multiple-choice tasks, at most `count` items each (qa has 60).

    fact: statements about everyone; qa: questions about `HELD_NAMES`; agree: a verb after a noun and a distractor of
    the other number (2 choices, else 4); arith: sums; copy: three words to repeat.
    """
    rng = random.Random(seed)
    return {
        "fact": _fact_choices(world, rng, NAMES, lambda attribute: rng.choice(STATEMENTS[attribute]), count),
        "qa": _fact_choices(world, rng, HELD_NAMES, lambda attribute: QUESTIONS[attribute] + " {v} .", count),
        "agree": [_agreement_choice(rng) for _ in range(count)],
        "arith": [_arithmetic_choice(rng) for _ in range(count)],
        "copy": [_copying_choice(rng) for _ in range(count)],
    }


def generation_tasks(world: World, seed: int = 9, count: int = 100) -> dict[str, list[GenerationItem]]:
    """Return the exact-match tasks: copy (`count` items) and qa (60 questions about `HELD_NAMES`)."""
    rng = random.Random(seed)
    lists = [" ".join(rng.sample(ITEMS, 3)) for _ in range(count)]
    questions = [_question(world, name, attribute) for name in HELD_NAMES for attribute in ATTRIBUTES]
    return {"copy": [GenerationItem(f"copy : {words} >", f"{words} .") for words in lists], "qa": questions}


def _with_distractors(rng: random.Random, answer: str, pool: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """Return four shuffled choices, `answer` among them, and its index."""
    choices = [*rng.sample([value for value in dict.fromkeys(pool) if value != answer], 3), answer]
    rng.shuffle(choices)
    return tuple(choices), choices.index(answer)


def _fact_choices(
    world: World, rng: random.Random, names: Sequence[str], template: Callable[[str], str], count: int
) -> list[ChoiceItem]:
    pairs = [(name, attribute) for name in names for attribute in ATTRIBUTES]
    rng.shuffle(pairs)
    items = []
    for name, attribute in pairs[:count]:
        choices, label = _with_distractors(rng, world[name][attribute], ATTRIBUTES[attribute])
        context = template(attribute).split(" {v}")[0].format(n=name)
        items.append(ChoiceItem(context, choices, label))
    return items


def _agreement_choice(rng: random.Random) -> ChoiceItem:
    noun = rng.randrange(len(SINGULAR_NOUNS))
    plural = rng.random() < 0.5
    verb = rng.randrange(len(SINGULAR_VERBS))
    subject = (PLURAL_NOUNS if plural else SINGULAR_NOUNS)[noun]
    distractor = rng.choice(SINGULAR_NOUNS if plural else PLURAL_NOUNS)
    return ChoiceItem(f"the {subject} near the {distractor}", (SINGULAR_VERBS[verb], PLURAL_VERBS[verb]), int(plural))


def _arithmetic_choice(rng: random.Random) -> ChoiceItem:
    a, b = rng.randrange(10), rng.randrange(10)
    near = [str(number) for number in range(max(0, a + b - 3), min(18, a + b + 3) + 1)]
    choices, label = _with_distractors(rng, str(a + b), near)
    return ChoiceItem(f"{a} + {b} =", choices, label)


def _copying_choice(rng: random.Random) -> ChoiceItem:
    a, b, c = rng.sample(ITEMS, 3)
    stranger = rng.choice([word for word in ITEMS if word not in (a, b, c)])
    answer = f"{a} {b} {c}"
    choices = [answer, f"{b} {a} {c}", f"{a} {c} {b}", f"{a} {b} {stranger}"]
    rng.shuffle(choices)
    return ChoiceItem(f"copy : {answer} >", tuple(choices), choices.index(answer))
