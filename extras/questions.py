"""A record that is read once and asked many questions: what that saves.

    python -m extras.questions --ckpt smollm2 --json extras/questions.json
    python -m extras.questions train --ckpt smollm2 --dtype bfloat16 --recipe "FLAGS"

  train  three whole trainings: by peft, each prompt with one question (the paper's recipe,
         IA3 on o_proj), its layers recomputed; the same with nothing recomputed; and by
         seal.py with the flags of --recipe, which may be any of its train's
  ask    questions a second: all questions of a record in a row, and some of them alone
  count  nothing is run: operations that a 7B needs for 50 questions, memory of one step

That sequences share their beginning is known from preference tuning (arXiv 2410.20305),
reinforcement learning (Prefix Grouper, arXiv 2506.05433) and agents (Tree Training, arXiv
2511.00413). So the mechanism is not new; measured is what it does for learning scales.

Figures stand in --json, by part; what is there is not done again, unless it is named. How
to read them: sides take turns, so that other work on the machine hits all, and ratios
count more than seconds. "processor s" are those of all cores, without waiting. Loading,
drawing prompts and what seal.py stores after each step are left out. In `train` all must
first find the same loss and gradient for a prompt; each side is a process, and GB (2^30
bytes) are its peaks. In `ask` answers are those with --scales. In `count` a product of two
matrices is two operations for each pair of numbers; what is computed again counts again.
The record's attention to itself is causal and counts half (as in extras.speed), that of
questions counts whole. Its GB are storages of a bfloat16 model that live at once.
"""

import platform
import re
import shlex
import sys
import time
from contextlib import ExitStack, nullcontext
from importlib.metadata import version

import torch
from tabulate import tabulate
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import seal
from extras import pieces, shapes, speed
from extras.speed_gguf import Counter, Process

RECIPE = "--mode channel --length 700 --samples 12 --questions 8 --lr 0.06 --pull 0.02"
ROUNDS = 10  # train: turns of each side
RECORDS, ALONE, NEW = 6, 2, 40  # ask: how many, questions asked alone, tokens at most
SHAPE, LENGTH = "7b", 31000  # count: the model; tokens of a prompt and its answer
PLANS = (50, 1), (13, 4), (7, 8), (4, 13)  # count: records, and questions of each
BRANCH = 45  # count: tokens of a question and its answer
sides = {}  # what this process trains, by name


class Seal(speed.Seal):
    """What seal.py train does with the flags of --recipe, some steps at a time."""

    def __init__(self, args):
        parser = seal.Parser("--recipe")
        parser.add_flags(*seal.ASKED["commands"]["train"])
        with seal.blame("--recipe"):
            parser.set_defaults(seed=args.seed)
            found = vars(parser.parse_args(shlex.split(args.recipe)))
            found |= {"ckpt": args.ckpt, "dtype": args.dtype}
            seal.check_json(found, "flags.schema.json")
        self.flags = flags = seal.Flags(**found)
        self.model, self.tokenizer, facts, records = seal.prepare(flags)
        self.keep = save_on_cpu if flags.offload else nullcontext
        self.lr, self.work, self.saved = facts.lr, records * flags.epochs, None

    def train(self, until: int) -> list[float]:
        """Go on to this step, in the way that --resume does."""
        def save(losses, optimizer):
            self.saved = {"losses": losses, "optimizer": optimizer.state_dict()}

        if not self.saved:
            self.model.reset_scales(self.flags.mode)
        with self.keep():
            return seal.train(
                self.model, self.work[:until], self.lr, 1, self.flags.pull, self.saved, save)


class Peft(speed.Peft):
    """The same by transformers and peft, a prompt a step."""

    def __init__(self, args, work: list, recompute: bool):
        super().__init__(args.ckpt, args)
        self.work, self.losses = work, []
        if not recompute:
            self.model.gradient_checkpointing_disable()
            self.model.disable_input_require_grads()  # only checkpoints need these
        weights = self.model.parameters()  # those without a gradient stay as they are
        self.optimizer = torch.optim.AdamW(weights, lr=2e-2, weight_decay=0.0)

    def train(self, until: int) -> list[float]:
        for prompt, answer in self.work[len(self.losses) : until]:
            loss, _ = self.step(prompt, answer)
            self.optimizer.step()
            self.losses.append(loss)
        return self.losses


