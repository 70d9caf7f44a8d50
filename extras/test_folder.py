"""Tests of folders as people have them: read by seal.py, written by extras/folder.py."""

import random
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import export_gguf
import seal
from seal import UserError
from test_seal import EVAL, FOLD, LLAMA, LLAMA3, MISTRAL, QWEN2, TRAIN, YARN
from test_seal import change_json, change_weights, cli, ends_in_one_line, folder  # noqa: F401
from test_seal import gap, good, load, logits, make, make_scales, open_tokenizer  # noqa: F401
from test_seal import plain, reference, some_tokens, sp_model, store  # noqa: F401

# ---- Read ----------------------------------------------------------------------------


@pytest.mark.parametrize("older, newer", [
    ("30KB", "100KB"),
    ("100KB", "5GB"),
    ("5GB", "100KB"),
    ("5GB bin", "100KB"),
    ("100KB bin", "5GB"),
    ("30KB bin", "100KB bin"),
    ("100KB bin", "5GB bin"),
])
def test_of_older_and_newer_weights_those_that_transformers_takes_are_read(
    older, newer, sp_model, tmp_path
):
    for seed, stored in enumerate((older, newer)):
        source = make(tmp_path / stored, sp_model, seed=seed, shard_size=stored.split()[0])
        store(source, stored)
        shutil.copytree(source, tmp_path / "all", dirs_exist_ok=True)
    (tmp_path / "all/consolidated.safetensors").write_bytes(b"Mistral's own")
    ours, theirs = load(tmp_path / "all"), reference(tmp_path / "all")
    assert gap(logits(ours, some_tokens(9)), logits(theirs, some_tokens(9))) < 1e-4


@pytest.mark.parametrize("kind", ["", "bin"])
@pytest.mark.parametrize("index", [True, False])
def test_parts_need_no_index_and_a_part_that_is_not_there_is_named(
    index, kind, sp_model, tmp_path
):
    make(tmp_path, sp_model, shard_size="100KB")
    expected = logits(reference(tmp_path), some_tokens(9))
    store(tmp_path, kind)
    if not index:
        for path in tmp_path.glob("*.index.json"):
            path.unlink()
    assert gap(logits(load(tmp_path), some_tokens(9)), expected) < 1e-4
    _, second, *_ = sorted(tmp_path.glob("*-of-*"))
    second.unlink()
    with pytest.raises(UserError, match=second.name if index else "of.00005"):
        load(tmp_path)


def test_parts_of_two_sets_without_an_index_are_not_mixed(sp_model, tmp_path):
    for seed, size in enumerate(("30KB", "100KB")):
        make(tmp_path / size, sp_model, seed=seed, shard_size=size)
        shutil.copytree(tmp_path / size, tmp_path / "all", dirs_exist_ok=True)
    (tmp_path / "all/model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="-of-"):
        load(tmp_path / "all")


LAYER = r"(layers\.\d+\.)"


@pytest.mark.parametrize("pattern, wrapped", [
    ("^", "_orig_mod."),
    ("^", "module."),
    ("^", "_orig_mod.module."),
    ("^", "base_model.model."),
    ("^", "_fsdp_wrapped_module."),
    (LAYER, r"\1_checkpoint_wrapped_module."),
    (LAYER, r"\1_orig_mod."),
    (r"^model\.", ""),
])
def test_names_that_trainers_put_around_a_model_are_read(pattern, wrapped, folder):
    expected = logits(load(folder), some_tokens(9))

    def rename(weights):
        for name in list(weights):
            weights[re.sub(pattern, wrapped, name)] = weights.pop(name)

    change_weights(folder, rename)
    assert torch.equal(logits(load(folder), some_tokens(9)), expected)


def test_a_prefix_that_is_not_known_is_named(folder):
    change_weights(folder, lambda t: t.update({"teacher.norm.weight": torch.ones(64)}))
    with pytest.raises(UserError, match="teacher.norm.weight"):
        load(folder)


@pytest.mark.parametrize("wrap", [
    lambda t: t | {"step": 3, "config": {"lr": 0.1}},
    lambda t: {"model": t, "step": 3},
    lambda t: {"state_dict": t, "optimizer": {"state": [torch.ones(2)]}},
    lambda t: {"module": t, "dp_world_size": 8},
    lambda t: {"model_state_dict": t, "epoch": 1},
])
def test_a_bin_file_may_hold_more_than_tensors_and_they_may_stand_a_level_down(wrap, folder):
    expected, file = logits(load(folder), some_tokens(9)), folder / "pytorch_model.bin"
    store(folder, "bin")
    torch.save(wrap(torch.load(file)), file)
    assert torch.equal(logits(load(folder), some_tokens(9)), expected)


@pytest.mark.parametrize("content", [
    [1, 2], 3, {"epoch": 1}, {"model": 3}, {"model": {}, "args": random.Random()},
])
def test_a_bin_file_without_a_model_is_one_line(content, folder):
    store(folder, "bin")
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="copy"):
        load(folder)


