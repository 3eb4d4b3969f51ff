"""GGUF files: configuration, row order, tokenizer, and refusals of what cannot be read."""

import gguf
import numpy as np
import pytest
import tiny
from closeness import assert_close
from tiny import CONTROL, MERGES, permute, write_tiny_gguf
from tokenizers import pre_tokenizers

from flaxdraft.errors import InputError
from flaxdraft.files.gguf_file import _SPLITS, GGUFCheckpoint, unpermute
from flaxdraft.files.through_an_engine import THROUGH_AN_ENGINE
from flaxdraft.nn.rope import RopeConfig, inverse_frequencies

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 32, 4, 2, 64, 8
VOCAB = len(CONTROL) + 256 + len(MERGES)


@pytest.fixture(scope="module")
def checkpoint(tiny_gguf):
    return GGUFCheckpoint(tiny_gguf)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return checkpoint.tokenizer()


BASE = {
    "llama.context_length": 64, "llama.embedding_length": 16, "llama.block_count": 1,
    "llama.feed_forward_length": 24, "llama.attention.head_count": 4, "llama.vocab_size": 8,
}  # fmt: skip


def write_gguf(path, fields=(), tensors=("token_embd.weight",), stored_as=None):
    """A file with the fields that a configuration needs, but for those that are overridden (None leaves one out).

    Args:
        stored_as: a quantisation, of which each tensor then is one empty block.
    """
    fields = {**BASE, **dict(fields)}
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", "llama"))
    if "llama.attention.layer_norm_rms_epsilon" not in fields:
        writer.add_layer_norm_rms_eps(1e-6)
    for key, value in fields.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name in tensors:
        if stored_as is None:
            writer.add_tensor(name, np.arange(8 * 16, dtype=np.float32).reshape(8, 16))
        else:
            block = np.zeros((1, gguf.GGML_QUANT_SIZES[stored_as][1]), np.uint8)
            writer.add_tensor(name, block, raw_dtype=stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_configuration_has_hugging_face_names(checkpoint):
    assert checkpoint.config == {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN,
        "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HIDDEN // HEADS, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 128, "tie_word_embeddings": True,
    }  # fmt: skip


def test_absent_optional_fields_follow_the_others(tmp_path):
    config = GGUFCheckpoint(write_gguf(tmp_path / "a.gguf")).config
    assert (config["num_key_value_heads"], config["head_dim"], config["rope_theta"]) == (4, 4, 10000.0)
    assert config["rms_norm_eps"] == 1e-6


def test_a_head_of_its_own_unties(tmp_path):
    tied = GGUFCheckpoint(write_gguf(tmp_path / "tied.gguf"))
    untied = GGUFCheckpoint(write_gguf(tmp_path / "untied.gguf", tensors=("token_embd.weight", "output.weight")))
    assert (tied.config["tie_word_embeddings"], untied.config["tie_word_embeddings"]) == (True, False)
    assert untied.names() == ["model.embed_tokens.weight", "lm_head.weight"]


def test_names_are_those_of_the_hugging_face_checkpoint(checkpoint):
    layer = [
        "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
        "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ]  # fmt: skip
    want = {f"model.layers.{i}.{name}.weight" for i in range(LAYERS) for name in layer}
    assert set(checkpoint.names()) == want | {"model.embed_tokens.weight", "model.norm.weight"}
    assert len(checkpoint.names()) == len(want) + 2


@pytest.mark.parametrize(("num_heads", "width", "num_in"), [(1, 2, 3), (2, 4, 5), (4, 8, 32), (3, 6, 1)])
def test_unpermute_inverts_llama_cpps_row_order(num_heads, width, num_in):
    weight = np.arange(num_heads * width * num_in, dtype=np.float32).reshape(num_heads * width, num_in)
    mixed = permute(weight, num_heads)
    assert (width == 2) or not np.array_equal(mixed, weight)
    np.testing.assert_array_equal(unpermute(mixed, num_heads), weight)
    np.testing.assert_array_equal(permute(unpermute(weight, num_heads), num_heads), weight)


def test_neighbouring_rows_in_the_file_are_half_a_head_apart():
    file_rows = np.arange(8, dtype=np.float32)[:, None]  # one head of width 8
    assert unpermute(file_rows, 1)[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_only_queries_and_keys_are_reordered(checkpoint, tiny_gguf):
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tiny_gguf).tensors}

    def raw(name):
        tensor = stored[f"blk.3.{name}.weight"]
        return gguf.dequantize(tensor.data, tensor.tensor_type)

    def got(name):
        weight = checkpoint.read(f"model.layers.3.{name}.weight", ())
        assert weight.dtype == np.float32
        return weight

    for name, ours in (("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"), ("ffn_up", "mlp.up_proj"),
                       ("ffn_down", "mlp.down_proj"), ("attn_norm", "input_layernorm")):  # fmt: skip
        np.testing.assert_array_equal(got(ours), raw(name))
    for name, ours, heads in (("attn_q", "self_attn.q_proj", HEADS), ("attn_k", "self_attn.k_proj", KV_HEADS)):
        np.testing.assert_array_equal(permute(got(ours), heads), raw(name))
        assert not np.array_equal(got(ours), raw(name))


def test_a_part_of_a_tensor_is_that_part_of_all_of_it(checkpoint, monkeypatch):
    """Its rows alone are dequantised, wherever in the file they are."""
    sizes, real = [], gguf.dequantize
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "input_layernorm"):
        name = f"model.layers.3.{name}.weight"
        whole = checkpoint.read(name, ())
        index = (slice(3, 8), slice(2, 5))[: whole.ndim]
        monkeypatch.setattr(gguf, "dequantize", lambda *args: (out := real(*args), sizes.append(out.shape))[0])
        np.testing.assert_array_equal(checkpoint.read(name, index), whole[index])
        monkeypatch.setattr(gguf, "dequantize", real)
    assert sizes[:4] == [(5, HIDDEN)] * 4


