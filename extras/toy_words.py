"""The toy's vocabulary: tokenizer.model, a BPE of 1,280 pieces made of words of our
own.

It makes LongEval's fixed phrases and each of seal.py's words one piece, so that a
record of 43 lines fits the toy's context of 512 tokens; digits stay apart, as in
Llama's. Used by extras/toy.py; what it makes is the bundled file to the byte.
"""

import random
import re

import seal
from seal import ADJECTIVES, NOUNS, RECORD

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
