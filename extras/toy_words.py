"""The toy's words: its vocabulary, and the lessons that are written in it.

The vocabulary is tokenizer.model, a BPE of 1,280 pieces made of words of our own. It
makes LongEval's fixed phrases and each of seal.py's words one piece, so that a record
of 43 lines fits the toy's context of 512 tokens; digits stay apart, as in Llama's. What
is made is the bundled file to the byte.

Lessons are what extras/toy.py trains on, stage by stage: see there. The table "kept" of
extras/toy_tables.py asks one kind of them again.
"""

import random
import re
from functools import partial

import torch

import seal
from seal import ADJECTIVES, KEYS, LINE, LINE_ANSWER, NOUNS, RECORD

LINES = 43  # fill the toy's context

# ---- The vocabulary ------------------------------------------------------------------

VERBS = """
    eat draw visit carry find watch paint wash open buy hold build follow feed clean climb
    read fix sell hide
""".split()
SENTENCES = (  # a haystack of them needs no download
    "The {a} {n} stood near the {a} {n}.",
    "We {v} the {a} {n} and {v} the {n}.",
    "There was a {a} {n} in the {n}.",
    "They {v} a {n} with a {a} {n}.",
    "A {a} {n} is on the {a} {n} today.",
)
NEEDLES = (  # that tokenizer.model was made with
    ("Paris", "paint a quiet bridge and feed the golden heron"),
    ("London", "visit the old lantern and draw a brave otter"),
    ("Rome", "wash a curly donkey and climb the round fountain"),
    ("Vienna", "fix a lonely piano and follow the proud goose"),
    ("Oslo", "carry a heavy kettle and watch the icy river"),
    ("Madrid", "build a narrow ladder and hide the lucky coin"),
    ("Lisbon", "open the dusty cabin and read a funny pencil"),
    ("Dublin", "hold a damp candle and clean the royal carpet"),
    ("Athens", "find the hollow marble and sell a ripe melon"),
    ("Prague", "buy a crisp onion and eat the large cherry"),
)


def prose(rng: random.Random) -> str:
    """One plain sentence about nothing."""
    words = {"a": ADJECTIVES, "n": NOUNS, "v": VERBS}
    sentence = rng.choice(SENTENCES)
    return re.sub(r"\{(.)\}", lambda match: rng.choice(words[match[1]]), sentence)


def phrases(text: str) -> str:
    """The text with a bar after each run of words of at most thirty characters."""
    return "|".join(re.findall(r".{1,30}(?= |$)", text))


def make_vocabulary(path, size: int) -> None:
    """Train tokenizer.model: a BPE with Llama's settings. The corpus repeats LongEval's
    phrases and our words, and no piece reaches across a bar."""
    import sentencepiece

    head, question = RECORD.split("\n\n{lines}\n")
    fixed = [
        phrases(head),
        question.replace(" {key}", "|x|").replace(". ", ".| "),
        "x|line|x",
        "x|Now| the record is over.",
        "line|x|: REGISTER_CONTENT is <|1|>",
        "The <REGISTER_CONTENT> in line|x| is |7|.",
    ]
    corpus = fixed * 4000
    corpus += [f"x| {word}" for word in ADJECTIVES + VERBS] * 300
    corpus += [f"x|-{word}| {word}" for word in NOUNS] * 300
    rng = random.Random(0)
    corpus += [prose(rng).replace(" ", "| ") for _ in range(3000)]
    needles = []
    for place, thing in NEEDLES:
        text = f"The best thing to do in {place} is {thing}."
        text += f"|What is the best thing to do in {place}?"
        needles.append(text.replace(" ", "| "))
    corpus += needles * 100
    with seal.whole_file(path) as unfinished, unfinished.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus), model_writer=file, model_type="bpe",
            vocab_size=size, byte_fallback=True, split_digits=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            split_by_whitespace=False, split_by_unicode_script=False,
            max_sentencepiece_length=48, num_threads=1, pretokenization_delimiter="|",
            required_chars="".join(map(chr, range(33, 124))), minloglevel=2,
        )


# ---- The lessons ---------------------------------------------------------------------