def test_quantised_blocks_are_their_scale_times_small_integers(checkpoint, tiny_gguf):
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tiny_gguf).tensors}
    tensor = stored["blk.0.ffn_gate.weight"]
    assert tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
    blocks = np.asarray(tensor.data).reshape(-1, 34)  # a float16 scale, then 32 int8
    want = blocks[:, :2].copy().view(np.float16).astype(np.float32) * blocks[:, 2:].copy().view(np.int8)
    got = checkpoint.read("model.layers.0.mlp.gate_proj.weight", ())
    np.testing.assert_array_equal(got, want.reshape(FFN, HIDDEN))


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        " leading and  double",
        "naïve façade",
        "日本語 текст",
        "🙂👩‍👩‍👧",
        "a\n\tb\r\n",
        "\x00\x7f",
        "",
        "3.14 2024",
    ],
)
def test_text_survives_the_tokenizer(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert len(tokens) <= len(text.encode())


def test_merges_apply_in_their_order(tokenizer):
    # "a n" comes before "Ġ a" in the list, so it wins wherever both could apply.
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("and the and a")) == ["and", "Ġthe", "Ġ", "and", "Ġa"]


def test_digits_stand_alone_even_where_a_merge_would_join_them(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "MERGES", [*MERGES, "2 0", "Ġ 2"])
    tokenizer = GGUFCheckpoint(write_tiny_gguf(tmp_path / "a.gguf", num_layers=1)).tokenizer()
    assert "20" in tokenizer.get_vocab()
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("x 2024y")) == ["x", "Ġ", "2", "0", "2", "4", "y"]