def start(name: str, prompt, kind, *inputs) -> dict:
    """Make a side in this process, and one step of it for the comparison."""
    side = sides[name] = kind(*inputs)
    with torch.no_grad():
        for weight in side.model.parameters():
            weight.sum()  # a mapped file counts once it is read
    loaded = speed.peak_memory("cpu")
    loss, gradients = side.step(*prompt)
    computed = torch.cat(gradients).float().tolist()
    found = {"steps": len(side.work), "GB after loading": loaded, "turns": []}
    return found | {"loss": loss, "computed": computed}


def timed(function, *inputs):
    """What the function gives, and its seconds by the clock and of the processor."""
    start, used = time.perf_counter(), time.process_time()
    result = function(*inputs)
    return result, {"s": time.perf_counter() - start, "processor s": time.process_time() - used}


def turn(name: str, until: int) -> dict:
    losses, took = timed(sides[name].train, until)
    return took | {"last loss": losses[-1], "GB at the peak": speed.peak_memory("cpu")}


def add_up(side: dict, *units) -> None:
    """Add what the last turn found, and what all of them took."""
    side |= side["turns"][-1]
    for unit in units:
        side[unit] = sum(turn[unit] for turn in side["turns"])


def train(args) -> dict:
    tokenizer = seal.Tokenizer(args.ckpt, seal.read_config(args.ckpt))
    records, questions = map(int, args.paper.split("x"))
    samples = seal.make_samples(
        "lines", tokenizer, args.paper_length, records, "train", args.seed, questions=questions)
    work = [tokenizer.pair(sample) for sample in samples]
    inputs = {
        "seal.py": (Seal, args),
        "peft": (Peft, args, work, True),
        "peft, nothing recomputed": (Peft, args, work, False),
    }
    run, found = {}, {}
    with ExitStack() as stack:
        for name, made in inputs.items():
            run[name] = stack.enter_context(Process(args.threads)).submit
            found[name] = run[name](start, name, work[0], *made).result()
            seal.note(f"{name}: {speed.agree(found['seal.py'], found[name], args)}")
        for i in range(1, ROUNDS + 1):
            for name, side in found.items():
                until = max(1, side["steps"] * i // ROUNDS)
                side["turns"].append(run[name](turn, name, until).result())
                seal.note(f"round {i} of {ROUNDS}, {name}: {side['turns'][-1]}")
    for side in found.values():
        del side["computed"], side["loss"]
        add_up(side, "s", "processor s")
        for unit in ("s", "processor s"):
            side[f"seal.py's {unit}, of these"] = found["seal.py"][unit] / side[unit]
    return found


def ask(args) -> dict:
    torch.set_num_threads(args.threads)
    flags = seal.Flags(ckpt=args.ckpt, scales=args.scales, dtype=args.dtype)
    model, tokenizer, _ = seal.open_checkpoint(flags)
    records = seal.make_records(
        "lines", tokenizer, [args.length], RECORDS, "eval", args.seed, questions=args.questions)
    alone, in_a_row, same = {"turns": []}, {"turns": []}, 0
    for record in records:
        texts, took = timed(seal.ask, model, tokenizer, record, NEW)
        in_a_row["turns"].append(took | {"questions": len(record)})
        # Not the first ones: a record's first question reads it in a row, too.
        for sample, text in list(zip(record, texts))[-ALONE:]:
            said, took = timed(seal.ask, model, tokenizer, [sample], NEW)
            alone["turns"].append(took | {"questions": 1})
            same += said == [text]
    alone["texts as in a row"] = same
    for side in alone, in_a_row:
        add_up(side, "questions", "s", "processor s")
        for unit in ("s", "processor s"):
            rate = side[f"questions a {unit}"] = side["questions"] / side[unit]
            side[f"times alone's, by {unit}"] = rate / alone[f"questions a {unit}"]
    return {"alone": alone, "in a row": in_a_row}


def products(a, b, **_) -> int:
    """Operations of attention's products: (batch, rows, inner) by (batch, inner, columns)."""
    batch, rows, inner = a
    whole = 2 * batch * rows * inner * b[2]
    *_, second, largest = sorted((rows, inner, b[2]))
    # Where the record sees itself, and only there, one matrix is square: half is masked.
    return whole // 2 if second == largest else whole


def operations(model: seal.Llama, record) -> int:
    """Of a step of training; the model's tensors may be without memory."""
    model.reset_scales("channel")
    halved = {torch.ops.aten.bmm: products}
    with FlopCounterMode(display=False, custom_mapping=halved) as counter:
        seal.backward(model, record)
    return counter.get_total_flops()


def peak(model: seal.Llama, record, keep=nullcontext()) -> float:
    """GB that live at once in a step of training."""
    model.reset_scales("channel")
    with Counter() as counter, keep:
        for weight in model.parameters():
            counter.add(weight.untyped_storage())
        seal.backward(model, record)
    return counter.peak / 2**30


def count(args) -> dict:
    sizes, found = dict(zip(shapes.NAMES, shapes.SHAPES[SHAPE])), {}
    # A tensor that is saved leaves the device, and another one comes back.
    offload = saved_tensors_hooks(
        lambda x: (x.shape, x.dtype), lambda about: torch.empty(about[0], dtype=about[1]))
    for records, questions in PLANS:
        with torch.device("meta"):  # shapes without memory
            model = seal.Llama(seal.Config(**sizes, head_dim=128)).bfloat16()
        record = []
        for i in range(questions):
            # An answer's last token is only foretold: it is in no sequence.
            prompt = [0] * (LENGTH - BRANCH) + [i + 1] * (BRANCH - speed.ANSWER + 1)
            record.append((prompt, [0] * speed.ANSWER))
        plan = found[f"{records} x {questions}"] = {"questions": records * questions}
        plan["operations"] = records * operations(model, record)
        plan["of 50 x 1"] = plan["operations"] / found["50 x 1"]["operations"]
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            for forward, name in ((pieces.forward, ", extras.pieces"), (pieces.plain_forward, "")):
                seal.FeedForward.forward = forward
                plan[f"GB at the peak of a step{name}"] = peak(model, record)
                plan[f"GB with --offload{name}"] = peak(model, record, offload)
    return found


def show(part: str, figures: dict) -> None:
    rows = {}
    for side in figures.values():
        for name in side:
            rows[name] = [name, *(other.get(name) for other in figures.values())]
    rows.pop("turns", None)
    print(f"\n{part}\n{tabulate(rows.values(), ['', *figures], floatfmt='.4g')}")


PARTS = {"train": train, "ask": ask, "count": count}


def main(arguments=None) -> None:
    parser = seal.Parser("extras.questions", description=__doc__.splitlines()[0])
    parser.set_defaults(what="train", device="cpu")  # extras.speed wants to know
    add = parser.add_argument
    add("parts", nargs="*", help=f"of {', '.join(PARTS)} (those that --json lacks)")
    add("--ckpt", help="train, ask: a Hugging Face folder")
    add("--json", default="questions.json", help="a file for the figures, by part")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0, help="draws the prompts")
    add("--recipe", default=RECIPE, help="train: flags of seal.py train")
    add("--paper", default="50x1", help="train: peft's records, and questions of each")
    add("--paper-length", type=int, default=700, help="train: tokens of peft's prompts")
    add("--questions", type=int, default=8, help="ask: of each record")
    add("--scales", help="ask: a file of scales")
    add("--length", type=int, default=2000)
    args = parser.parse_args(arguments)
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", args.paper):
        raise seal.UserError(f"--paper {args.paper}: is not like 50x1")
    if min(args.threads, args.questions, args.length, args.paper_length) < 1:
        raise seal.UserError("threads, questions and lengths must be 1 or more")
    stored = seal.read_json(seal.check_place(args.json))
    names = args.parts or [part for part in PARTS if part not in stored]
    if set(names) - set(PARTS):
        raise seal.UserError(f"{' '.join(names)}: parts are {', '.join(PARTS)}")
    if not args.ckpt and {"train", "ask"} & set(names):
        raise seal.UserError("--ckpt: train and ask need a checkpoint")
    about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.machine()}
    for package in ("torch", "transformers", "peft"):
        about[package] = version(package)
    for part in PARTS:
        if part in names:
            stored[part] = about | {"flags": vars(args), "figures": PARTS[part](args)}
            seal.write_json(args.json, stored)
        if part in stored:
            show(part, stored[part]["figures"])


if __name__ == "__main__":
    sys.exit(seal.exit_status("extras.questions", main))
