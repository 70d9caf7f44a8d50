"""--ckpt FILE.gguf: the numbers of the folder that extras.convert makes of the file."""

import gc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from torch._subclasses.fake_tensor import FakeTensorMode

import seal
from extras import gguf_model, speed_gguf
from extras import ruler
from extras.gguf_model import Packed, dequantize
from extras.test_convert import LLAMA31, converted
from extras.test_export import LLAMA3, QWEN2, QWEN3, YARN, export
from extras.test_gguf_file import in_parts
from extras.test_gguf import in_a_folder_of_its_own, source  # noqa: F401
from test_seal import gap, load, logits, make, some_tokens

WIDE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256}  # for blocks of 256


def opened(file):
    model, tokenizer, _ = seal.open_checkpoint(seal.Flags(ckpt=str(file)))
    return model, tokenizer


def converted_name(file) -> Path:
    return Path(f"{file}-hf")


def loss_and_slopes(model, prompt: list[int]) -> tuple[float, torch.Tensor]:
    """The loss of an answer, and its gradient by channel: (L, H * d)."""
    model.reset_scales("channel")
    loss = seal.answer_loss(model, [(prompt, [7, 8, 9])])
    slopes = torch.autograd.grad(loss, model.scales())
    return loss.item(), torch.stack(slopes)


def command(*arguments) -> int:
    return seal.exit_status("seal.py", seal.main, [str(a) for a in arguments])


def dequantisable() -> list[str]:
    """The types that the gguf package can read."""
    names = []
    for kind, (_, size) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
            names.append(kind.name)
        except NotImplementedError:
            continue
    return names


@pytest.mark.parametrize("name", dequantisable())
def test_every_type_is_dequantised_as_by_the_gguf_package(name):
    kind = GGMLQuantizationType[name]
    _, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(1).integers(0, 256, (6, 4 * size), np.uint8)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.dequantize(data, kind).copy())
        found = dequantize(torch.from_numpy(data), kind, torch.float32)
    finite = expected.isfinite()  # random bytes make some scales infinite
    assert torch.equal(found.isfinite(), finite) and finite.any()
    assert torch.equal(found[finite], expected[finite])


@pytest.mark.parametrize("kind, config", [
    ("Q4_1", {}),
    ("F16", {"tie_word_embeddings": True, "rope_parameters": LLAMA31}),
    ("BF16", {"attention_bias": True}),
    ("Q8_0", {"rope_parameters": YARN}),
    ("Q6_K", WIDE),
    ("Q4_0", QWEN2),
    ("Q8_0", QWEN3),
])
def test_logits_loss_gradients_and_answers_are_those_of_the_folder(kind, config):
    file = source(make(Path("model"), "llama-bpe", **config), "model.gguf", kind)
    packed, tokenizer = opened(file)
    plain = load(converted(file))
    theirs = seal.Tokenizer(converted_name(file), plain.config)
    assert packed.config == plain.config
    assert tokenizer.prompt("Say <n7>") == theirs.prompt("Say <n7>")
    prompt = some_tokens(30)
    assert gap(logits(packed, prompt), logits(plain, prompt)) < 1e-4
    assert seal.generate(packed, prompt, 8) == seal.generate(plain, prompt, 8)
    loss, slopes = loss_and_slopes(packed, prompt)
    expected, expected_slopes = loss_and_slopes(plain, prompt)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gap(slopes, expected_slopes) < 1e-4 * expected_slopes.abs().max()


def test_a_large_model_is_dequantised_in_pieces_to_the_same_numbers(monkeypatch):
    file = source(make(Path("model"), "llama-bpe", **WIDE), "model.gguf", "Q4_1")
    small, _ = opened(file)
    monkeypatch.setattr(gguf_model, "SMALL", 0)
    monkeypatch.setattr(gguf_model, "PIECE", 5 * 256)  # 5 rows, which divide no matrix
    large, _ = opened(file)
    for name, module in large.named_modules():
        if isinstance(module, Packed):
            expected = small.get_submodule(name).values()
            assert torch.equal(module.values(), expected)
    prompt = some_tokens(30)
    loss, slopes = loss_and_slopes(large, prompt)
    expected, expected_slopes = loss_and_slopes(small, prompt)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gap(slopes, expected_slopes) < 1e-4 * expected_slopes.abs().max()


def test_only_a_small_models_layers_keep_their_matrices_for_the_way_back(monkeypatch):
    folder = make(Path("model"), "llama-bpe", max_position_embeddings=1024)
    file, rooms = source(folder, "model.gguf", "Q4_1"), []

    def train(model, *rest):
        rooms.append(model.room)
        return [0.0]

    monkeypatch.setattr(seal, "train", train)
    for weights in 2**29, 0:  # of a model that is small
        monkeypatch.setattr(gguf_model, "SMALL", weights)
        command("train", "--ckpt", file, "--length", 600, "--samples", 1)
    assert rooms[0] > 0 == rooms[1]