@pytest.mark.parametrize("name, advice", [
    ("adapter", "merge_and_unload"),
    ("org/name", "download"),
    ("typing-error", "config.json"),
    ("model.gguf", "no GGUF file"),
    ("meta", "extras.convert"),
])
def test_what_is_no_checkpoint_is_said_with_what_to_do(name, advice, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    for file in ("adapter/adapter_config.json", "meta/params.json", "model.gguf"):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text("{}")
    status, out, err = cli("generate", "--ckpt", name, "--prompt", "a")
    assert (status, out) == (2, "")
    assert re.fullmatch(f"seal.py: error: {name}.*{advice}.*\n", err)


@pytest.mark.parametrize("model, keys", [
    (LLAMA, {"rope_parameters": YARN | {"truncate": True, "mscale_all_dim": 0.0}}),
    (LLAMA, {"rope_parameters": YARN | {"attention_factor": None, "beta_fast": 32}}),
    (LLAMA, {"rope_parameters": YARN, "partial_rotary_factor": 1.0}),
    (LLAMA, {"sliding_window": 32}),
    (LLAMA, {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0}),
    (LLAMA, {"mlp_bias": False, "pretraining_tp": 2, "attention_dropout": 0.1}),
    (QWEN2, {"use_sliding_window": False, "sliding_window": 32}),
    (QWEN2, {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}),
    (QWEN2, {"sliding_window": 32, "layer_types": ["full_attention"] * 2}),
    (MISTRAL, {"sliding_window": 256}),
    (MISTRAL, {"sliding_window": None}),
])
def test_keys_that_say_the_default_or_nothing_are_read(model, keys, sp_model, tmp_path):
    make(tmp_path, sp_model, model=model, sliding_window=None)
    change_json(tmp_path / "config.json", **{"layer_types": ...} | keys)
    expected = logits(reference(tmp_path), some_tokens(60))
    assert gap(logits(load(tmp_path), some_tokens(60)), expected) < 1e-4


@pytest.mark.parametrize("names", [..., None, [], ["LLaMAForCausalLM"]])
def test_config_json_is_read_as_people_write_it(names, folder):
    change_json(
        folder / "config.json", architectures=names, max_sequence_length=2048, head_dim=...)
    config = seal.read_config(folder)
    assert (config.context, config.head_dim) == (2048, 16)


@pytest.mark.parametrize("name", [
    "model/config.json", "model/model.safetensors", "model/tokenizer_config.json", "learned",
    "t.jsonl",
])
def test_damaged_files_are_read_or_refused_in_one_line(name, good):
    rng, path, refused = random.Random(name), Path(name), 0
    whole = path.read_bytes()
    for _ in range(30):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at, n = rng.randrange(min(len(data), 2000)), rng.choice([0, 1, 1, 9])
            damage = rng.choice([b"", b"0", b"-", b"null", b'"', b"}", b"9e9", b"\xff"])
            data[at : at + n] = damage
        path.write_bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])])
        try:
            config = seal.read_config("model")
            seal.read_scales("learned", config)
            seal.load_model("model", config)(torch.tensor([[1, 2]]))
            tokenizer = open_tokenizer("model")
            for sample in seal.make_samples("t.jsonl", tokenizer, 200, 9, "train"):
                sample.score("1")
        except UserError:
            refused += 1
    assert refused > 5


# ---- Written -------------------------------------------------------------------------