def test_special_tokens_are_single_ids_and_drop_out_on_demand(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    tokens = tokenizer.encode("a<|im_end|>b")
    assert tokens[1] == 2
    assert len(tokens) == 3
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "ab"
    # A control token that has no role is still one token.
    assert tokenizer.encode("<|endoftext|>") == [0]
    assert set(tokenizer.all_special_ids) >= {1, 2}


def test_chat_template_is_the_files(tokenizer):
    messages = [{"role": "user", "content": "hi 12"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nhi 12<|im_end|>\n<|im_start|>assistant\n"
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokens == tokenizer.encode(text)
    assert [token for token in tokens if token < 3] == [1, 2, 1]
    assert tokenizer.model_max_length == 128


def test_truncated_files_are_refused_at_every_kind_of_place(tiny_gguf, tmp_path):
    whole = tiny_gguf.read_bytes()
    tensors_at = int(gguf.GGUFReader(tiny_gguf).data_offset)
    ends = np.random.default_rng(0).integers(24, len(whole), 12).tolist()
    for num in [0, 3, 4, 8, 12, 23, 24, 25, 500, tensors_at - 1, tensors_at, tensors_at + 1, *ends, len(whole) - 1]:
        path = tmp_path / f"{num}.gguf"
        path.write_bytes(whole[:num])
        with pytest.raises(InputError, match=rf"{num}.gguf: not a readable GGUF file .* truncated or altered"):
            GGUFCheckpoint(path)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("head", [b"", b"GGUF\x03\x00\x00\x00"], ids=["all", "after the version"])
def test_garbage_is_refused(tmp_path, seed, head):
    path = tmp_path / "garbage.gguf"
    path.write_bytes(head + np.random.default_rng(seed).bytes(4096))
    with pytest.raises(InputError, match=r"garbage.gguf: not a readable GGUF file"):
        GGUFCheckpoint(path)


def test_another_architecture_is_refused(tmp_path):
    path = write_tiny_gguf(tmp_path / "qwen.gguf", num_layers=1, architecture="qwen2")
    with pytest.raises(InputError, match=r"qwen.gguf: GGUF architecture 'qwen2' is not supported; supported: llama"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.x.attn_q.weight", "blk.0.ffn_gate_exps.weight"])
def test_an_unknown_tensor_is_named(tmp_path, name):
    path = write_gguf(tmp_path / "a.gguf", tensors=("token_embd.weight", name))
    with pytest.raises(InputError, match=f"a.gguf: unknown GGUF tensor '{name}'"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize(
    "key", ["llama.attention.head_count", "llama.embedding_length", "llama.block_count", "llama.context_length"]
)
def test_missing_metadata_are_named(tmp_path, key):
    with pytest.raises(InputError, match=f"a.gguf: the GGUF metadata have no '{key}'"):
        GGUFCheckpoint(write_gguf(tmp_path / "a.gguf", {key: None}))


def test_rope_scaling_is_refused_rather_than_dropped(tmp_path):
    with pytest.raises(InputError, match="GGUF rope scaling is not supported") as error:
        GGUFCheckpoint(write_gguf(tmp_path / "a.gguf", {"llama.rope.scaling.type": "linear"}))
    assert str(error.value).endswith(THROUGH_AN_ENGINE)


def test_a_type_that_the_gguf_package_cannot_read_is_named(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", stored_as=gguf.GGMLQuantizationType.Q8_K)
    checkpoint = GGUFCheckpoint(path)
    with pytest.raises(
        InputError, match=r"a.gguf: token_embd.weight is stored as Q8_K, which .* such as Q8_0"
    ) as error:
        checkpoint.read("model.embed_tokens.weight", ())
    assert str(error.value).endswith(THROUGH_AN_ENGINE)


def test_other_tokenizers_are_refused(tmp_path):
    fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "deepseek-llm"}
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "a.gguf", fields))
    with pytest.raises(InputError, match="tokenizer gpt2/deepseek-llm is not supported; supported: gpt2/smollm, gpt2"):
        checkpoint.tokenizer()


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [("smollm", ["1", "2", "3", "4"]), ("llama-bpe", ["123", "4"]), ("qwen2", ["1", "2", "3", "4"])],
)
def test_numbers_are_cut_as_each_tokenizer_cuts_them(pre, pieces):
    split = pre_tokenizers.Sequence(_SPLITS[pre])
    assert [piece for piece, _ in split.pre_tokenize_str("1234")] == pieces
    words = [piece for piece, _ in split.pre_tokenize_str("we're  here")]
    assert "".join(words) == "we're\u0120\u0120here"
    assert "'re" in words


K = gguf.GGMLQuantizationType


def write_one(path, raw, kind):
    """A file whose one tensor is a head stored as `kind`."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in BASE.items():
        writer.add_uint32(key, value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tensor("output.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", [K.F32, K.F16, K.BF16, K.Q4_0, K.Q4_1, K.Q5_0, K.Q5_1, K.Q8_0], ids=lambda k: k.name)
def test_every_simple_type_comes_back(tmp_path, kind):
    weight = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    source = GGUFCheckpoint(write_one(tmp_path / "a.gguf", gguf.quants.quantize(weight, kind), kind))
    assert source.shape("lm_head.weight") == (8, 64)
    got = source.read("lm_head.weight", (slice(1, 3), slice(None)))
    steps = {K.F32: 1e-7, K.F16: 1e-3, K.BF16: 8e-3, K.Q8_0: 1e-2}.get(kind, 0.15)
    assert_close(got, weight[1:3], rtol=steps)


@pytest.mark.parametrize("kind", [K.Q2_K, K.Q3_K, K.Q4_K, K.Q5_K, K.Q6_K], ids=lambda k: k.name)
def test_k_quants_are_read(tmp_path, kind):
    """Blocks of 256 of any content: the package that reads them knows no way to write them."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    raw = np.random.default_rng(0).integers(0, 60, (4, size), dtype=np.uint8)
    source = GGUFCheckpoint(write_one(tmp_path / "a.gguf", raw, kind))
    assert source.shape("lm_head.weight") == (4, 256)
    got = source.read("lm_head.weight", (slice(1, 2),))
    assert got.shape == (1, 256)
    assert np.isfinite(got).all()
    assert np.ptp(got) > 0


def test_llama3_rotary_scaling_is_recovered(tmp_path):
    config = {"head_dim": 64, "max_position_embeddings": 131072, "rope_theta": 5e5}
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    nowhere = np.zeros((1, 1), np.int32)
    plain, scaled = (inverse_frequencies(RopeConfig.from_hf(config | extra), 64, nowhere)
                     for extra in ({}, {"rope_scaling": scaling}))  # fmt: skip
    fields = {"llama.embedding_length": 256, "llama.rope.dimension_count": 64, "llama.context_length": 131072}
    for name, factors in (("good", plain / scaled), ("bad", np.linspace(1, 32, 32))):
        path = tmp_path / f"{name}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in (BASE | fields).items():
            writer.add_uint32(key, value)
        writer.add_rope_freq_base(5e5)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
        writer.add_tensor("output_norm.weight", np.ones(256, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    rope = RopeConfig.from_hf(GGUFCheckpoint(tmp_path / "good.gguf").config)
    assert (rope.rope_type, round(rope.factor, 3), rope.rope_theta) == ("llama3", 32.0, 5e5)
    with pytest.raises(InputError, match=r"bad.gguf: rope_freqs.weight is not Llama 3.1's rotary scaling") as error:
        GGUFCheckpoint(tmp_path / "bad.gguf")
    assert str(error.value).endswith(THROUGH_AN_ENGINE)


def altered(path, tiny_gguf, old: bytes, new: bytes):
    """The tiny file with one place of its metadata changed."""
    whole = tiny_gguf.read_bytes()
    assert len(old) == len(new)
    assert whole.count(old) >= 1
    path.write_bytes(whole.replace(old, new, 1))
    return path


def test_metadata_that_are_not_text_are_refused(tmp_path, tiny_gguf):
    path = altered(tmp_path / "a.gguf", tiny_gguf, b"<|endoftext|>", b"<|\xff\xfe\xff\xfeftext|>")
    with pytest.raises(InputError, match=r"a.gguf: not a readable GGUF file"):
        GGUFCheckpoint(path).tokenizer()


def test_merges_of_unknown_tokens_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "MERGES", [*MERGES])
    path = write_tiny_gguf(tmp_path / "whole.gguf", num_layers=1)
    broken = altered(tmp_path / "a.gguf", path, b"th e", b"tq e")
    with pytest.raises(InputError, match=r"a.gguf: its tokenizer cannot be built .*altered"):
        GGUFCheckpoint(broken).tokenizer()


@pytest.mark.parametrize(
    "fields",
    [
        {"llama.attention.head_count": 0},
        {"llama.attention.head_count": 3},
        {"llama.attention.head_count_kv": 0},
        {"llama.attention.head_count_kv": 3},
        {"llama.embedding_length": 18},
        {"llama.embedding_length": "wide"},
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(tmp_path, fields):
    with pytest.raises(InputError, match=r"a.gguf: .*altered"):
        GGUFCheckpoint(write_gguf(tmp_path / "a.gguf", fields))


@pytest.mark.parametrize("seed", range(30))
def test_an_altered_byte_of_the_metadata_is_read_or_refused(tmp_path, tiny_gguf, seed):
    whole = bytearray(tiny_gguf.read_bytes())
    at = int(np.random.default_rng(seed).integers(8, int(gguf.GGUFReader(tiny_gguf).data_offset)))
    whole[at] ^= 0xFF
    path = tmp_path / "a.gguf"
    path.write_bytes(whole)
    try:
        checkpoint = GGUFCheckpoint(path)
        checkpoint.tokenizer()
        for name in checkpoint.names():
            checkpoint.read(name, ())
    except InputError as error:
        assert "a.gguf" in str(error)  # noqa: PT017 (an altered byte may also do no harm)
