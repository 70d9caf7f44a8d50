"""A GGUF file run by llama.cpp beside the folder it was made from: tokens and logits.

    python -m extras.check llama-7b-seal-h-F32.gguf --ckpt llama-7b --scales scales.safetensors

Tokens: a prompt in the chat template must be cut as transformers' tokenizer cuts it,
and every added token in the middle of text must be one token. Logits: those after each
token of a prompt and of seal.py's own answer to it, beside seal.py's in float32 with
the scales on. An f32 file agrees; a quantised one differs by what its type rounds, and
by more, as llama.cpp then rounds activations to 8 bits, too.

`export_gguf.py --check` asks this of the file it has just written. Needs cyllama, a
compiled llama.cpp in a wheel: pip install cyllama
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

import seal
from seal import UserError

TEXT = "Below is a record:\nline torpid-kid: REGISTER_CONTENT is <24169>\n\n  ça va 日本語 🙂?"


def find_llama_cpp():
    try:
        from cyllama.llama import llama_cpp
    except ImportError as error:
        raise UserError("llama.cpp is missing: pip install cyllama") from error
    return llama_cpp


class LlamaCpp:
    """A GGUF file run by llama.cpp on the CPU, as exactly as it can.

    By default it keeps keys and values in 16 bits and rounds in its attention: logits of
    an f32 file then are 1e-2 from float32's, which hides mistakes. Here they are 1e-5.
    """

    def __init__(self, path, context: int = 512):
        cpp = find_llama_cpp()

        class Model(cpp.LlamaModel):
            @property
            def n_vocab(self):  # some releases ask a model for this without giving it
                return self.get_vocab().n_vocab

        cpp.disable_logging()
        params = cpp.LlamaModelParams()
        params.use_extra_bufts = False  # the weights stay in the file's form
        self.model = Model(str(path), params)
        self.batch = cpp.LlamaBatch(n_tokens=context, embd=0, n_seq_max=1)
        settings = cpp.LlamaContextParams()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        settings.type_k = settings.type_v = 0  # float32
        settings.flash_attn_type = 0
        self.context = cpp.LlamaContext(self.model, settings)

    def tokenize(self, text: str, add_special=False, parse_special=True) -> list[int]:
        return list(self.model.get_vocab().tokenize(text, add_special, parse_special))

    def logits(self, tokens: list[int]) -> Tensor:
        """tokens -> (T, V): the logits after each."""
        self.batch.reset()
        for position, token in enumerate(tokens):
            self.batch.add(token, position, [0], True)
        self.context.kv_cache_clear()
        self.context.decode(self.batch)
        return torch.tensor([self.context.get_logits_ith(i) for i in range(len(tokens))])


@torch.no_grad()
def check(path: Path, folder: Path, config: seal.Config, scales, facts) -> str:
    """How llama.cpp's reading of the file agrees with transformers and seal.py, in words.

    config: the folder's, extended as the file is. scales, facts: those that are folded
    into the file, or None. UserError where llama.cpp cuts text into other tokens.
    """
    template = "auto"
    if facts:
        template = facts.template
    tokenizer = seal.Tokenizer(folder, config, template)
    model = seal.load_model(folder, config, dtype=torch.float32)
    if scales:
        model.set_scales(scales)
    tokens = tokenizer.prompt(TEXT)
    tokens += seal.generate(model, tokens, 32)
    expected = model.logits(model(torch.tensor([tokens])))[0]  # (T, V)
    llama = LlamaCpp(path, context=len(tokens))
    found = llama.logits(tokens)                               # (T, V)
    same = int((found.argmax(-1) == expected.argmax(-1)).sum())
    gap = (found - expected).abs().max()
    result = f"{same} of {len(tokens)} next tokens are seal.py's, logits within {gap:.1e}"
    text = tokenizer.render(TEXT)
    if llama.tokenize(text) != tokenizer.encode(text):
        raise UserError(f"{path}: llama.cpp cuts {text!r} not as transformers does; {result}")
    begun = llama.tokenize("a", add_special=True)
    if begun != tokenizer.bos + llama.tokenize("a"):
        raise UserError(f"{path}: llama.cpp begins a text with other tokens; {result}")
    # More cannot be asked for: llama.cpp puts a space in front of the text after every
    # special token or after none, where transformers' Llama class does so at the start only.
    added = 0
    for word, i in tokenizer.hf.get_added_vocab().items():
        if i < tokenizer.vocab_size:
            added += 1
            if llama.tokenize(f"a{word}b").count(i) != 1:
                raise UserError(f"{path}: {word!r} is not one token in llama.cpp; {result}")
    return f"{result}; the prompt and {added} added tokens are cut as by transformers"


def main(arguments: list[str] | None = None) -> None:
    p = seal.Parser("extras.check", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", metavar="FILE.gguf", type=Path)
    p.add_argument("--ckpt", metavar="DIR", type=Path, default=seal.TOY)
    p.add_argument("--scales", metavar="PATH", help="those that are folded into the file")
    p.add_argument("--extend", metavar="KIND:S", help="the file's, if no scales say it")
    args = p.parse_args(arguments)
    config, scales, facts = seal.read_config(args.ckpt), None, None
    extension = args.extend or "none"
    if args.scales not in (None, "none"):
        scales, facts = seal.read_scales(args.scales, config)
        extension = facts.extend
    config = seal.extend(config, extension)
    with seal.blame(args.file):
        print(check(args.file, args.ckpt, config, scales, facts))


if __name__ == "__main__":
    sys.exit(seal.exit_status("extras.check", main))
