"""Other people's task files as JSONL for seal.py's --task.

    python -m extras.formats FILE --out task.jsonl

FILE is JSONL, a JSON array, or a JSON object that holds one. What it is, the keys of its
rows tell; all must be of one kind.

    LongEval lines   random_idx, expected_number, prompt. LongEval's own judge
    LongEval topics  topics, prompt. The first topic's name must be said; LongEval itself
                     asks a chat model whether it is
    RULER            input, outputs, answer_prefix; from lm-evaluation-harness gen_prefix and
                     input_example. The share of the outputs that is said; one is enough for
                     questions (qa). A chat template around the task is taken off
    LongBench        context, input, answers, dataset. One of the answers is enough; for
                     summaries and code, the share of the first one's words
    InfiniteBench    context, input, answer, options, in a file with the task's name.
                     One answer is enough; of a choice, the option's text must be said
    chat             messages (role, content) or conversations (from, value). The last
                     message is the answer; a system message goes in front of the question
    completion       prompt, completion: two texts, or two lists of messages
    Alpaca           instruction, input, output. The prompt is instruction, blank line, input

LongBench and InfiniteBench measure otherwise (F1, ROUGE-L, edit distance, letters), and
their figures are no measure for ours. The prompt is context, blank line, input; or what
--wording FILE says: a text with {context}, {input} and {options} in it, or LongBench's
config/dataset2prompt.json, which has a text for each dataset.

A prompt of seal.py is one message of the user. Rows of several turns are refused, unless
--turns skip leaves them out, or --turns transcript writes what was said before into the
prompt, as LongEval's topics have it (USER: ..., ASSISTANT: ...).
A row's other keys are named in a note if they hold text, and refused if it is a prompt's.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import seal
from extras import benchmarks
from extras.benchmarks import Job, text, text_if_any

# ---- Chat, completions, instructions ----

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant",
}


def one_message(message) -> tuple[str, str]:
    """Who says it, and what."""
    if not isinstance(message, dict):
        raise ValueError(f"a message is {json.dumps(message)[:40]}, must be an object")
    who, what = ("from", "value") if "from" in message else ("role", "content")
    role = text(message, who)
    if role not in ROLES:
        raise ValueError(f"a message of {role!r}: system, user and assistant are read")
    for key in set(message) - {who, what}:
        if message[key] and not isinstance(message[key], (bool, int, float)):
            raise ValueError(f"a message has {key!r}: only its text is read")
    return ROLES[role], text(message, what)


def conversation(messages: list, system: str, job: Job) -> dict | None:
    """The last message is the answer. None: the row is left out."""
    said = [one_message(message) for message in messages]
    while said and said[0][0] == "system":
        system = f"{system}\n\n{said.pop(0)[1]}".strip()
    if [role for role, _ in said[-2:]] != ["user", "assistant"]:
        raise ValueError("must end with a user's question and the assistant's answer")
    *asked, (_, answer) = said
    prompt = asked[0][1]
    if len(asked) > 1:
        if job.turns == "skip":
            job.notes["left out for their several turns"] += 1
            return None
        if job.turns == "refuse":
            raise ValueError(f"has {len(asked)} messages before the answer: --turns skip "
                             "leaves such rows out, --turns transcript writes all in the prompt")
        prompt = "\n\n".join(f"{role.upper()}: {words}" for role, words in asked)
    return {"prompt": behind_system(system, prompt, job), "answer": answer}


def behind_system(system: str, prompt: str, job: Job) -> str:
    if not system:
        return prompt
    job.notes["the prompt begins with the system message"] += 1
    return f"{system}\n\n{prompt}"


def chat(row: dict, job: Job) -> dict | None:
    messages = row.get("messages", row.get("conversations"))
    if not isinstance(messages, list):
        raise ValueError(f"the messages are {json.dumps(messages)[:40]}, must be a list")
    return conversation(messages, text_if_any(row, "system"), job)


def completion(row: dict, job: Job) -> dict | None:
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        return conversation(row["prompt"] + row["completion"], "", job)
    return {"prompt": text(row, "prompt"), "answer": text(row, "completion")}


def alpaca(row: dict, job: Job) -> dict:
    prompt = text(row, "instruction")
    if text_if_any(row, "input"):
        prompt = f"{prompt}\n\n{row['input']}"
    prompt = behind_system(text_if_any(row, "system"), prompt, job)
    return {"prompt": prompt, "answer": text(row, "output")}


# ---- What a file is ----


@dataclass
class Format:
    name: str
    keys: str  # that it is known by
    more: str  # others that are read
    facts: str  # others that are about the row, and no part of its text
    convert: Callable[[dict, Job], dict | None]


FORMATS = [
    Format("LongEval lines", "random_idx expected_number prompt", "",
           "correct_line num_lines token_size", benchmarks.longeval_lines),
    Format("LongEval topics", "topics prompt", "", "", benchmarks.longeval_topics),
    Format("RULER", "input outputs", "answer_prefix gen_prefix input_example", "",
           benchmarks.ruler_row),
    Format("LongBench", "context input answers", "dataset", "_id language all_classes length",
           benchmarks.longbench),
    Format("InfiniteBench", "context input answer", "options", "id", benchmarks.infinitebench),
    Format("chat messages", "messages", "system", "id", chat),
    Format("chat conversations", "conversations", "system", "id", chat),
    Format("completions", "prompt completion", "", "id", completion),
    Format("Alpaca", "instruction output", "input system", "id", alpaca),
]
# What other formats have in a prompt. A row that holds text there asks for more than is read.
PROMPT_KEYS = set(
    "system history tools functions images context document documents question input "
    "instruction options choices examples".split()
)


def find_format(row: dict) -> Format:
    keys = ", ".join(map(str, row))
    if {"prompt", "answer"} <= set(row):
        raise ValueError(f"has seal.py's own keys already ({keys}): give the file to --task")
    found = [known for known in FORMATS if set(known.keys.split()) <= set(row)]
    if len(found) != 1:
        names = " and ".join(known.name for known in found) or "no format that is known"
        raise ValueError(f"has the keys of {names}: {keys}")
    return found[0]


def other_keys(row: dict, known: Format, job: Job) -> None:
    """No text is dropped in silence: it is refused, or named in a note."""
    for key in set(row) - set(f"{known.keys} {known.more} {known.facts}".split()):
        if not row[key] or isinstance(row[key], (bool, int, float)):
            continue
        if key in PROMPT_KEYS:
            raise ValueError(f"holds {key!r}, which is not read in {known.name}")
        job.notes[f"{key!r} was left out"] += 1


def unique(pairs: list[tuple]) -> dict:
    """An object of JSON, whose keys Python would let replace each other."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("has a key twice: " + ", ".join(key for key, _ in pairs))
    return dict(pairs)


