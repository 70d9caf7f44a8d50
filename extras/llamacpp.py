"""The same prompts asked of llama.cpp: how often a GGUF file is right, and how fast.

    python -m extras.llamacpp base.gguf scaled.gguf --ckpt DIR --lengths 500,1000

--ckpt is a folder or a file that they belong to: its tokenizer and chat template write the
prompts, those of `seal.py eval` with the same flags (a FILE.jsonl whole), and they reach
llama.cpp as token ids, BOS included. llama.cpp's server runs inside this process (the
xllamacpp package), greedily, one prompt at a time and remembering none. Answers are
judged as in seal.py.

Three things to know before comparing figures. Where weights are quantised, llama.cpp
rounds activations to 8 bits as well: a 4-bit file is another model than its weights in
float32, so compare a file before and after. A prompt is read in pieces of --n-ubatch
tokens, and with pieces of another size the sums are rounded otherwise: a quantised file
may then answer the same prompt with other words. And threads that share their cores with
other work wait for each other: on a busy machine --threads 1 may be several times as
fast.

--chat asks the server's chat endpoint besides, which renders the file's own chat
template. An answer counts as the same if the server made the same token ids of the
prompt, and then said the same. The date is told to the template as `date_string`, the
name that Llama 3's templates read, and thinking is left in the answer (reasoning_format
none), where the endpoint by itself returns it apart. What cannot be the same:

  a begun answer   (a sample's prefix) The server puts it behind the prompt as it is, and
                   closes a <think> that the template opened. seal.py puts it through the
                   template, as the beginning of a finished answer.
  another date     A template that asks strftime_now whatever `date_string` says is told
                   today's date by the server, and 26 Jul 2024 by seal.py.
  a switch         The server may set `enable_thinking`, which some templates read;
                   seal.py leaves it undefined.
"""

import http.client
import json
import sys
from pathlib import Path

from tqdm import tqdm

import seal
from extras.gguf_model import folder_of

GREEDY = {"temperature": 0, "cache_prompt": False}
DATE = {"date_string": "26 Jul 2024"}  # as in seal.TODAY
COUNTS = "prompt_n", "prompt_ms", "predicted_n", "predicted_ms"  # tokens, milliseconds
BATCH = 512  # tokens that are read before the server hears that nobody waits any more


class Server:
    """llama.cpp's server with one file open, asked over HTTP: there Ctrl-C is heard."""

    def __init__(self, path, context: int, threads: int = 0, n_ubatch: int = BATCH):
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
        params.n_parallel = 1  # one prompt at a time, with the context to itself
        params.n_batch = max(BATCH, n_ubatch)
        params.n_ubatch = n_ubatch
        params.cache_ram_mib = 0  # no prompt is remembered
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

    def encode(self, text: str, add_special=False) -> list[int]:
        """Ids of a text, special tokens read; add_special: with the file's own BOS."""
        return self.post("/tokenize", content=text, add_special=add_special)["tokens"]

    def complete(self, ids: list[int], tokens: int) -> tuple[str, dict]:
        """What follows these ids, and how long it took."""
        reply = self.post("/completion", prompt=ids, n_predict=tokens)
        return reply["content"], reply["timings"]

    def chat(self, sample, tokens: int) -> tuple[list[int], str]:
        """The ids that the file's own template makes of a prompt, and the answer to them."""
        messages = [{"role": "user", "content": sample.prompt}]
        prefix = sample.prefix.strip()
        if prefix:  # a last message of the assistant's is gone on with
            messages.append({"role": "assistant", "content": prefix})
        asked = {"messages": messages, "chat_template_kwargs": DATE}
        # The text comes without the BOS that the server is going to put in front.
        rendered = self.post("/apply-template", **asked)["prompt"]
        asked |= {"max_tokens": tokens, "reasoning_format": "none"}
        reply = self.post("/v1/chat/completions", **asked)
        said = reply["choices"][0]["message"]["content"]
        return self.encode(rendered, add_special=True), said.removeprefix(prefix)


