"""What a target's files say: end tokens, the parts of a split one, context, the head, the tokenizer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_chats import ASKS, BODY, HELLO, HI, IM, Kind, tokenizer_of
from small_targets import VOCAB, WIDTH, rows_at, said, target_at
from tiny import TEMPLATE, write_tiny_gguf
from tiny_runs import make_workspace

from flaxdraft import targets
from flaxdraft.config import load_config
from flaxdraft.data.__main__ import main
from flaxdraft.errors import InputError
from flaxdraft.files.fetch import content_of
from flaxdraft.files.gguf_file import GGUFCheckpoint
from flaxdraft.run.run import run
from flaxdraft.targets.__main__ import main as show_target

# End tokens.


def test_end_tokens_are_those_of_all_who_name_them(tmp_path):
    kind = Kind(named=False)
    ids = tokenizer_of(BODY + ASKS, IM, kind).get_vocab()
    path = target_at(tmp_path / "t", kind=kind, eos_token_id=[3, VOCAB + 5])
    assert targets.open_target(str(path)).stop_tokens == [3, ids["<eos>"]]  # what it has no row for it never writes
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids["<eos>"], ids["<|im_end|>"]]}))
    opened = targets.open_target(str(path))
    assert opened.stop_tokens == sorted([3, ids["<eos>"], ids["<|im_end|>"]])
    assert {*opened.special_tokens} >= {*opened.stop_tokens}
    for wrong in ({"eos_token_id": "<eos>"}, {"eos_token_id": [True]}):
        (path / "generation_config.json").write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=r"generation_config.json: eos_token_id: found"):
            targets.open_target(str(path)).stop_tokens  # noqa: B018
    (path / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config.json: not valid JSON"):
        targets.open_target(str(path)).stop_tokens  # noqa: B018


def without_eos(path: Path) -> Path:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path / name).exists():
            held = json.loads((path / name).read_text())
            held.pop("eos_token", None)
            (path / name).write_text(json.dumps(held))
    return path


def test_no_end_token_is_refused_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    path = without_eos(target_at(tmp_path / "t"))
    file = rows_at(tmp_path / "c.jsonl", {"messages": [HI, HELLO]})
    monkeypatch.setattr(targets, "load_target", lambda *args, **how: pytest.fail("it was loaded"))
    assert main(["regenerate", str(file), str(tmp_path / "out"), "--target", str(path)]) == 2
    assert "names no token that ends an answer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    root = make_workspace(tmp_path, without_eos(target_at(tmp_path / "deep", num_hidden_layers=8)))
    file.write_text("{}\n")  # nor are conversations read
    with pytest.raises(InputError, match="names no token that ends an answer"):
        run(load_config(str(root / "run.yaml"), [f"data.conversations={file}"]))


def gguf_with(path, monkeypatch, add=(), drop=()):
    """A tiny model with other metadata."""
    import gguf

    real = gguf.GGUFWriter.write_header_to_file

    def header(self, *args, **how):
        for name, value in add:
            getattr(self, name)(*value)
        return real(self, *args, **how)

    with monkeypatch.context() as patched:
        patched.setattr(gguf.GGUFWriter, "write_header_to_file", header)
        for name in drop:
            patched.setattr(gguf.GGUFWriter, name, lambda self, *args: None)
        return write_tiny_gguf(path, num_layers=1)


def test_gguf_ids(tmp_path, monkeypatch):
    more = (("add_eot_token_id", [0]), ("add_eom_token_id", [1]))
    assert targets.open_target(str(gguf_with(tmp_path / "a.gguf", monkeypatch, more))).stop_tokens == [0, 1, 2]
    less = ("add_pad_token_id", "add_bos_token_id", "add_eos_token_id", "add_chat_template", "add_token_types")
    tokenizer = GGUFCheckpoint(gguf_with(tmp_path / "b.gguf", monkeypatch, drop=less)).tokenizer()
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (None, None, None)
    assert tokenizer.chat_template is None
    none = [("add_uint32", (f"tokenizer.ggml.{name}_token_id", 2**32 - 1)) for name in ("bos", "padding")]
    without = gguf_with(tmp_path / "d.gguf", monkeypatch, none, less[:2])
    tokenizer = GGUFCheckpoint(without).tokenizer()  # -1, as llama.cpp writes what there is not
    assert (tokenizer.bos_token, tokenizer.pad_token) == (None, None)
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "tools"}]
    bare = gguf_with(tmp_path / "e.gguf", monkeypatch, drop=("add_tokenizer_model", "add_tokenizer_pre"))
    assert targets.open_target(str(bare)).tokenizer is None
    with pytest.raises(InputError, match=r"e.gguf has no tokenizer, .* give a file whose metadata hold it"):
        targets.open_target(str(bare)).needed_tokenizer()
    both = gguf_with(tmp_path / "c.gguf", monkeypatch, (("add_chat_template", [named]),), drop=())
    assert GGUFCheckpoint(both).tokenizer().chat_template == {"default": TEMPLATE, "tool_use": "tools"}


def test_gguf_parts(tmp_path):
    import gguf

    whole = write_tiny_gguf(tmp_path / "whole.gguf", num_layers=1)
    reader = gguf.GGUFReader(whole)
    names = [tensor.name for tensor in reader.tensors]
    for number in (1, 2):
        part = tmp_path / f"m-{number:05d}-of-00002.gguf"
        writer = gguf.GGUFWriter(part, "llama")
        if number == 1:
            for field in reader.fields.values():
                if not field.name.startswith(("GGUF.", "general.architecture")):
                    kind, *inner = field.types
                    writer.add_key_value(field.name, field.contents(), kind, inner[-1] if inner else None)
        writer.add_uint16("split.no", number - 1)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(names))
        for tensor in reader.tensors[number - 1 :: 2]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    one, parts = GGUFCheckpoint(whole), [GGUFCheckpoint(tmp_path / f"m-0000{n}-of-00002.gguf") for n in (1, 2)]
    for split in parts:
        assert (split.config, {*split.names()}) == (one.config, {*one.names()})
        for name in one.names():
            index = tuple(slice(None) for _ in one.shape(name))
            np.testing.assert_array_equal(split.read(name, index), one.read(name, index))
    first = tmp_path / "m-00001-of-00002.gguf"
    digest = content_of(str(first), None)
    second = tmp_path / "m-00002-of-00002.gguf"
    second.write_bytes(second.read_bytes()[:-1] + b"x")
    assert content_of(str(first), None) != digest
    shutil.copy(first, tmp_path / "renamed.gguf")
    with pytest.raises(InputError, match=r"renamed.gguf: is one of 2 parts, found 1; keep the names"):
        GGUFCheckpoint(tmp_path / "renamed.gguf")
    second.unlink()
    with pytest.raises(InputError, match=r"m-00002-of-00002.gguf is not beside it"):
        targets.open_target(str(first))


# The target itself.


def test_a_tied_head_that_differs_is_said(tmp_path, capsys):
    path = target_at(tmp_path / "t", tie_word_embeddings=True)
    embedding = np.arange(VOCAB * WIDTH, dtype=np.float32).reshape(VOCAB, WIDTH)
    for change, words in ((0.0, False), (1.0, True)):
        head = embedding.copy()
        head[-1, -1] += change
        save_file({"model.embed_tokens.weight": embedding, "lm_head.weight": head}, path / "model.safetensors")
        targets.say_which_head(targets.open_target(str(path)))
        assert ("lm_head.weight differs from model.embed_tokens.weight. The embedding is used" in said(capsys)) == words


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({}, 512),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 2048),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}}, 2048),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}, 512),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                           "original_max_position_embeddings": 64}}, 512),
    ],
)  # fmt: skip
def test_the_context_considers_rope_scaling(tmp_path, config, context):
    assert targets.open_target(str(target_at(tmp_path / "t", **config))).config().context == context


def test_rows_are_cut_at_the_targets_context(tmp_path, capsys):
    path = target_at(tmp_path / "t", max_position_embeddings=40)
    file = rows_at(tmp_path / "c.jsonl", {"messages": [HI, {**HELLO, "content": "hello " * 50}]})
    assert main(["show", str(file), "--target", str(path)]) == 0
    assert "1 rows, 40 tokens, 19 supervised; 1 rows cut at 40 tokens" in said(capsys)
    assert main(["check", str(file), "--target", str(path)]) == 0
    assert "cut 1 rows at 40 tokens" in said(capsys)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"max_position_embeddings": 16}, "--new-tokens: found 3; after the prompt (49 tokens) that leaves"),
        (
            {"template": "{{ raise_exception('never') }}"},
            "--prompt: the chat template refuses this conversation: never",
        ),
        ({"named": {"rag": BODY + ASKS}}, "several chat templates (rag) and none is called 'default'"),
    ],
)
def test_a_sample_is_refused_before_the_target_is_loaded(tmp_path, capsys, monkeypatch, how, words):
    monkeypatch.setattr(targets, "load_target", lambda *args, **how: pytest.fail("it was loaded"))
    assert show_target([str(target_at(tmp_path / "t", **how)), "--new-tokens", "3"]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("name", "text", "words"), [
    ("tiktoken.model", "YQ== 0\n", "TikTokenConverter("), ("qwen.tiktoken", "IQ== 0\nIg== 1\n", "TikTokenConverter("),
    ("tokenizer.model", "IQ== 0\n", "TikTokenConverter("),  # Llama 3's
    ("tokenizer.model", "\n\x05\n\x03<s>", "pip install sentencepiece"),
    ("sentencepiece.bpe.model", "\n\x05\n\x03<s>", "AutoTokenizer.from_pretrained("),
    ("tokenizer.model.v3", "\n\x05\n\x03<s>", "AutoTokenizer.from_pretrained("),
    ("tekken.json", "{}", "convert_tekken_tokenizer("), ("vocab.json", "{}", "AutoTokenizer.from_pretrained("),
])  # fmt: skip
def test_how_a_missing_tokenizer_is_made(tmp_path, capsys, name, text, words):
    path = target_at(tmp_path / "t")
    (path / "tokenizer.json").unlink()
    (path / name).write_text(text)
    assert main(["show", str(rows_at(tmp_path / "c.jsonl", {"messages": [HI]})), "--target", str(path)]) == 2
    error = capsys.readouterr().err
    assert "has no tokenizer" in error
    assert words in error