def parse(content: str):
    return json.loads(content, object_pairs_hook=unique)


def is_jsonl(content: str) -> bool:
    """More than one line, the first of them whole JSON in itself."""
    first, _, rest = content.lstrip().partition("\n")
    try:
        json.loads(first)
    except ValueError:
        return False
    return rest.strip() != ""


def read_rows(path: Path) -> list[tuple[str, dict]]:
    """(where it stands, row) of each row."""
    rows = []
    with seal.blame(path):
        content = path.read_text(encoding="utf-8-sig")
        if not is_jsonl(content):
            whole = parse(content)
            if isinstance(whole, dict):
                lists = [value for value in whole.values() if isinstance(value, list)]
                known = any(set(known.keys.split()) <= set(whole) for known in FORMATS)
                if known or len(lists) != 1:
                    return [("line 1", whole)]
                whole = lists[0]  # such as {"data": [...]}
            if not isinstance(whole, list):
                raise ValueError(f"is {json.dumps(whole)[:40]}, must hold objects")
            return [(f"entry {number}", row) for number, row in enumerate(whole, 1)]
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                with seal.blame(f"{path}, line {number}"):
                    rows.append((f"line {number}", parse(line)))
    return rows


def convert(path: Path, job: Job) -> tuple[Format, list[dict]]:
    """The file's format and its samples."""
    known, samples = None, []
    for place, row in read_rows(path):
        with seal.blame(f"{path}, {place}"):
            if not isinstance(row, dict):
                raise ValueError(f"is {json.dumps(row)[:40]}, must be an object")
            found = find_format(row)
            known = known or found
            if found is not known:
                raise ValueError(f"is of {found.name}, the rows before it of {known.name}")
            other_keys(row, known, job)
            sample = known.convert(row, job)
            # Half a surrogate pair and NaN can be written in JSON's escapes, not in a file.
            json.dumps(sample, ensure_ascii=False, allow_nan=False).encode()
            if sample:
                samples.append(sample)
                if benchmarks.CHAT_END.search(sample["prompt"]):
                    job.notes["the prompt has a chat template already: --template none"] += 1
    if not samples:
        raise seal.UserError(f"{path}: holds no row that becomes a sample")
    return known, samples


def read_wordings(path: str | None) -> dict[str, str]:
    """{dataset: wording}, or one wording under the empty name."""
    if not path:
        return {}
    with seal.blame(f"--wording {path}"):
        content = Path(path).read_text(encoding="utf-8-sig")
        wordings = json.loads(content) if path.endswith(".json") else {"": content.strip("\n")}
        if not isinstance(wordings, dict) or not wordings:
            raise ValueError("must be an object: a wording for each dataset")
        for dataset in wordings:
            if "{context}" not in text(wordings, dataset):
                raise ValueError(f"{wordings[dataset][:40]!r} has no {{context}}")
        return wordings


def main(arguments=None) -> None:
    parser = seal.Parser("extras.formats", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="JSONL or JSON")
    parser.add_argument("--out", required=True, help="the JSONL file to write")
    parser.add_argument("--wording", help="a text or .json file: how context and input meet")
    parser.add_argument("--judge", choices=["any", "all", "words"], help="of several answers")
    parser.add_argument("--turns", choices=["refuse", "skip", "transcript"], default="refuse")
    args = parser.parse_args(arguments)

    if Path(args.out).resolve() == args.file.resolve():
        raise seal.UserError(f"--out {args.out}: is the file that is read")
    job = Job(args.file.stem, args.judge, args.turns, read_wordings(args.wording))
    known, samples = convert(args.file, job)
    if (args.wording or args.judge) and not known.keys.startswith("context input"):
        raise seal.UserError(f"--wording, --judge: {known.name} has its own")
    with seal.whole_file(args.out) as path, open(path, "w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
    for sentence, count in job.notes.items():
        seal.note(f"{count} rows: {sentence}")
    print(f"{args.file}: {known.name}; {args.out}: {len(samples)} samples")


if __name__ == "__main__":
    sys.exit(seal.exit_status("extras.formats", main))