def open_server(path, asked, tokenizer, tokens, threads, n_ubatch) -> Server:
    """A server with room for the prompts; UserError if the file cuts them otherwise.

    asked: (length, depth, sample, ids) of each prompt. What is compared is the rendered
    prompt: the file may leave out the space that --ckpt's tokenizer puts in front of a
    bare text, if no prompt begins with one.
    """
    context = max(len(ids) for *_, ids in asked) + tokens
    server = Server(path, context, threads, n_ubatch)
    text = tokenizer.render(asked[0][2].prompt)
    if server.encode(text) != tokenizer.encode(text):
        raise seal.UserError(
            f"{path}: llama.cpp cuts a prompt otherwise than --ckpt's tokenizer; "
            "are they one model?")
    return server


def ask(path, cells, tokenizer, tokens=100, threads=0, chat=False, n_ubatch=BATCH) -> dict:
    """All cells asked of a file: accuracy, size and speed, and every answer."""
    asked = []
    for length, depth, samples in cells:
        for sample in samples:
            ids = tokenizer.prompt(sample.prompt, sample.prefix)
            asked.append((length, depth, sample, ids))
    server = open_server(path, asked, tokenizer, tokens, threads, n_ubatch)
    answers, same = [], 0
    total = dict.fromkeys(COUNTS, 0)
    for length, depth, sample, ids in tqdm(asked, Path(path).name, unit="prompt"):
        said, timings = server.complete(ids, tokens)
        answer = {"length": length, "depth": depth, "prompt": sample.fingerprint()}
        answer |= {"expected": sample.expected, "said": said}
        answer["score"] = sample.score(said)
        if chat:
            chat_ids, answer["chat"] = server.chat(sample, tokens)
            same += chat_ids == ids and answer["chat"].strip().endswith(said.strip())
        answers.append(answer)
        for name in COUNTS:
            total[name] += timings[name]

    facts = {"bytes": Path(path).stat().st_size, "cells": [], "answers": answers}
    facts["prompt tokens/s"] = 1000 * total["prompt_n"] / total["prompt_ms"]
    facts["decode tokens/s"] = 1000 * total["predicted_n"] / total["predicted_ms"]
    if chat:
        facts["chat the same"] = f"{same} of {len(answers)}"
    for length, depth, samples in cells:
        said = [answer["said"] for answer in answers[: len(samples)]]
        answers = answers[len(samples) :]
        cell = {"length": length, "depth": depth} | seal.judge(samples, said)
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


FLAGS = "ckpt template extend task haystack seed lengths depths prompts max_new_tokens json"


def main(arguments=None) -> None:
    parser = seal.Parser("extras.llamacpp", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="FILE.gguf")
    parser.add_flags(FLAGS)
    parser.add_argument("--threads", type=int, default=0, help="0: llama.cpp's choice")
    parser.add_argument("--n-ubatch", type=int, default=BATCH, help="tokens read at a time")
    parser.add_argument("--chat", action="store_true", help="ask the chat endpoint, too")
    args = parser.parse_args(arguments)
    flags = seal.Flags(**{name: getattr(args, name) for name in FLAGS.split()})
    with seal.blame("flags"):
        seal.check_json(vars(args), "flags.schema.json")
    if args.n_ubatch < 1 or args.threads < 0:
        raise seal.UserError("--n-ubatch must be 1 or more, --threads 0 or more")
    if flags.json:
        seal.check_place(flags.json)

    folder = folder_of(flags.ckpt)
    config = seal.extend(seal.read_config(folder), flags.extend or "none")
    tokenizer = seal.Tokenizer(folder, config, flags.template)
    # What the scales in a file were trained on, it does not say.
    cells, files = seal.draw_cells(flags, tokenizer, trained_on=""), {}
    for path in args.files:
        options = flags.max_new_tokens, args.threads, args.chat, args.n_ubatch
        files[path] = ask(path, cells, tokenizer, *options)
        if flags.json:
            about = {"ckpt": flags.ckpt, "task": flags.task, "seed": flags.seed}
            about["n_ubatch"] = args.n_ubatch
            seal.write_json(flags.json, about | {"files": files})
    print(report(files))


if __name__ == "__main__":
    sys.exit(seal.exit_status("extras.llamacpp", main))
