"""A tiny real target: a Llama GGUF with a byte-level tokenizer, and a prompts file for it."""

import json
from pathlib import Path

import gguf
import numpy as np
from flax import nnx
from tokenizers import pre_tokenizers

from flaxdraft.nn.precision import Precision
from flaxdraft.targets import decoder

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "th e", "a n", "an d", "Ġ a", "i n", "Ġ the"]
TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's row order for q and k (convert_hf_to_gguf.py, LlamaModel.permute)."""
    out, num_in = weight.shape
    return weight.reshape(num_heads, 2, out // num_heads // 2, num_in).swapaxes(1, 2).reshape(out, num_in)


def write_tiny_gguf(
    path: Path,
    *,
    seed=0,
    num_layers=8,
    hidden=32,
    heads=4,
    kv_heads=2,
    ffn=64,
    architecture="llama",
    final_norm_noise=0.0,
    template=TEMPLATE,
) -> Path:
    """Random weights of a scale that makes the next token depend on the text; Q8_0 feed-forward, float32 the rest."""
    tokens = [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(num_layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(template)

    rng = np.random.default_rng(seed)

    def normal(*shape):
        return (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)

    width = hidden // heads
    writer.add_tensor("token_embd.weight", rng.normal(size=(len(tokens), hidden)).astype(np.float32))
    noise = np.random.default_rng(seed + 1).normal(size=hidden)
    writer.add_tensor("output_norm.weight", (1 + final_norm_noise * noise).astype(np.float32))
    for i in range(num_layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", 1 + 0.1 * rng.normal(size=hidden).astype(np.float32))
        writer.add_tensor(f"blk.{i}.attn_q.weight", permute(normal(heads * width, hidden), heads))
        writer.add_tensor(f"blk.{i}.attn_k.weight", permute(normal(kv_heads * width, hidden), kv_heads))
        writer.add_tensor(f"blk.{i}.attn_v.weight", normal(kv_heads * width, hidden))
        writer.add_tensor(f"blk.{i}.attn_output.weight", normal(hidden, heads * width))
        for name, shape in (("ffn_gate", (ffn, hidden)), ("ffn_up", (ffn, hidden)), ("ffn_down", (hidden, ffn))):
            packed = gguf.quants.quantize(normal(*shape), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"blk.{i}.{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_weights(family, config, groups) -> dict[str, np.ndarray]:
    """Of a target, in the file's names, of a scale that makes every part count."""
    _, abstract = decoder.abstract_state(config, groups, Precision())
    shapes = {"/".join(map(str, path)): variable.shape for path, variable in nnx.to_flat_state(abstract)}
    spans = {group.name: group.layers for group in groups}
    rng, out = np.random.default_rng(0), {}
    for path, template, how in family.name_table(config):
        shape = shapes[path][("{i}" in template) + ("{e}" in template) :]
        for i in spans[path.split("/")[0]] if "{i}" in template else [0]:
            for e in range(family.num_experts(config)) if "{e}" in template else [0]:
                noise = rng.normal(size=shape[::-1] if how == "transpose" else shape).astype(np.float32)
                scaled = (
                    1 + 0.2 * noise if path.endswith("scale") else (noise / np.sqrt(noise.shape[-1])).astype(np.float32)
                )
                out[template.replace("{i}", str(i)).replace("{e}", str(e))] = scaled
    return out


def write_prompts(path: Path, num_train: int = 10, num_held_out: int = 4) -> Path:
    """Short prompts of different lengths."""
    rows = [
        {
            "id": f"{split}-{i}",
            "category": ("odd", "even")[i % 2],
            "split": split,
            "prompt": f"{split} prompt {'and the ' * (i % 4)}{i}",
        }
        for split, num in (("train", num_train), ("held_out", num_held_out))
        for i in range(num)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
