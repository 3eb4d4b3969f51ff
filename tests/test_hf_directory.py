"""Model directories: slices of sharded and float8 weights, and every kind of damage named."""

import json
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_contracts import TARGET_HF
from tiny import random_weights
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.files.hugging_face import HFDirectory
from flaxdraft.files.safetensors_file import SafetensorsFile
from flaxdraft.interfaces import Batch
from flaxdraft.nn.precision import Precision
from flaxdraft.targets import from_pretrained, llama

CONFIG = TARGET_HF | {"num_hidden_layers": 8}


def weights():
    """Random weights of a tiny Llama in the file's names."""
    config = llama.Config.from_hf(CONFIG)
    return random_weights(llama, config, llama.groups(config, Precision(), Sharding.none()))


WEIGHTS = weights()


def write(directory, tensors=WEIGHTS, num_files=3, config=CONFIG):
    """A model directory in several files with an index, or in one."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if num_files == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    names, where = sorted(tensors), {}
    for i in range(num_files):
        file = f"model-{i + 1:05d}-of-{num_files:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::num_files]}
        save_file(part, directory / file)
        where |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return directory


def last_hidden(loaded):
    tokens = jnp.arange(12)[None] % 64
    ones = jnp.ones_like(tokens)
    return loaded.model.features(Batch(tokens, ones > 0, ones, jnp.arange(12)[None])).last_BTE


@pytest.mark.parametrize("num_files", [1, 3])
def test_every_slice_is_the_tensors_own(tmp_path, num_files):
    source = HFDirectory(write(tmp_path / "m", num_files=num_files))
    assert set(source.names()) == set(WEIGHTS)
    for name, want in WEIGHTS.items():
        assert source.shape(name) == want.shape
        index = tuple(slice(1, max(size // 2, 2)) for size in want.shape)
        np.testing.assert_array_equal(source.read(name, index), want[index])


def test_one_file_and_many_load_alike(tmp_path):
    one = from_pretrained(str(write(tmp_path / "one", num_files=1)))
    many = from_pretrained(str(write(tmp_path / "many")))
    for a, b in zip(jax.tree.leaves(one.model.state), jax.tree.leaves(many.model.state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.tokenizer is None


def write_fp8(path, tensors):
    """float8 tensors, which safetensors' numpy side cannot write."""
    kinds = {"float32": "F32", "float8_e4m3fn": "F8_E4M3"}
    header, data = {}, b""
    for name, array in tensors.items():
        content = array.tobytes()
        header[name] = {"dtype": kinds[array.dtype.name], "shape": array.shape,
                        "data_offsets": [len(data), len(data) + len(content)]}  # fmt: skip
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def quantise(weight, block):
    """float8 with one scale for each block; the last blocks of a row or column may be smaller."""
    scales = np.zeros([-(-n // b) for n, b in zip(weight.shape, block, strict=True)], np.float32)
    out = np.zeros(weight.shape, ml_dtypes.float8_e4m3fn)
    for i, j in np.ndindex(scales.shape):
        at = tuple(slice(k * b, (k + 1) * b) for k, b in zip((i, j), block, strict=True))
        scales[i, j] = np.abs(weight[at]).max() / 448
        out[at] = (weight[at] / scales[i, j]).astype(ml_dtypes.float8_e4m3fn)
    return out, scales


def fp8_directory(tmp_path, block=(12, 10)):
    directory, tensors, want = tmp_path / "fp8", {}, {}
    for name, weight in WEIGHTS.items():
        tensors[name] = want[name] = weight
        if "_proj" in name:
            tensors[name], scales = quantise(weight, block)
            tensors[name + "_scale_inv"] = scales
            spread = np.repeat(np.repeat(scales, block[0], 0), block[1], 1)[: weight.shape[0], : weight.shape[1]]
            want[name] = tensors[name].astype(np.float32) * spread
    directory.mkdir()
    write_fp8(directory / "model.safetensors", tensors)
    quantisation = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    (directory / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantisation}))
    return directory, want


def test_float8_slices_get_their_own_scales(tmp_path):
    directory, want = fp8_directory(tmp_path)
    source, rng = HFDirectory(directory), np.random.default_rng(0)
    assert not [name for name in source.names() if "scale_inv" in name]
    for name, weight in want.items():
        for _ in range(20):
            bounds = [sorted(rng.choice(size + 1, 2, replace=False)) for size in weight.shape]
            index = tuple(slice(int(a), int(b)) for a, b in bounds)
            np.testing.assert_array_equal(source.read(name, index), weight[index])
    loaded, plain = from_pretrained(str(directory)), from_pretrained(str(write(tmp_path / "want", want)))
    np.testing.assert_array_equal(last_hidden(loaded), last_hidden(plain))
    original = from_pretrained(str(write(tmp_path / "original")))
    assert float(jnp.abs(last_hidden(loaded) - last_hidden(original)).max()) > 1e-4  # float8 was really read


def test_float8_without_scales(tmp_path):
    directory, _ = fp8_directory(tmp_path)
    source = HFDirectory(directory)
    name = "model.layers.0.mlp.up_proj.weight"
    del source._files[name + "_scale_inv"]
    with pytest.raises(InputError, match=r"up_proj.weight is float8 and its scales .* are not there"):
        source.read(name, (slice(0, 2), slice(0, 2)))


@pytest.mark.parametrize(
    ("quantisation", "message"),
    [
        ({"quant_method": "awq"}, r"quant_method: found 'awq', only 'fp8'"),
        ({"quant_method": "fp8"}, r"weight_block_size: found None"),
    ],
)
def test_other_quantisations_are_refused_by_name(tmp_path, quantisation, message):
    with pytest.raises(InputError, match=message):
        HFDirectory(write(tmp_path / "m", config=CONFIG | {"quantization_config": quantisation}))


def damaged(directory, case):
    """One kind of damage; returns what the message must say."""
    index = directory / "model.safetensors.index.json"
    first = directory / "model-00001-of-00003.safetensors"
    where = json.loads(index.read_text())["weight_map"]
    tensor = next(name for name, file in where.items() if file == first.name)
    match case:
        case "cut data":
            first.write_bytes(first.read_bytes()[:-5])
            return r"00001-of-00003.safetensors: not a readable safetensors file .* lies at"
        case "cut header":
            first.write_bytes(first.read_bytes()[:40])
            return r"not a readable safetensors file \(40 bytes, a header of \d+ was announced"
        case "empty":
            first.write_bytes(b"")
            return r"not a readable safetensors file"
        case "file gone":
            first.unlink()
            return r"index.json: names model-00001-of-00003.safetensors, which is not there"
        case "index wrong":
            index.write_text(json.dumps({"weight_map": where | {tensor: "model-00002-of-00003.safetensors"}}))
            return rf"says that {tensor} is in model-00002"
        case "index no map":
            index.write_text("{}")
            return r"weight_map: expected a file name"
        case "tensor twice":
            save_file({tensor: WEIGHTS[tensor]}, directory / "extra.safetensors")
            index.write_text(json.dumps({"weight_map": where | {"other": "extra.safetensors"}}))
            return rf"{tensor} is in extra.safetensors and in model-00001"
        case "outside":
            index.write_text(json.dumps({"weight_map": where | {tensor: "../x.safetensors"}}))
            return r"names '../x.safetensors', which is outside"
        case "not safetensors":
            first.rename(directory / "model.bin")
            index.write_text(index.read_text().replace(first.name, "model.bin"))
            return r"names 'model.bin', which is .* no .safetensors file"
        case "config gone":
            (directory / "config.json").unlink()
            return r"config.json: cannot be read \(No such file"
        case "config broken":
            (directory / "config.json").write_text("{")
            return r"config.json: not valid JSON"
        case "config disagrees":
            (directory / "config.json").write_text(json.dumps(CONFIG | {"intermediate_size": 44}))
            return r"wrong shape: .*mlp.gate_proj.weight: found \(48, 32\), expected \(44, 32\).*more"
        case "more layers":
            (directory / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 9}))
            return r"missing: model.layers.8.input_layernorm.weight"
        case "fewer layers":
            (directory / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 7}))
            return r"unexpected: model.layers.7.input_layernorm.weight"
        case "architecture":
            (directory / "config.json").write_text(
                json.dumps(CONFIG | {"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2"})
            )
            return r"'Mamba2ForCausalLM' .*supported are .*Qwen3ForCausalLM.*new part of flaxdraft.targets"
        case "no weights":
            for path in directory.glob("*.safetensors*"):
                path.unlink()
            return r"holds neither model.safetensors nor model.safetensors.index.json"


