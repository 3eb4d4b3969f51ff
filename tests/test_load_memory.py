"""Loading a large directory takes little more memory than what stays: the parts that the devices keep."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_contracts import TARGET_HF

ROOT = Path(__file__).parents[1]
NUM_FILES = 8
# At least 1 GB in bfloat16: 12 layers of 26 M weights, an embedding of 256 M.
LARGE = TARGET_HF | {
    "num_hidden_layers": 12, "hidden_size": 2048, "intermediate_size": 2560, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 65536, "tie_word_embeddings": False,
}  # fmt: skip

PROGRAM = """
import json, sys, threading, time
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
from flaxdraft.devices.mesh import make_mesh
from flaxdraft.files import streaming
from flaxdraft.nn.precision import Precision
from flaxdraft.targets import from_pretrained

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

shape, dtype = json.loads(sys.argv[2]), jnp.dtype(sys.argv[3])
if sys.argv[4] == "own":  # devices with memory of their own, which is the host's here
    streaming._on_host = lambda place: False
mesh = None if shape is None else make_mesh(*shape)
jnp.zeros(8).block_until_ready()  # the backend is part of the level
level, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
loaded = from_pretrained(sys.argv[1], precision=Precision(dtype, dtype), mesh=mesh)
done.set(); thread.join()
leaves = jax.tree.leaves(loaded.model.state)
parts = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
print(json.dumps({"peak": peak - level, "parts": parts, "largest": max(leaf.nbytes for leaf in leaves)}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Written tensor by tensor from one block of noise: the content does not matter here, the size does."""
    directory = tmp_path_factory.mktemp("large")
    c = LARGE
    heads, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    width, ffn = c["hidden_size"], c["intermediate_size"]
    layer = {
        "self_attn.q_proj": (heads, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, heads), "mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width),
        "mlp.down_proj": (width, ffn), "input_layernorm": (width,), "post_attention_layernorm": (width,),
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], width), "lm_head.weight": (c["vocab_size"], width),
              "model.norm.weight": (width,)}  # fmt: skip
    shapes |= {f"model.layers.{i}.{name}.weight": s for i in range(c["num_hidden_layers"]) for name, s in layer.items()}
    noise = np.random.default_rng(0).normal(size=1 << 20).astype(ml_dtypes.bfloat16)
    where = {}
    for i in range(NUM_FILES):
        file = f"model-{i + 1:05d}-of-{NUM_FILES:05d}.safetensors"
        part = {name: np.resize(noise, shapes[name]) for name in sorted(shapes)[i::NUM_FILES]}
        save_file(part, directory / file)
        where |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (directory / "config.json").write_text(json.dumps(LARGE))
    assert sum(path.stat().st_size for path in directory.glob("*.safetensors")) > 1e9
    return directory


def load(directory, mesh, dtype, memory):
    arguments = [str(directory), json.dumps(mesh), dtype, memory]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    print(mesh, {name: f"{value / 1e9:.2f} GB" for name, value in found.items()})
    assert found["parts"] > 1e9
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, [1, 8, 1, 1], [1, 2, 4, 1]], ids=str)
def test_peak_memory_above_the_level_after_imports(large, mesh):
    """CPU devices keep what the host makes."""
    found = load(large, mesh, "bfloat16", "host")
    assert found["peak"] <= 1.02 * found["parts"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, [1, 2, 4, 1]], ids=str)
def test_peak_memory_of_host_and_devices_together(large, mesh):
    """What is under way to devices is less than the largest tensor, in each of its two copies."""
    found = load(large, mesh, "float32", "own")
    assert found["peak"] <= found["parts"] + found["largest"]
