"""Folders that extras/convert.py makes of GGUF files and of Meta's releases. References: the
folders that the files were made from, transformers, llama.cpp."""

import random
from pathlib import Path

import gguf
import pytest
import sentencepiece
import torch
import transformers

import export_gguf
import seal
from extras import convert, meta
from extras.check import LlamaCpp
from extras.test_export import LLAMA3, MISTRAL, QWEN2, QWEN3, YARN, export
from extras.test_gguf import in_a_folder_of_its_own, rewritten  # noqa: F401
from extras.test_vocabulary import ADDED, STRAYS, strings
from test_seal import gap, load, logits, make, make_scales, reference, some_tokens
from test_seal import sp_model  # noqa: F401

TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}<|im_end|>{% endfor %}"


def converted(source) -> Path:
    out = Path(source).with_name(f"{Path(source).name}-hf")
    convert.main([str(source), "--out", str(out)])
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = seal.Weights(folder)
    return {name: found[name] for name in found.places}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --------------------------------------------------------------------------------------
# Of a GGUF file
# --------------------------------------------------------------------------------------

LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
LLAMA31 = LLAMA3 | {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}


@pytest.mark.parametrize("config", [
    {},
    {"attention_bias": True, "head_dim": 32},
    {"rope_parameters": LLAMA31},
    {"rope_parameters": YARN | {"rope_theta": 1e6}},
    {"rope_parameters": LINEAR},
    MISTRAL | {"tie_word_embeddings": True},
    QWEN2,
    QWEN3,
])
def test_a_folder_exported_and_converted_back_is_the_folder(config, monkeypatch):
    ends = {"bos_token_id": 0, "eos_token_id": 1, "rms_norm_eps": 1e-5}
    hints = {"chat_template": TEMPLATE}
    folder = make(Path("model"), "llama-bpe", hints=hints, **ends, **config)
    monkeypatch.setattr(convert, "SHARD", 50_000)
    monkeypatch.setattr(convert, "BLOCK", 300)
    export(folder, "model.gguf", "--outtype", "f32")
    back = converted("model.gguf")
    assert len(list(back.glob("*.safetensors"))) > 4
    assert_same(weights(back), weights(folder))
    assert seal.read_config(back) == seal.read_config(folder)
    assert (back / "chat_template.jinja").read_text() == TEMPLATE
    ours, theirs = seal.read_json(back / "config.json"), seal.read_json(folder / "config.json")
    for key in ("bos_token_id", "eos_token_id", "dtype", "tie_word_embeddings"):
        assert ours.get(key) == theirs.get(key)
    for name in reference(back).state_dict():  # transformers finds all, and no more
        assert name == "lm_head.weight" or name.removeprefix("model.") in weights(back)


@pytest.mark.parametrize("kind", [*export_gguf.PRE_TOKENIZERS, "sentencepiece"])
def test_the_tokenizer_gives_llama_cpps_ids(kind, sp_model):
    if kind == "sentencepiece":
        made = make(Path("model"), sp_model, hints={"added_tokens_decoder": ADDED})
    else:
        made = make(Path("model"), kind)
    export(made, "model.gguf", "--outtype", "f32")
    for i, change in enumerate(({}, {"add_bos_token": None}, {"add_space_prefix": False})):
        keys = {f"tokenizer.ggml.{key}": value for key, value in change.items()}
        file = rewritten("model.gguf", f"{i}.gguf", **keys)
        tokenizer = transformers.AutoTokenizer.from_pretrained(converted(file))
        llama = LlamaCpp(file)
        for number, text in enumerate(strings(300, without=STRAYS.get(kind, ""))):
            special = number % 2 == 0
            ids = tokenizer(text, add_special_tokens=special).input_ids
            assert ids == llama.tokenize(text, add_special=special), repr(text)


