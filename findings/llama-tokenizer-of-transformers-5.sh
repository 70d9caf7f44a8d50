#!/usr/bin/env bash
# Guess: a folder of 2023 with nothing but tokenizer.model is cut by transformers 5 as it was
# by 4, and as SentencePiece cuts it.
#
# transformers 5 has a LlamaTokenizer of its own: it takes the pieces out of tokenizer.model
# and makes byte pair merges of their order. Three things are other than in 4.57, silently:
# - no BOS: a model that has seen one before every text begins in the middle of something;
# - "</s>USER", where a second turn begins, gets no space before USER; 4.57 puts one there
#   unless tokenizer_config.json says "legacy": false;
# - a unigram model, which is what SentencePiece trains unless told otherwise, is read as if
#   it were byte pair encoding: pieces are joined by their place in the list and not chosen
#   by their probability, and nearly every text comes out in other tokens.
# Compare ids with sentencepiece's own before you train scales on such a folder.
#
# transformers 5.24.0 and 4.57.3, sentencepiece 0.2.3. Source: models/llama/
# tokenization_llama.py and SentencePieceExtractor in convert_slow_tokenizer.py of 5,
# LlamaConverter in convert_slow_tokenizer.py of 4.57.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q \
    transformers==5.24.0 tokenizers==0.23.3 sentencepiece==0.2.3 protobuf==7.36.2
venv/bin/pip install -q --target four transformers==4.57.3 tokenizers==0.22.2
export TRANSFORMERS_VERBOSITY=error

cat > ask.py <<'EOF'
import io
import json
import random
from pathlib import Path

import sentencepiece
import transformers
from transformers import AutoTokenizer

WORDS = """a chat between a curious user and an assistant USER ASSISTANT the scales of heads
are scaling what a head retrieves line record number answer""".split()


def sentences(count, seed):
    draw = random.Random(seed)
    for _ in range(count):
        yield " ".join(draw.choices(WORDS, k=12)) + f" {draw.randrange(50000)}."


def folder(kind):
    """A folder with a tokenizer.model of this kind, trained on the sentences above."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(2000, 0), model_writer=model, model_type=kind,
        vocab_size=400, hard_vocab_limit=False, byte_fallback=True, num_threads=1,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )
    path = Path(kind)
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes(model.getvalue())
    names = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"}
    names |= {"bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return path


print("transformers", transformers.__version__, "sentencepiece", sentencepiece.__version__)
otherwise = {}
for kind in ("bpe", "unigram"):
    path = folder(kind)
    ours = AutoTokenizer.from_pretrained(path)
    own = sentencepiece.SentencePieceProcessor(str(path / "tokenizer.model"))
    otherwise[kind] = 0
    for text in sentences(200, 1):
        otherwise[kind] += ours.encode(text, add_special_tokens=False) != own.encode(text)
    print(f"  {kind}: {otherwise[kind]} of 200 texts are cut not as by sentencepiece")
    text = "the scales of heads"
    print("     by transformers: ", *ours.tokenize(text))
    print("     by sentencepiece:", *own.encode(text, out_type=str))
    if kind == "bpe":
        turns = ours.convert_ids_to_tokens(ours.encode("USER</s>USER"))
        print("     USER</s>USER:    ", *turns)

if transformers.__version__.startswith("4."):
    assert turns[0] == "<s>" and turns[-1] == "▁USER", turns
    assert otherwise == {"bpe": 0, "unigram": 0}, otherwise
else:
    assert "<s>" not in turns and turns[-1] != "▁USER", turns
    assert otherwise["bpe"] == 0 and otherwise["unigram"] > 100, otherwise
EOF
PYTHONPATH=four venv/bin/python ask.py
venv/bin/python ask.py

# Seen:
# transformers 4.57.3 sentencepiece 0.2.3
#   bpe: 0 of 200 texts are cut not as by sentencepiece
#      by transformers:  ▁the ▁scales ▁of ▁heads
#      by sentencepiece: ▁the ▁scales ▁of ▁heads
#      USER</s>USER:     <s> ▁USER </s> ▁USER
#   unigram: 0 of 200 texts are cut not as by sentencepiece
#      by transformers:  ▁ t he ▁scal e s ▁ o f ▁head s
#      by sentencepiece: ▁ t he ▁scal e s ▁ o f ▁head s
# transformers 5.24.0 sentencepiece 0.2.3
#   bpe: 0 of 200 texts are cut not as by sentencepiece
#      by transformers:  ▁the ▁scales ▁of ▁heads
#      by sentencepiece: ▁the ▁scales ▁of ▁heads
#      USER</s>USER:     ▁USER </s> US ER
#   unigram: 180 of 200 texts are cut not as by sentencepiece
#      by transformers:  ▁ t he ▁ s c a l e s ▁ o f ▁ he a d s
#      by sentencepiece: ▁ t he ▁scal e s ▁ o f ▁head s
