"""Folders as Hugging Face has them: a checkpoint again, with other weights.

    python seal.py fold --ckpt llama-7b --scales scales.safetensors --out llama-7b-seal

Used by seal.py's fold and by the extras that make checkpoints. A folder stands under its
name only when it is whole: it grows beside its place as .NAME.part.

Memory: the source's tensors are memory-mapped and stay in their files until they are
written. Only what a fold changes is in memory, the o_proj matrices.
"""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

import seal

SUFFIXES = (".json", ".jinja", ".model", ".txt")  # config, tokenizer and templates


def check_free(path) -> Path:
    """The path; UserError unless a folder can be made there: the check before the work."""
    path = Path(path)
    if os.path.lexists(path) or not path.parent.is_dir():
        raise seal.UserError(f"{path}: is there already, or in no folder; give another name")
    return path


@contextmanager
def new_folder(path):
    """Yield an empty folder; it is renamed to `path` when the block ends without an error.

    UserError at once if the place is taken, and for whatever goes wrong inside, in a
    line that begins with the path. What was written is then removed.
    """
    path = check_free(path)
    unfinished = path.with_name(f".{path.name}.part")
    try:
        with seal.blame(path):
            if unfinished.is_dir():  # left by a run that was killed
                shutil.rmtree(unfinished)
            unfinished.unlink(missing_ok=True)  # the same, but of a file of this name
            unfinished.mkdir()
            yield unfinished
            os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def full_name(name: str) -> str:
    """What transformers calls a tensor that has this name in seal.Llama."""
    return name if name == "lm_head.weight" else f"model.{name}"


def write_folder(out: Path, source, weights: dict[str, Tensor], changes: dict) -> None:
    """Write a checkpoint into the folder `out`: the source's small files, other weights.

    weights: tensors by the names that transformers uses, saved in shards of 5 GB.
    changes: {"config.json": {key: value}}, and so for each file of JSON that is to
    differ from the source's; the value None takes a key out.
    """
    from huggingface_hub import save_torch_state_dict  # slow to import

    source = Path(source)
    for file in [*source.iterdir(), *source.glob("additional_chat_templates/*")]:
        if file.suffix in SUFFIXES and ".index." not in file.name and not file.is_dir():
            copy = out / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
    for name, changed in changes.items():
        data = seal.read_json(source / name)
        for key, value in changed.items():
            data[key] = value
            if value is None:
                del data[key]
        seal.write_json(out / name, data)
    own = {}
    for name, tensor in weights.items():
        own[name] = tensor
        if tensor.untyped_storage().nbytes() > tensor.nbytes:
            own[name] = tensor.clone()  # a view, as in a .bin file, of what is no tensor here
    save_torch_state_dict(own, out)
    for file in out.glob("*.safetensors"):  # which safetensors lets nobody else read
        shutil.copymode(out / "config.json", file)


def write_folded(out, source, config: seal.Config, scales, facts: seal.Facts) -> None:
    """Write the checkpoint `source`, read as `config`, with the scales in its weights.

    Also what goes with them: their extension of the context, and what was folded, which
    config.json's "seal" remembers. Each matrix is made in float32 and rounded once, to
    its own type.
    """
    stretched = seal.extend(config, facts.extend)
    with new_folder(out) as folder:
        stored, weights = seal.Weights(source), {}
        stored.check(config)
        for name in tqdm(stored.places, "folding", leave=False):
            tensor = stored[name]
            weights[full_name(name)] = seal.fold(name, tensor, scales).to(tensor.dtype)

        past = seal.read_json(Path(source) / "config.json").get("seal", [])
        own = {key: getattr(facts, key) for key in ("fingerprint", "mode", "task", "extend")}
        changes = {"config.json": {
            "tie_word_embeddings": "lm_head.weight" not in weights, "seal": [*past, own],
        }}
        if stretched != config:
            changes["config.json"] |= stretch(source, stretched)
            changes |= longer_prompts(source, stretched.context)
        write_folder(folder, source, weights, changes)


def stretch(source, config: seal.Config) -> dict:
    """Keys of config.json for a longer context, as transformers 4 and 5 both read them."""
    keys = {
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "max_position_embeddings": config.context,
        "rope_parameters": None,
        "max_sequence_length": None,
    }
    if getattr(seal.from_transformers("AutoConfig", source), "sliding_window", None):
        keys["sliding_window"] = config.context  # it has to reach over all, as before
    return keys


def longer_prompts(source, context: int) -> dict:
    """Changes to the files that would cut prompts at the old context."""
    changes = {}
    for file, key in (
        ("tokenizer_config.json", "model_max_length"),
        ("generation_config.json", "max_length"),
    ):
        most = seal.read_json(Path(source) / file).get(key)
        if isinstance(most, (int, float)) and most < context:
            changes[file] = {key: context}
    return changes


def note_if_unfinished(scales, facts: seal.Facts) -> None:
    """A training that was interrupted leaves its state beside the scales."""
    if Path(f"{scales}.state").exists():
        seal.note(f"{scales}: of an unfinished run, {facts.steps} steps on {facts.samples} "
                  "prompts; the same train command with --resume goes on")


def command(flags: seal.Flags) -> None:
    """seal.py fold: an ordinary Hugging Face folder, the scales in its weights."""
    if Path(flags.ckpt).is_file():
        raise seal.UserError(f"{flags.ckpt}: is a file; export_gguf.py folds scales into it")
    config = seal.read_config(flags.ckpt)
    scales, facts = seal.read_scales(flags.scales, config)
    note_if_unfinished(flags.scales, facts)
    write_folded(flags.out, flags.ckpt, config, scales, facts)
    print(f"{flags.out}: {seal.METHOD[facts.mode]} folded into {len(scales)} layers")
