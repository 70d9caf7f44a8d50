"""Recipes of training compared in little time: line retrieval, and the price in prose.

    python -m extras.sweep --ckpt smollm2 --dtype bfloat16 --json sweep.json --recipes \\
        "--questions 8 --samples 12 --lr .06;--questions 8 --samples 25 --lr .03"

A recipe is any flags of seal.py train, behind --mode channel --length 700. Nothing is
generated. A question counts as answered if each token of its answer is the most likely one
behind those before it, so one pass over a record tells it for all of its questions. Greedy
generation says the same where the answer is right, and is another measure where it is not.
The prompts (--seed 1000) are not those that extras.realmodel reports. Perplexity is that of
prose. Seconds are the processor's, of the training alone.
"""

import json
import sys
import time
from types import SimpleNamespace

import torch

import seal
from extras.questions import Seal
from extras.realmodel import perplexity


@torch.no_grad()
def answered(model: seal.Llama, record) -> int:
    """How many of a record's questions are answered, each token being the most likely."""
    right, logits_of = 0, model.logits
    answers = iter(record)

    def count(x):
        """In the place of model.logits: x (A, D), the rows that foretell an answer."""
        nonlocal right
        logits, (_, answer) = logits_of(x), next(answers)
        right += logits.argmax(1).tolist() == answer
        return logits

    model.logits = count
    try:
        seal.answer_loss(model, record)
    finally:
        del model.logits
    return right


def measure(model, tokenizer, args) -> dict:
    """Shares answered, by length, and the perplexity of prose."""
    found = {}
    for length in args.lengths:
        records = seal.make_records(
            "lines", tokenizer, [length], args.records, "eval", args.seed, questions=8)
        right = asked = 0
        for record in records:
            right += answered(model, list(map(tokenizer.pair, record)))
            asked += len(record)
        found[str(length)] = right / asked
    bench = SimpleNamespace(model=model, tokenizer=tokenizer)
    return found | {"perplexity": perplexity(bench, args.windows)["perplexity"]}


def main(arguments=None) -> None:
    parser = seal.Parser("extras.sweep", description=__doc__.splitlines()[0])
    parser.add_flags("ckpt dtype seed json")
    parser.set_defaults(seed=1000)
    parser.add_argument("--recipes", required=True, help="flags of train, ; between")
    parser.add_argument("--lengths", type=seal.wholes, default=[500, 1000, 2000])
    parser.add_argument("--records", type=int, default=4, help="of a length, 8 questions each")
    parser.add_argument("--windows", type=int, default=5, help="of prose, 1,024 tokens each")
    args = parser.parse_args(arguments)
    if min(args.records, args.windows) < 1:
        raise seal.UserError("--records, --windows: must be 1 or more")
    if args.json:
        seal.check_place(args.json)
    results, base = [], None
    for recipe in args.recipes.split(";"):
        asked = f"--mode channel --length 700 {recipe}"
        side = Seal(SimpleNamespace(ckpt=args.ckpt, dtype=args.dtype, recipe=asked, seed=0))
        if base is None:
            side.model.reset_scales("head")
            base = measure(side.model, side.tokenizer, args)
            results.append({"recipe": "base"} | base)
        start = time.process_time()
        side.train(len(side.work))
        seconds = round(time.process_time() - start, 1)
        found = measure(side.model, side.tokenizer, args)
        found["of the base's perplexity"] = found["perplexity"] / base["perplexity"]
        results.append({"recipe": asked, "seconds": seconds} | found)
        print(json.dumps(results[-1]), flush=True)
        if args.json:
            seal.write_json(args.json, {"dtype": args.dtype, "results": results})


if __name__ == "__main__":
    sys.exit(seal.exit_status("extras.sweep", main))
