"""Rows of LongEval, RULER, LongBench and InfiniteBench as seal.py's samples.

Used by extras.formats, which says what each is and how it is judged. A function takes a
row (what JSON holds of one sample) and the Job, and returns a line of seal.py's JSONL:
prompt, answer and, where they are wanted, expected, any, prefix and judge. What a row
lacks, or has in a wrong type, is a ValueError.
Sources: longeval/utils.py of github.com/DachengLi1/LongChat; scripts/data of
github.com/NVIDIA/RULER, and lm_eval/tasks/ruler of lm-evaluation-harness; pred.py, eval.py
of github.com/THUDM/LongBench; src/eval_utils.py of github.com/OpenBMB/InfiniteBench.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from string import ascii_uppercase

import seal
from extras import ruler


@dataclass
class Job:
    """What the user asked for, and what there is to tell at the end."""

    dataset: str = ""  # the file's name without its ending
    judge: str | None = None
    turns: str = "refuse"
    wordings: dict = field(default_factory=dict)  # by dataset, or a single one under ""
    notes: Counter = field(default_factory=Counter)  # sentences, and of how many rows


# ---- Values of a row ----


def text(row: dict, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {json.dumps(value)[:40]}, must be a text")
    if not value.strip():
        raise ValueError(f"{key!r} is empty")
    return value


def text_if_any(row: dict, key: str) -> str:
    """Of a key that may be absent: null and an empty text are no text either."""
    return "" if row.get(key) in (None, "") else text(row, key)


def texts(row: dict, key: str) -> list[str]:
    value = row.get(key)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key!r} is {json.dumps(value)[:40]}, must be a list of texts")
    return [text({key: item}, key) for item in value]


# ---- LongEval ----


def longeval_lines(row: dict, job: Job) -> dict:
    prompt, number, index = text(row, "prompt"), row["expected_number"], row["random_idx"]
    if type(number) is not int:
        raise ValueError(f"'expected_number' is {number!r}, must be a whole number")
    if not isinstance(index, list) or len(index) != 2:
        raise ValueError(f"'random_idx' is {index!r}, must be a line's key and its place")
    if seal.LINE.format(key=index[0], number=number) not in prompt:
        raise ValueError(f"no line {index[0]!r} of the prompt has {number}")
    answer = seal.LINE_ANSWER.format(key=index[0], number=number)
    return {"prompt": prompt, "answer": answer, "expected": number, "judge": "longeval"}


def longeval_topics(row: dict, job: Job) -> dict:
    """Its only question is for the first topic."""
    first = texts(row, "topics")[0]
    return {"prompt": text(row, "prompt"), "answer": first, "expected": first}


# ---- RULER ----

RULER_TASK = re.compile(  # how the prompts of its tasks begin
    "(?P<cwe>Below is a numbered list of words)|(?P<niah>(Some|A) special magic )|"
    "(?P<vt>Memorize and track the chain)|(?P<fwe>Read the following coded text)|"
    "(?P<qa>Answer the question based on the given documents)"
)
# How the answer begins. Files of 2024 have it at the end of the input.
RULER_PREFIX = re.compile(r" (Answer:|The special magic )[^\n]{0,300}\Z")
# Where a chat template hands over to the model: [/INST], ASSISTANT: or special tokens.
CHAT_END = re.compile(r"(\s*(\[/INST\]|<[\w|]+>([Aa]ssistant)?|(?i:assistant):))+\s*\Z")


def without_chat_template(prompt: str, start: int, job: Job) -> str:
    """The task, which begins at `start`: seal.py puts the model's own template around it."""
    if not prompt[:start].strip():
        return prompt
    end = CHAT_END.search(prompt)
    if not end:
        raise ValueError(f"'input' begins with {prompt[:start][:40]!r}: prepare the file "
                         "with RULER's --model_template_type base")
    job.notes["a chat template around the task was taken off"] += 1
    return prompt[start : end.start()]


