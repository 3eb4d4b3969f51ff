"""A random target of a real model's shape, as a Hugging Face directory: bfloat16 weights, a byte-level tokenizer and a
chat template, all made from nothing. What it says is noise; what it costs is what the real one costs.

    python experiments/real_target/make_target.py llama-8b /tmp/llama-8b
    python experiments/real_target/make_target.py --list
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SHAPES = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
    },
    "llama-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
    },
    "llama-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    },
    "llama-32b": {  # the sizes of Qwen3-32B
        "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    },
}  # fmt: skip
SHARD_BYTES = 2_000_000_000
CONTROL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tensors(shape: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in the order of the layers."""
    width, inner, head = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    queries, keys = (shape[f"num_{kind}_heads"] * head for kind in ("attention", "key_value"))
    yield "model.embed_tokens.weight", (shape["vocab_size"], width)
    for i in range(shape["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}{norm}.weight", (width,)
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{layer}self_attn.{name}_proj.weight", (rows, width)
        yield f"{layer}self_attn.o_proj.weight", (width, queries)
        yield f"{layer}mlp.gate_proj.weight", (inner, width)
        yield f"{layer}mlp.up_proj.weight", (inner, width)
        yield f"{layer}mlp.down_proj.weight", (width, inner)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (shape["vocab_size"], width)


def write_weights(directory: Path, shape: dict[str, int]) -> int:
    """Shards of about 2 GB and their index; the number of bytes.

    Numbers are drawn once and taken from other places of the same stock for each tensor, since drawing 16 GB would take
    longer than everything that is measured with them.
    """
    stock = np.random.default_rng(0).normal(size=1 << 24).astype(np.float32)
    scaled: dict[int, np.ndarray] = {}
    where: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}
    total = 0

    def write() -> None:
        name = f"model-{len({*where.values()}):05d}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, name))
        shard.clear()

    for number, (name, dims) in enumerate(tensors(shape)):
        if len(dims) == 1:
            array = np.ones(dims, ml_dtypes.bfloat16)
        else:
            if dims[1] not in scaled:
                scaled[dims[1]] = (stock * dims[1] ** -0.5).astype(ml_dtypes.bfloat16)
            array = np.resize(np.roll(scaled[dims[1]], -7919 * number), dims)
        if shard and sum(each.nbytes for each in shard.values()) + array.nbytes > SHARD_BYTES:
            write()
        shard[name] = array
        total += array.nbytes
    write()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """One token a byte, and control tokens; the rest of the vocabulary is made of pairs of bytes that stand for nothing
    in particular, so that every id can be decoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*CONTROL, *alphabet]
    pairs = (a + b + c for a in alphabet for b in alphabet for c in alphabet)
    while len(names) < vocab_size:
        names.append(next(pairs))
    model = models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": CONTROL[0], "eos_token": CONTROL[2],
        "chat_template": TEMPLATE, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def make(name: str, directory: Path) -> int:
    """The whole directory; the number of bytes of its weights. What is there already is left alone."""
    shape, config = SHAPES[name], directory / "config.json"
    if config.exists():
        return json.loads((directory / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory, shape["vocab_size"])
    total = write_weights(directory, shape)
    about = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "rope_theta": 500000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "eos_token_id": CONTROL.index("<|im_end|>"), "bos_token_id": None, **shape,
    }  # fmt: skip
    config.write_text(json.dumps(about))  # last: a directory with it is complete
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES), nargs="?")
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("--list", action="store_true", help="the shapes, with the sizes of their weights")
    given = parser.parse_args()
    if given.list or given.directory is None:
        for name, shape in SHAPES.items():
            print(f"{name:12} {2 * sum(math.prod(dims) for _, dims in tensors(shape)) / 1e9:6.1f} GB")
    else:
        print(f"{make(given.shape, given.directory) / 1e9:.2f} GB in {given.directory}")