def fold_extended(folder: Path, cli, spec="ntk:2") -> Path:
    out, s = folder.with_name("folded"), folder.with_name("s")
    make_scales(s, seal.read_config(folder), "head", spec)
    status, _, err = cli("fold", "--ckpt", folder, "--scales", s, "--out", out)
    assert status == 0, err
    return out


SAID = "{% for m in messages %}{{ m.content }}{% endfor %}"
NAMED = {"default": SAID, "tool_use": "{{ tools }}"}


@pytest.mark.parametrize("where", ["tokenizer_config.json", "files"])
def test_named_chat_templates_are_kept_in_a_fold_and_the_default_is_used(where, folder, cli):
    if where == "files":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates/tool_use.jinja").write_text(NAMED["tool_use"])
        (folder / "chat_template.jinja").write_text(NAMED["default"])
    else:
        rows = [{"name": name, "template": text} for name, text in NAMED.items()]
        change_json(folder / where, chat_template=rows)
    theirs = transformers.AutoTokenizer.from_pretrained(fold_extended(folder, cli))
    assert theirs.chat_template == NAMED
    assert open_tokenizer(folder).render("Say hi") == "Say hi"


@pytest.mark.parametrize("spec, context", [("none", 256), ("ntk:2", 512), ("yarn:4", 1024)])
def test_lengths_that_cut_prompts_move_with_the_context(spec, context, folder, cli):
    change_json(folder / "tokenizer_config.json", model_max_length=256)
    change_json(folder / "generation_config.json", max_length=256)
    out = fold_extended(folder, cli, spec)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert len(theirs("long " * 2000, truncation=True).input_ids) == context
    assert transformers.GenerationConfig.from_pretrained(out).max_length == context
    assert seal.read_config(out).context == context
    assert reference(out).config.max_position_embeddings == context


def test_scales_are_folded_once_and_others_may_follow(good, cli):
    config, prints = seal.read_config("model"), []
    make_scales(Path("others"), config, "channel")
    for scales, ckpt, out in (("learned", "model", "once"), ("others", "once", "both")):
        assert cli("fold", "--ckpt", ckpt, "--scales", scales, "--out", out)[0] == 0
        prints.append(seal.read_scales(scales, config)[1].fingerprint)
    for ckpt in ("once", "both"):
        for command in ("fold --out again", "eval", "generate --prompt line"):
            ends_in_one_line(cli, f"{command} --ckpt {ckpt} --scales learned", "already")
        flags = ["--ckpt", ckpt, "--scales", "learned", "--outfile", "new.gguf"]
        assert seal.exit_status("export_gguf.py", export_gguf.main, flags) == 2
        assert not Path("new.gguf").exists()
    first, second = seal.read_json(Path("both/config.json"))["seal"]
    assert [first.pop("fingerprint"), second["fingerprint"]] == prints
    assert first == {"mode": "head", "task": "lines", "extend": "ntk:2"}


@pytest.mark.parametrize("line, room", [
    (FOLD, 10), (FOLD, 2000), (FOLD, 50_000), (TRAIN, 10), (EVAL, 10),
])
def test_a_disk_without_room_leaves_nothing_behind(line, room, good, cli):
    """Files may not grow beyond `room` bytes: the system refuses as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        ends_in_one_line(cli, line, "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_an_original_context_that_stands_outside_the_rope_is_the_one_that_counts(
    kind, sp_model, tmp_path  # noqa: F811
):
    rope = {"yarn": YARN, "llama3": LLAMA3}[kind]
    make(tmp_path, sp_model, rope_parameters=rope)
    change_json(tmp_path / "config.json", original_max_position_embeddings=16)
    expected = logits(reference(tmp_path), some_tokens(60))
    assert gap(logits(load(tmp_path), some_tokens(60)), expected) < 1e-4


def test_a_fold_says_that_its_scales_are_of_an_unfinished_run_and_lets_others_read(good, cli):
    Path("learned.state").touch()
    status, _, err = cli("fold", "--ckpt", "model", "--scales", "learned", "--out", "out")
    assert status == 0 and "--resume" in err
    modes = {path.stat().st_mode for path in Path("out").iterdir()}
    assert len(modes) == 1