def ruler_row(row: dict, job: Job) -> dict:
    prompt, outputs = text(row, "input"), texts(row, "outputs")
    prefix = text_if_any(row, "answer_prefix") or text_if_any(row, "gen_prefix")
    found = RULER_PREFIX.search(prompt)
    if found and not prefix:
        prompt, prefix = prompt[: found.start()], found[0]
    task = RULER_TASK.search(prompt)
    if not task:
        raise ValueError(f"'input' begins with {prompt[:40]!r}, as no task of RULER's does")
    prompt = without_chat_template(prompt, task.start(), job)
    example = text_if_any(row, "input_example")
    if example:
        job.notes["input_example was put in front, as in RULER"] += 1
        prompt = f"{example}\n{prompt}"
    sample = {"prompt": prompt, "answer": outputs[0]}
    if task.lastgroup == "qa":  # other spellings of one answer
        sample["any"] = outputs
    else:
        sample["answer"] = ruler.answer_text(task.lastgroup, outputs)
        sample["expected"] = outputs
    if prefix:
        sample["prefix"] = prefix
    return sample


# ---- LongBench and InfiniteBench: a context, a question, and answers ----

JUDGES = {  # by what is nearest to the benchmark's own measure
    "any": "narrativeqa qasper multifieldqa_en multifieldqa_zh hotpotqa 2wikimqa musique trec "
    "triviaqa lsht passage_count passage_retrieval_en passage_retrieval_zh passkey kv_retrieval "
    "number_string code_run math_find longdialogue_qa_eng longbook_qa_eng longbook_qa_chn",
    "words": "gov_report qmsum multi_news vcsum samsum dureader lcc repobench-p longbook_sum_eng",
}


def judged(answers: list[str], dataset: str, job: Job) -> dict:
    """All answers, any of them, or (where nothing is expected) the first one's words."""
    how = job.judge
    for judge, names in JUDGES.items():
        if not how and dataset in names.split():
            how = judge
    if not how:
        raise ValueError(f"{dataset!r} is not known: --judge any (one of its answers is "
                         "enough), all (the share of them) or words (of the first one)")
    if how == "all":
        return {"answer": ", ".join(answers), "expected": answers}
    return {"answer": answers[0]} | ({"any": answers} if how == "any" else {})


def worded(row: dict, dataset: str, options: list[str], job: Job) -> str:
    """The prompt, in the user's wording or the plain one."""
    if len(options) > len(ascii_uppercase):
        raise ValueError(f"has {len(options)} options, more than there are letters")
    lettered = [f"{ascii_uppercase[i]}. {option}" for i, option in enumerate(options)]
    parts = {"context": text(row, "context"), "input": text_if_any(row, "input")}
    parts["options"] = "\n".join(lettered)
    wording = job.wordings.get(dataset, job.wordings.get(""))
    if wording is None and job.wordings:
        raise ValueError(f"--wording has none for {dataset!r}")
    if wording is None:
        if not parts["input"]:
            raise ValueError("'input' is empty: --wording FILE must say what is asked")
        return "\n\n".join(part for part in parts.values() if part)
    for key, part in parts.items():
        if part and f"{{{key}}}" not in wording:
            job.notes[f"{key!r} has no place in --wording"] += 1
    return re.sub(r"\{(context|input|options)\}", lambda found: parts[found[1]], wording)


def longbench(row: dict, job: Job) -> dict:
    dataset = text_if_any(row, "dataset").removesuffix("_e")  # LongBench-E: the same tasks
    sample = {"prompt": worded(row, dataset, [], job)}
    return sample | judged(texts(row, "answers"), dataset, job)


def infinitebench(row: dict, job: Job) -> dict:
    """Its answer is a text, a number, or a list: of answers, or of a choice and its letter."""
    options = texts(row, "options") if row.get("options") else []
    sample = {"prompt": worded(row, job.dataset, options, job)}
    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    if options:
        if not answers or answers[0] not in options:
            raise ValueError(f"'answer' {json.dumps(answers)[:40]} is none of 'options'")
        letter = ascii_uppercase[options.index(answers[0])]
        judge = {"answer": f"{letter}. {answers[0]}", "expected": answers[0]}
    elif len(answers) == 1 and type(answers[0]) in (int, float):
        judge = {"answer": str(answers[0]), "expected": answers[0]}
    else:
        judge = judged(texts({"answer": answers}, "answer"), job.dataset, job)
    return sample | judge
