"""The same prompts asked of llama.cpp: how often a GGUF file is right, and how fast.

    python -m extras.llamacpp base.gguf scaled.gguf --ckpt DIR --lengths 500,1000

--ckpt is the folder that belongs to the files: its tokenizer and chat template write the
prompts, those of `seal.py eval` with the same flags (a FILE.jsonl whole), and they reach
llama.cpp as token ids, BOS included. llama.cpp's server runs inside this process (the
xllamacpp package), greedily, one prompt at a time and remembering none. Answers are
judged as in seal.py.

--chat asks the server's chat endpoint besides, which renders the file's own chat
template, and counts the answers that come out the same: all of them, if that template is
the folder's.

Two things to know before comparing figures. Where weights are quantised, llama.cpp rounds
activations to 8 bits as well: a 4-bit file is another model than its weights in float32,
so compare a file before and after. And threads that share their cores with other work
wait for each other: on a busy machine --threads 1 may be several times as fast.
"""

import http.client
import json
import sys
from pathlib import Path

from tqdm import tqdm

import seal

GREEDY = {"temperature": 0, "cache_prompt": False}
COUNTS = "prompt_n", "prompt_ms", "predicted_n", "predicted_ms"  # tokens, milliseconds


class Server:
    """llama.cpp's server with one file open, asked over HTTP: there Ctrl-C is heard."""

    def __init__(self, path, context: int, threads: int = 0):
        try:
            import xllamacpp
        except ImportError as error:
            raise seal.UserError("needs llama.cpp: pip install xllamacpp") from error
        if not Path(path).is_file():
            raise seal.UserError(f"{path}: is not a file")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.fit_params = False  # not less, because less memory seems free
        params.n_parallel = 1      # one prompt at a time, with the context to itself
        params.n_batch = 512       # tokens, until it hears that nobody waits any more
        params.cache_ram_mib = 0   # no prompt is remembered
        params.verbosity = -1
        if threads:
            params.cpuparams.n_threads = threads
            params.cpuparams_batch.n_threads = threads
        try:
            self.server = xllamacpp.Server(params)
        except RuntimeError as error:
            message = "llama.cpp cannot open it; damaged, or of an unknown kind"
            raise seal.UserError(f"{path}: {message}") from error
        self.path = path
        self.address = self.server.listening_address.removeprefix("http://")

    def post(self, place: str, **body) -> dict:
        connection = http.client.HTTPConnection(self.address)
        try:
            connection.request("POST", place, json.dumps(GREEDY | body))
            reply = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        if "error" in reply:
            raise seal.UserError(f"{self.path}: llama.cpp: {reply['error']['message']}")
        return reply

    def complete(self, ids: list[int], tokens: int) -> tuple[str, dict]:
        """What follows these ids, and how long it took."""
        reply = self.post("/completion", prompt=ids, n_predict=tokens)
        return reply["content"], reply["timings"]

    def chat(self, sample, tokens: int) -> str:
        """The answer to the prompt as a user's message, by the file's own template."""
        messages = [{"role": "user", "content": sample.prompt}]
        prefix = sample.prefix.strip()
        if prefix:  # a last message of the assistant's is gone on with
            messages.append({"role": "assistant", "content": prefix})
        reply = self.post("/v1/chat/completions", messages=messages, max_tokens=tokens)
        return reply["choices"][0]["message"]["content"].removeprefix(prefix)


def ask(path, cells, tokenizer, tokens=100, threads=0, chat=False) -> dict:
    """All cells asked of a file: accuracy, size and speed, and every answer."""
    asked = []
    for length, depth, samples in cells:
        for sample in samples:
            ids = tokenizer.prompt(sample.prompt, sample.prefix)
            asked.append((length, depth, sample, ids))
    context = max(len(ids) for *_, ids in asked) + tokens
    server = Server(path, context, threads)
    text = asked[0][2].prompt
    if server.post("/tokenize", content=text)["tokens"] != tokenizer.encode(text):
        raise seal.UserError(f"{path}: its tokenizer is not --ckpt's; are they one model?")
    answers = []
    total = dict.fromkeys(COUNTS, 0)
    for length, depth, sample, ids in tqdm(asked, Path(path).name, unit="prompt"):
        said, timings = server.complete(ids, tokens)
        answer = {"length": length, "depth": depth, "prompt": sample.fingerprint()}
        answer |= {"expected": sample.expected, "said": said}
        answer["score"] = sample.score(said)
        if chat:
            answer["chat"] = server.chat(sample, tokens)
        answers.append(answer)
        for name in COUNTS:
            total[name] += timings[name]

    facts = {"bytes": Path(path).stat().st_size, "cells": [], "answers": answers}
    facts["prompt tokens/s"] = 1000 * total["prompt_n"] / total["prompt_ms"]
    facts["decode tokens/s"] = 1000 * total["predicted_n"] / total["predicted_ms"]
    if chat:
        same = [answer["chat"].strip() == answer["said"].strip() for answer in answers]
        facts["chat the same"] = f"{sum(same)} of {len(same)}"
    for length, depth, samples in cells:
        scores = [answer["score"] for answer in answers[: len(samples)]]
        answers = answers[len(samples) :]
        cell = {"length": length, "depth": depth, "prompts": len(scores)}
        cell["correct"] = sum(score > 0.5 for score in scores)
        cell["score"] = sum(scores) / len(scores)
        facts["cells"].append(cell)
    return facts


def report(files: dict[str, dict]) -> str:
    """Accuracy by length, a column per file; then size and speed, a row per file."""
    from tabulate import tabulate

    scores = {Path(path).name: facts["cells"] for path, facts in files.items()}
    if len(scores) < len(files):  # two of the same name
        scores = {path: facts["cells"] for path, facts in files.items()}
    rows = []
    for name, facts in zip(scores, files.values()):
        shown = {key: facts[key] for key in facts if key not in ("cells", "answers")}
        rows.append({"file": name} | shown)
    speeds = tabulate(rows, headers="keys", floatfmt=".1f", intfmt=",")
    return f"{seal.score_table(scores)}\n\n{speeds}"


FLAGS = "ckpt template task haystack seed lengths depths prompts max_new_tokens json".split()


def main(arguments=None) -> None:
    parser = seal.Parser("extras.llamacpp", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="FILE.gguf")
    parser.add_flags(FLAGS)
    parser.add_argument("--threads", type=int, default=0, help="0: llama.cpp's choice")
    parser.add_argument("--chat", action="store_true", help="ask the chat endpoint, too")
    args = parser.parse_args(arguments)
    run = seal.Run(**{name: getattr(args, name) for name in FLAGS})

    config = seal.read_config(run.ckpt)
    tokenizer = seal.Tokenizer(run.ckpt, config, run.template)
    cells = seal.draw_cells(run, tokenizer, config)
    files = {}
    for path in args.files:
        options = run.max_new_tokens, args.threads, args.chat
        files[path] = ask(path, cells, tokenizer, *options)
        if run.json:
            about = {"ckpt": run.ckpt, "task": run.task, "seed": run.seed}
            seal.write_json(run.json, about | {"files": files})
    print(report(files))


if __name__ == "__main__":
    sys.exit(seal.run("extras.llamacpp", main))