@pytest.fixture(scope="module")
def file(tmp_path_factory, sp_model) -> Path:
    """A GGUF file in float32 whose rows of 256 can be of any type; its folder beside it."""
    folder = make(tmp_path_factory.mktemp("file") / "model", "llama-bpe", hidden_size=256)
    export(folder, folder.with_name("model.gguf"), "--outtype", "f32")
    return folder.with_name("model.gguf")


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "Q2_K", "Q4_K_M", "IQ4_XS", "Q5_0"])
def test_every_type_is_read_as_transformers_reads_it(kind, file):
    path = Path("model.gguf")
    if kind.islower():
        export(file.with_name("model"), path, "--outtype", kind)
    else:
        from cyllama.llama import llama_cpp

        how = llama_cpp.LlamaModelQuantizeParams()
        how.ftype = int(gguf.LlamaFileType[f"MOSTLY_{kind}"])
        llama_cpp.disable_logging()
        llama_cpp.model_quantize(str(file), str(path), how)
    out, tokens = converted(path), some_tokens(90)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        ".", gguf_file="model.gguf", dtype=torch.float32)
    expected = logits(theirs, tokens)
    assert gap(logits(reference(out), tokens), expected) < 1e-4
    assert gap(logits(load(out, dtype=torch.float32), tokens), expected) < 1e-4
    exact = {"f16": "float16", "bf16": "bfloat16"}.get(kind, "float32")
    assert seal.read_json(out / "config.json")["dtype"] == exact


