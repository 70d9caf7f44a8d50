"""The tests, also a set of worked examples: `python -m pytest -q` runs them all in a few minutes on two cores.

Nothing is downloaded. Checkpoints are small random models that transformers itself writes, so they have the layouts
real ones have; its logits, and llama.cpp's, are the references. The weights are drawn ten times larger than usual:
attention then is sharp, and a wrong position or a wrong scale shows in the logits.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers

import seal

torch.set_num_threads(1)  # models this small run faster so
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Shared by all tests
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory) -> Path:
    """A small tokenizer.model with Llama's settings: BPE, byte fallback, digits apart, a space put in front."""
    folder = tmp_path_factory.mktemp("vocabulary")
    rng = seal.random.Random(0)
    words = [seal.LINE.format(key=f"{rng.choice(seal.ADJECTIVES)}-{rng.choice(seal.NOUNS)}", number=rng.randint(1, 50000)) for _ in range(800)]
    text = [seal.RECORD, *words, *(seal.prose(rng) for _ in range(800))]
    (folder / "corpus.txt").write_text("\n".join(text))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=600, model_type="bpe", byte_fallback=True,
        split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )
    return folder / "tokenizer.model"


def make_checkpoint(folder, vocabulary, seed=0, bin=False, shard_size="5GB", model=transformers.LlamaForCausalLM, **config):
    """A random checkpoint as transformers writes it, and the transformers model; bin: in the older .bin layout."""
    torch.manual_seed(seed)
    small = dict(vocab_size=608, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                 max_position_embeddings=512, initializer_range=0.2)
    reference = model(model.config_class(**(small | config))).eval()
    reference.save_pretrained(folder, max_shard_size=shard_size)
    if bin:  # newer transformers only writes safetensors; the layout is the same but for names and pickling
        for file in sorted(Path(folder).glob("*.safetensors")):
            tensors = seal.Checkpoint.__new__(seal.Checkpoint)._open(file, lambda t: {name: get(name).clone() for name, get in t.items()})
            torch.save(tensors, file.with_name(file.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")))
            file.unlink()
        for index in Path(folder).glob("*.index.json"):
            text = index.read_text().replace("model-0", "pytorch_model-0").replace(".safetensors", ".bin")
            index.with_name("pytorch_model.bin.index.json").write_text(text)
            index.unlink()
    shutil.copy(vocabulary, Path(folder) / "tokenizer.model")
    return reference


def command(capsys, *arguments) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `python seal.py ...`, without paying for a new process each time."""
    capsys.readouterr()
    status = seal.run("seal.py", seal.parse, [str(a) for a in arguments])
    return status, *capsys.readouterr()