def test_a_table_of_frequencies_that_no_folder_can_say_is_used_as_it_is():
    folder = make(Path("model"), "llama-bpe", rope_parameters=LLAMA3)
    file = source(folder, "model.gguf", "F32")
    packed, _ = opened(file)
    assert gap(logits(packed, some_tokens(60)), logits(load(folder), some_tokens(60))) < 1e-4
    with pytest.raises(seal.UserError, match="rope_freqs"):
        seal.open_checkpoint(seal.Flags(ckpt=str(file), extend="yarn:4"))


def test_training_keeps_no_matrix_in_another_form_than_the_files():
    file = source(make(Path("model"), "llama-bpe", **WIDE), "model.gguf", "Q8_0")
    model, tokenizer = opened(file)
    sample = seal.Sample("a b c", "d e f")
    packed = [module for module in model.modules() if isinstance(module, Packed)]
    assert len(packed) == 2 * 7 + 2
    seal.generate(model, some_tokens(5), 2)  # it is small: dequantised while it answers
    assert model.layers[0].mlp.up_proj.whole is not None
    seal.train(model, [[tokenizer.pair(sample)]], lr=0.01)
    gc.collect()
    sizes = {tuple(module.weight().shape) for module in packed}
    for x in gc.get_objects():
        if torch.is_tensor(x) and x.is_floating_point():
            assert tuple(x.shape) not in sizes
    for module in packed:
        assert module.data.dtype == torch.uint8


def test_the_commands_take_a_file_whatever_its_name_and_remember_it(capsys):
    folder = make(Path("model"), "llama-bpe", max_position_embeddings=1024)
    file = source(folder, "model.gguf", "Q4_1")
    blob = file.rename("sha256-0123")
    train = "--length 600 --samples 2 --mode channel --out s".split()
    assert command("train", "--ckpt", blob, *train) == 0, capsys.readouterr().err
    _, facts = seal.read_scales("s", seal.read_config(converted(blob)))
    assert facts.checkpoint == "sha256-0123"
    assert facts.steps == 2
    ask = "--scales s --lengths 600 --prompts 1 --max-new-tokens 3".split()
    assert command("eval", "--ckpt", blob, *ask, "--compare", "--json", "r.json") == 0
    assert seal.read_json("r.json")["ckpt"] == "sha256-0123"
    export(blob, "out.gguf", "--scales", "s")
    assert command("eval", "--ckpt", "out.gguf", *ask) == 2
    assert "already" in capsys.readouterr().err
    assert command("fold", "--ckpt", blob, "--scales", "s", "--out", "folder") == 2
    assert "export_gguf.py" in capsys.readouterr().err


def test_a_split_file_is_one_and_rulers_prompts_come_from_a_file_as_from_a_folder(capsys):
    folder = make(Path("model"), "llama-bpe", max_position_embeddings=4096)
    file = source(folder, "whole.gguf", "F16")
    whole, _ = opened(file)
    for part in in_parts(file):
        model, _ = opened(part)
        assert gap(logits(model, some_tokens(20)), logits(whole, some_tokens(20))) == 0
    for ckpt, out in ((file, "a.jsonl"), (converted(file), "b.jsonl")):
        ruler.main(["--ckpt", str(ckpt), "--task", "vt", "--samples", "1", "--out", out])
    assert Path("a.jsonl").read_text() == Path("b.jsonl").read_text()


BAD = {  # what is done to the bytes of a good file
    "cut off in its header": lambda data: data[:1000],
    "cut off": lambda data: data[: len(data) // 2],
    "no GGUF": lambda data: b"GGML" + data[4:],
    "a key missing": lambda data: data.replace(b"llama.block_count", b"llama.block_cound"),
    "a tensor missing": lambda data: data.replace(b"blk.1.attn_q.", b"blk.1.attn_x."),
    "no architecture": lambda data: data.replace(b"architecture", b"architecturf"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_file_is_one_line_that_names_it(fault, capsys):
    file = source(make(Path("model"), "llama-bpe"), "model.gguf", "F16")
    file.write_bytes(BAD[fault](file.read_bytes()))
    assert command("generate", "--ckpt", file, "--prompt", "a") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("seal.py: error: ") and "model.gguf" in last


def test_the_count_of_memory_adds_up_what_lives_at_the_same_time():
    with FakeTensorMode(), speed_gguf.Counter() as counter:
        first = torch.empty(1000)  # 4,000 bytes
        second = first[:500] * 2  # 2,000 more, where a view would be none
        del first
        torch.empty(300)
    assert counter.peak == 6000
    del second
    assert counter.live == {}


def test_the_speed_command_records_the_same_work_of_both_sides(monkeypatch):
    file = source(make(Path("model"), "llama-bpe"), "model.gguf", "Q4_1")
    monkeypatch.setattr(speed_gguf, "LENGTHS", (60,))
    monkeypatch.setattr(speed_gguf, "TURNS", 2)
    folder = str(converted(file))
    flags = "--parts step --json r.json --ckpt".split()
    speed_gguf.main([str(file), *flags, folder])
    found = seal.read_json("r.json")["step"]
    ours, theirs = found["turns at 60"][-1].values()
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["GB"] > ours["GB anonymous"] > 0.05
    assert found["ratio of s at 60"] == ours["s"] / theirs["s"]