@pytest.mark.parametrize("keys, rope", [
    ({"scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),  # a file of 2023
    ({"scaling.type": "none", "scaling.factor": 4.0}, {"rope_type": "default"}),
    (
        {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.attn_factor": 1.5},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256,
         "attention_factor": pytest.approx(1.7079, abs=1e-4)},  # 1.5 (0.1 ln 4 + 1)
    ),
])
def test_how_positions_are_stretched_is_read(keys, rope, file):
    keys = {f"llama.rope.{key}": value for key, value in keys.items()}
    rewritten(file, "x.gguf", **keys)
    assert seal.read_config(converted("x.gguf")).rope_scaling == rope


def test_templates_with_names_and_the_scales_in_the_weights_are_kept(file, capsys):
    folder = file.with_name("model")
    config = seal.read_config(folder)
    make_scales(Path("s"), config, "head", "ntk:2")
    export(folder, "scaled.gguf", "--scales", "s")
    keys = {"": "{{ 1 }}", ".tool_use": "{{ 2 }}"}
    keys = {f"tokenizer.chat_template{name}": text for name, text in keys.items()}
    rewritten("scaled.gguf", "x.gguf", **keys)
    back = converted("x.gguf")
    hf = transformers.AutoTokenizer.from_pretrained(back)
    assert hf.chat_template == {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    (past,) = seal.read_json(back / "config.json")["seal"]
    assert (past["mode"], past["task"], past["extend"]) == ("head", "lines", "ntk:2")
    with pytest.raises(seal.UserError, match="already"):
        seal.read_scales("s", seal.read_config(back))
    keys["tokenizer.chat_template./x"] = "{{ 3 }}"
    rewritten("scaled.gguf", "y.gguf", **keys)
    assert "chat_template./x" in refused(capsys, "y.gguf")


# --------------------------------------------------------------------------------------
# Of Meta's release
# --------------------------------------------------------------------------------------


def release(folder: Path, sp_model: Path, files: int, **params) -> dict[str, torch.Tensor]:
    """A folder of Meta's kind, its matrices cut into files. Returns Hugging Face's weights."""
    make(folder, sp_model)
    (folder / "config.json").unlink()
    expected, slices = weights(folder), [{} for _ in range(files)]
    names = {}
    for name, (theirs, dim) in meta.NAMES.items():
        names[theirs] = name, dim
    for full, tensor in expected.items():
        *layer, name = full.removesuffix(".weight").split(".", 2)
        name, dim = names[name]  # Meta's, and along which dimension files hold slices
        if name in ("attention.wq", "attention.wk"):
            tensor = tensor.view(-1, 2, 8, 64).transpose(1, 2).reshape(tensor.shape)
        parts = [tensor] * files if dim is None else tensor.chunk(files, dim)
        for held, part in zip(slices, parts):
            held[".".join([*layer, name, "weight"])] = part.clone()
    for i, held in enumerate(slices):
        held["rope.freqs"] = torch.zeros(8)
        torch.save(held, folder / f"consolidated.{i:02}.pth")
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5}
    seal.write_json(folder / "params.json", sizes | params)
    return expected


@pytest.mark.parametrize("files, params, context, kind", [
    (1, {"norm_eps": 1e-6}, 2048, "default"),  # Llama 1
    (2, {"vocab_size": -1}, 4096, "default"),  # Llama 2, 13B
    (1, {"rope_theta": 1000000}, 16384, "default"),  # CodeLlama
    (1, {"rope_theta": 500000.0, "use_scaled_rope": True}, 131072, "llama3"),  # Llama 3.1
])
def test_metas_release(files, params, context, kind, sp_model, monkeypatch):
    monkeypatch.setattr(meta, "BLOCK", 300)
    expected = release(Path("meta"), sp_model, files, **params)
    out = converted("meta")
    assert_same(weights(out), expected)
    config = seal.read_config(out)
    assert (config.context, config.rope_scaling["rope_type"]) == (context, kind)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    tokenizer = seal.Tokenizer(out, config, "none")
    assert tokenizer.prompt("Hello 12") == [1, *pieces.encode("Hello 12")]


# --------------------------------------------------------------------------------------
# Mistakes and damage
# --------------------------------------------------------------------------------------


def refused(capsys, source, out="out") -> str:
    """The one line that is said of a source that is no good. Nothing is left behind."""
    before = set(Path().iterdir())
    capsys.readouterr()
    flags = [str(source), "--out", out]
    assert seal.exit_status("extras.convert", convert.main, flags) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert set(Path().iterdir()) == before
    return said


@pytest.mark.parametrize("key, new, words", [
    ("general.architecture", "falcon", "falcon"),
    ("split.count", 3, "llama-gguf-split"),
    ("tokenizer.ggml.pre", "../../x", "../../x"),
    ("tokenizer.ggml.model", "t5", "t5"),
    ("tokenizer.ggml.merges", ["Ġ t", "no one"], "vocabulary"),
    ("tokenizer.ggml.token_type", [1, 2], "shorter"),
    ("tokenizer.ggml.tokens", None, "tokens"),
    ("llama.block_count", 2_000_000_000, "2000000000 layers"),
    ("llama.block_count", 3, "layers.2"),
    ("llama.attention.head_count", 0, "x.gguf"),
    ("llama.attention.head_count", [4, 4], "head_count"),
    ("llama.attention.key_length", 2**31 - 1, "x.gguf"),
    ("llama.attention.key_length", 0, "x.gguf"),
    ("llama.context_length", None, "context_length"),
    ("llama.embedding_length", 255, "x.gguf"),
    ("llama.rope.scaling.type", "longrope", "longrope"),
    ("llama.attention.layer_norm_rms_epsilon", float("nan"), "epsilon"),
])
def test_what_is_wrong_in_a_file_is_one_line(key, new, words, file, capsys):
    keys = {key: new}
    if new == "longrope":
        keys["llama.rope.scaling.factor"] = 4.0
    rewritten(file, "x.gguf", **keys)
    assert words in refused(capsys, "x.gguf")


def test_damaged_files_and_wrong_places(file, capsys, monkeypatch):
    data, path = file.read_bytes(), Path("x.gguf")
    rng, end = random.Random(0), int(gguf.GGUFReader(file).data_offset)
    for _ in range(20):
        path.write_bytes(data[: rng.randrange(end)])
        refused(capsys, "x.gguf")
        start = rng.randrange(24, 2000)
        path.write_bytes(data[:start] + b"\xff" * 8 + data[start + 8 :])
        refused(capsys, "x.gguf")
    Path("there").mkdir()
    assert "there already" in refused(capsys, file, "there")
    assert "No such file" in refused(capsys, "none.gguf")
    assert "already" in refused(capsys, file.with_name("model"))
    assert "params.json" in refused(capsys, "there")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: usage)
    assert "GB are free" in refused(capsys, file)


def test_what_is_wrong_in_metas_release_is_one_line(sp_model, capsys):
    folder = Path("meta")
    release(folder, sp_model, 2)
    first = folder / "consolidated.00.pth"
    whole, tensors = first.read_bytes(), torch.load(first)
    torch.save(tensors | {"norm.weight": torch.zeros(3)}, first)
    assert "norm.weight" in refused(capsys, "meta")
    first.write_bytes(whole[:5000])
    assert first.name in refused(capsys, "meta")
    first.write_bytes(whole)
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    assert "Llama 3" in refused(capsys, "meta")
    seal.write_json(folder / "params.json", {"dim": 256, "n_layers": "2"})
    assert "n_layers" in refused(capsys, "meta")