CASES = ("cut data", "cut header", "empty", "file gone", "index wrong", "index no map", "tensor twice", "outside",
         "config gone", "config broken", "config disagrees", "more layers", "fewer layers", "architecture",
         "no weights", "not safetensors")  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_damage_is_named(tmp_path, case):
    directory = write(tmp_path / "m")
    message = damaged(directory, case)
    with pytest.raises(InputError, match=message):
        from_pretrained(str(directory))


def test_a_type_that_no_weight_has(tmp_path):
    tensors = WEIGHTS | {"model.norm.weight": WEIGHTS["model.norm.weight"].astype(np.int32)}
    with pytest.raises(InputError, match=r"model.norm.weight is stored as I32; expected one of BF16"):
        from_pretrained(str(write(tmp_path / "m", tensors)))


def test_a_tied_heads_copy_is_left_out(tmp_path, capsys):
    tensors = WEIGHTS | {"lm_head.weight": WEIGHTS["model.embed_tokens.weight"]}
    loaded = from_pretrained(str(write(tmp_path / "m", tensors)))
    np.testing.assert_array_equal(loaded.model.head(), WEIGHTS["model.embed_tokens.weight"])
    assert "differs" not in capsys.readouterr().out
    other = WEIGHTS | {"lm_head.weight": WEIGHTS["model.embed_tokens.weight"][::-1].copy()}
    loaded = from_pretrained(str(write(tmp_path / "other", other)))
    np.testing.assert_array_equal(loaded.model.head(), WEIGHTS["model.embed_tokens.weight"])
    assert "lm_head.weight differs from model.embed_tokens.weight" in " ".join(capsys.readouterr().out.split())


def save_tokenizer(directory, num_tokens):
    inner = Tokenizer(models.WordLevel({f"t{i}": i for i in range(num_tokens)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=inner, chat_template="{{ messages }}").save_pretrained(directory)


def test_the_tokenizer_comes_along(tmp_path):
    directory = write(tmp_path / "m")
    save_tokenizer(directory, 60)
    loaded = from_pretrained(str(directory))
    assert len(loaded.tokenizer) == 60
    assert loaded.tokenizer.chat_template == "{{ messages }}"
    save_tokenizer(directory, 65)
    with pytest.raises(InputError, match="the tokenizer has 65 tokens, the embedding 64 rows"):
        from_pretrained(str(directory))
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="its tokenizer cannot be read"):
        from_pretrained(str(directory))


def test_altered_headers_are_read_or_refused(tmp_path):
    """Every byte of the header changed, one at a time: the same entries, others inside the file, or an InputError."""
    path = tmp_path / "a.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}, path)
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    refused = 0
    for at in range(length):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            file = SafetensorsFile(path)
            for name in file.entries:
                file.read(name, ())
        except InputError:
            refused += 1
    assert refused > length // 3