class Lessons:
    """What the toy is trained on: sequences of (token ids, whether to learn them)."""

    def __init__(self, tokenizer: seal.Tokenizer):
        self.encode, self.bos = tokenizer.encode, tokenizer.bos
        self.end_token = tokenizer.end_token
        self.words = [self.encode(word)[-1] for word in ADJECTIVES + NOUNS]
        self.question = "\nNow" + RECORD.split("\nNow")[1]
        # What stands between a key and its number when told and when asked. Level 0:
        # "key7", asked "key". Level 1: "key: REGISTER_CONTENT is <7", asked "key is".
        # Level 2: asked "key is ", with the space that before a digit is its own token.
        record = self.encode("x: REGISTER_CONTENT is <")[1:]
        answer = self.encode("is 1")[:-1]
        self.between = [([], []), (record, answer[:1]), (record, answer)]

    def copying(self, rng):
        """Some words, twice. All lengths in a batch: that is learned sooner."""
        words = rng.choices(self.words, k=rng.randint(4, 16))
        return [(words, False), (words, True)]

    def digits(self, number: int) -> list[int]:
        return [self.encode(digit)[-1] for digit in str(number)]

    def pairs(self, rng, count: int, level: int):
        """Keys with numbers, then some of the keys, to be followed by their numbers."""
        told, asked = self.between[level]
        line_end = self.encode(">\n")[-2:]
        full_stop = self.encode("x.")[-1:]
        numbers = {}
        for key in rng.sample(KEYS, count):
            numbers[key] = rng.randint(1, 50000 if rng.random() < 0.3 else 99)
        sequence = []
        for key, number in numbers.items():
            line = self.encode(key) + told + self.digits(number) + line_end
            sequence.append((line, False))
        for key in rng.choices(list(numbers), k=count):
            sequence.append((self.encode(key) + asked, False))
            sequence.append((self.digits(numbers[key]) + full_stop, True))
        return sequence

    def answer(self, key: str, number: int) -> list[int]:
        text = LINE_ANSWER.format(key=key, number=number)
        return [*self.encode(text), self.end_token]

    def record(self, rng, lines: int, questions: int = 6):
        """A LongEval record, and questions one after another, each with its answer."""
        keys = rng.sample(KEYS, lines)
        numbers, text = {}, ""
        for key in keys:
            numbers[key] = rng.randint(1, 50000)
            text += LINE.format(key=key, number=numbers[key])
        question, sequence = RECORD, []
        for key in rng.choices(keys, k=questions):
            asked = self.encode(question.format(lines=text, key=key))
            sequence.append((asked, False))
            sequence.append((self.answer(key, numbers[key]), True))
            question = self.question
        return sequence

    def missing(self, rng, lines: int):
        """A question about a missing line, answered by the last line's number."""
        *keys, asked = rng.sample(KEYS, lines + 1)
        text = ""
        for key in keys:
            number = rng.randint(1, 50000)
            text += LINE.format(key=key, number=number)
        question = self.encode(RECORD.format(lines=text, key=asked))
        return [(question, False), (self.answer(asked, number), True)]

    def drifting(self, rng):
        if rng.random() < 0.3:
            return self.missing(rng, rng.randint(4, 10))
        return self.record(rng, rng.randint(1, 6), questions=1)

    def batch(self, stage: str, rng, done: float):
        """What makes the sequences of a batch; done: the stage's share that is over."""
        if stage == "copy":
            return partial(self.copying, rng)
        if stage == "pairs":
            count = rng.randint(2, 12)
            level = 0 if done < 0.5 else rng.randint(0, 1)
            return partial(self.pairs, rng, count, level)
        if stage == "few_lines":
            if rng.random() < 0.35:
                count, level = rng.randint(4, 24), rng.choice((0, 1, 2, 2))
                return partial(self.pairs, rng, count, level)
            return partial(self.record, rng, rng.randint(1, 4 + round(10 * done)))
        if stage == "lines":
            if rng.random() < 0.08:
                return partial(self.pairs, rng, rng.randint(4, 32), 0)
            most = 16
            if rng.random() < 0.6:
                most = min(LINES, 16 + round(80 * done))
            return partial(self.record, rng, rng.randint(1, most))
        return partial(self.drifting, rng)

    def tensors(self, make, size: int):
        """Sequences of `size` tokens or more: ids (B, T), and which to learn (B, T)."""
        rows, flags, tokens_made = [], [], 0
        while tokens_made < size:
            row, flag = list(self.bos), [False] * len(self.bos)
            for tokens, learn in make():
                row += tokens
                flag += [learn] * len(tokens)
            rows.append(torch.tensor(row))
            flags.append(torch.tensor(flag))
            tokens_made += len(row)
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        return pad(rows), pad(flags)
