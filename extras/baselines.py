"""SEAL-L and SEAL-D, the paper's comparisons: LoRA and DoRA of rank 4 on q, k, v and o.

    python -m extras.baselines --ckpt llama-7b --method lora --out llama-7b-lora
    python seal.py eval --ckpt llama-7b-lora

The paper (section 4, table 1) trains them on the same 50 prompts as SEAL, at a learning
rate of 2e-4. A 7B then learns 4.2M numbers (LoRA: W + B A, with B A of rank 4) or 4.7M
(DoRA: the same, and the length of each row of the sum), where SEAL-H learns 1,024.

The adapters are the peft package's, on transformers' model; prompts, loss and loop are
seal.py's, and with --questions a record is read once here, too. The result is an ordinary
folder, the adapters merged into its weights, that every command takes as --ckpt. Prompts
it was trained on are drawn with the split "train", which no evaluation draws; a JSONL
file of yours has to be split by you.

The paper names no alpha; here it is the rank, so that LoRA's factor alpha / r is 1. On
the toy, at the end of its context, 32,768 numbers of LoRA answer 133 of 200 prompts and
36,864 of DoRA 137, where the base answers 101, and 32 numbers of SEAL-H 144 (seed 0).
"""

import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import seal
from extras.folder import check_free, full_name, new_folder, write_folder

METHOD = {"lora": "SEAL-L", "dora": "SEAL-D"}
RANK, LR = 4, 2e-4
FLAGS = "ckpt template task haystack length samples questions epochs lr device dtype seed out"
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Adapted(nn.Module):
    """transformers' model with peft's adapters, as seal.train expects a model.

    What is learned is called scales(), whatever it is.
    """

    def __init__(self, flags: seal.Flags, like: Tensor, method: str):
        """like: a tensor that says on which device and in which type."""
        super().__init__()
        import peft

        # transformers is about to rename this; peft asks for it by the old name.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing")
        base = seal.from_transformers("AutoModelForCausalLM", flags.ckpt).to(like.device)
        for weight in base.parameters():  # not the buffers: frequencies stay float32
            weight.data = weight.data.to(like.dtype)
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
        adapter = peft.LoraConfig(
            r=RANK, lora_alpha=RANK, use_dora=method == "dora", target_modules=ADAPTED
        )
        torch.manual_seed(flags.seed)  # draws LoRA's A; B is 0 at first
        self.model = peft.get_peft_model(base, adapter)
        self.model.train()  # without it nothing is recomputed; there is no dropout
        self.body, self.norm, self.lm_head = base.model, base.model.norm, base.lm_head

    def scales(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def forward(self, tokens: Tensor, branches=(1,)) -> Tensor:
        """tokens (B, T) -> what the output matrix reads, (B, T, D)"""
        more, T = {}, tokens.shape[1]
        if len(branches) > 1:  # one is plain causal attention, which is faster without a mask
            positions, mask = seal.arrange(0, T, branches)  # (T,), (R, T)
            seen = torch.ones(T, T, dtype=torch.bool).tril()
            seen[T - len(mask) :] = mask
            more["position_ids"] = positions[None].to(tokens.device)
            more["attention_mask"] = seen[None, None].to(tokens.device)
        return self.body(input_ids=tokens, use_cache=False, **more).last_hidden_state

    def logits(self, x: Tensor) -> Tensor:
        return self.lm_head(x).float()

    def adapters(self) -> dict[str, nn.Module]:
        """peft's modules, by what seal.Llama calls the weight that they change."""
        found = {}
        for name, module in self.body.named_modules():
            if hasattr(module, "lora_A"):
                found[f"{name}.weight"] = module
        return found


def merged(adapter: nn.Module, weight: Tensor) -> Tensor:
    """The files' weight with the adapter in it: made in float32 and rounded once."""
    adapter.to("cpu", torch.float32)
    adapter.get_base_layer().weight.data = weight.float()
    adapter.merge()
    return adapter.get_base_layer().weight.data.to(weight.dtype)


def merged_weights(ckpt, adapters: dict[str, nn.Module]) -> dict[str, Tensor]:
    """All weights of the checkpoint, those with an adapter merged, by their full names."""
    stored, weights = seal.Weights(ckpt), {}
    for name in stored.places:
        weight = stored[name]
        if name in adapters:
            weight = merged(adapters[name], weight)
        weights[full_name(name)] = weight
    return weights


def train(flags: seal.Flags, method: str) -> None:
    """Learn the adapters as `seal.py train` learns scales; write the merged folder."""
    if Path(flags.ckpt).is_file():
        raise seal.UserError(f"{flags.ckpt}: must be a folder (python -m extras.convert)")
    out = check_free(flags.out or f"{Path(flags.ckpt).resolve().name}-{method}")
    opened, _, _, records = seal.prepare(flags)  # says if anything is wrong
    like = opened.norm.weight
    del opened
    model = Adapted(flags, like, method)
    size = sum(p.numel() for p in model.scales())
    seal.note(f"{METHOD[method]}: {size:,} numbers, {len(records)} records")
    losses = seal.train(model, records, flags.lr or LR, flags.epochs)
    with new_folder(out) as folder:
        write_folder(folder, flags.ckpt, merged_weights(flags.ckpt, model.adapters()), {})
    print(f"{out}: {METHOD[method]}, {size:,} numbers merged, "
          f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")


def main(arguments=None) -> None:
    parser = seal.Parser("extras.baselines", description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHOD, required=True)
    parser.add_flags(FLAGS)
    chosen = vars(parser.parse_args(arguments))
    with seal.blame("flags"):
        seal.check_json(chosen, "flags.schema.json")
    method = chosen.pop("method")
    train(seal.Flags(**chosen), method)


if __name__ == "__main__":
    sys.exit(seal.exit_status("extras.baselines", main))
