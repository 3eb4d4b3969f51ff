"""A family of another package goes through the same door as ours, against numpy written out a token at a time."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdraft import targets
from flaxdraft.decode.generation import generate
from flaxdraft.decode.tree import Tree
from flaxdraft.devices.mesh import make_mesh
from flaxdraft.errors import InputError
from flaxdraft.files.safetensors_file import save_safetensors
from flaxdraft.interfaces import Batch
from flaxdraft.targets import decoder, target_attention

INSTALLED = Path(__file__).parent / "installed"  # as site-packages has it: the module, and its metadata
V, E, F, L, N, K, H, WINDOW, TAPS = 40, 16, 24, 4, 4, 2, 8, 2, (0, 3)
HF = {
    "architectures": ["SandwichForCausalLM"], "model_type": "sandwich", "vocab_size": V, "hidden_size": E,
    "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": N, "num_key_value_heads": K, "head_dim": H,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 64, "tie_word_embeddings": True,
    "sliding_window": WINDOW, "query_pre_attn_scalar": 5.0,
}  # fmt: skip
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def weights():
    """In the file's names, of a scale that makes every part count."""
    rng = np.random.default_rng(0)
    kernel = lambda out, num_in: (rng.normal(size=(out, num_in)) / np.sqrt(num_in)).astype(np.float32)  # noqa: E731
    norm = lambda: (1 + 0.2 * rng.normal(size=E)).astype(np.float32)  # noqa: E731
    tensors = {"model.embed_tokens.weight": rng.normal(size=(V, E)).astype(np.float32), "model.norm.weight": norm()}
    shapes = {"self_attn.q_proj": (N * H, E), "self_attn.k_proj": (K * H, E), "self_attn.v_proj": (K * H, E),
              "self_attn.o_proj": (E, N * H), "mlp.gate_proj": (F, E), "mlp.up_proj": (F, E),
              "mlp.down_proj": (E, F)}  # fmt: skip
    for i in range(L):
        layer = f"model.layers.{i}."
        tensors |= {f"{layer}{name}.weight": kernel(*shape) for name, shape in shapes.items()}
        tensors |= {f"{layer}{name}.weight": norm() for name in NORMS}
        tensors[layer + "self_attn.sinks"] = rng.normal(size=N).astype(np.float32)
    return tensors


WEIGHTS = weights()


def rms(x, name):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + HF["rms_norm_eps"]) * WEIGHTS[name].astype(np.float64)


def rotated(x_TNH):
    angle = np.arange(len(x_TNH))[:, None] / 1e4 ** (np.arange(0, H, 2) / H)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = np.split(x_TNH, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attended(x_TE, i):
    """One layer's attention, a row and a head at a time."""
    layer, num = f"model.layers.{i}.self_attn.", len(x_TE)
    project = lambda p, heads: (x_TE @ WEIGHTS[f"{layer}{p}_proj.weight"].T).reshape(num, heads, H)  # noqa: E731
    q, k, v = rotated(project("q", N)), rotated(project("k", K)), project("v", K)
    out = np.zeros((num, N, H))
    for t in range(num):
        first = max(t - WINDOW + 1, 0) if i % 2 else 0
        for n in range(N):
            scores = k[first : t + 1, n * K // N] @ q[t, n] * HF["query_pre_attn_scalar"] ** -0.5
            share = np.exp(np.append(scores, WEIGHTS[layer + "sinks"][n]))
            out[t, n] = (share / share.sum())[:-1] @ v[first : t + 1, n * K // N]
    return out.reshape(num, -1) @ WEIGHTS[layer + "o_proj.weight"].T


def reference(tokens):
    """Of one text: taps [T, K, E], last [T, E], logits [T, V]."""
    x, taps = WEIGHTS["model.embed_tokens.weight"][tokens].astype(np.float64) * np.sqrt(E), []
    for i in range(L):
        layer = f"model.layers.{i}."
        names = [f"{layer}{name}.weight" for name in NORMS]
        x = x + rms(attended(rms(x, names[0]), i), names[1])
        inner = rms(x, names[2])
        gate, up, down = (WEIGHTS[f"{layer}mlp.{p}_proj.weight"].T for p in ("gate", "up", "down"))
        gated = inner @ gate
        x = x + rms((gated / (1 + np.exp(-gated)) * (inner @ up)) @ down, names[3])
        taps += [x] if i in TAPS else []
    last = rms(x, "model.norm.weight")
    return np.stack(taps, axis=1), last, last @ WEIGHTS["model.embed_tokens.weight"].T


def check(features, row, rows, tokens, at=slice(None)):
    """Rows `rows` of a batch row are the reference's at those places of a text."""
    taps, last, logits = (x[at] for x in reference(tokens))
    got = jax.tree.map(lambda x: np.asarray(x)[row, rows], features)
    np.testing.assert_allclose(got.taps_BTKE, taps, atol=5e-5)
    np.testing.assert_allclose(got.last_BTE, last, atol=5e-5)
    np.testing.assert_allclose(got.logsumexp_BT, np.log(np.exp(logits).sum(-1)), atol=5e-5)
    np.testing.assert_array_equal(got.argmax_BT, logits.argmax(-1))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """As Hugging Face has it."""
    path = tmp_path_factory.mktemp("sandwich")
    (path / "config.json").write_text(json.dumps(HF))
    save_safetensors(path / "model.safetensors", WEIGHTS)
    return str(path)


@pytest.fixture(scope="module")
def installed():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(INSTALLED)
        yield


@pytest.fixture(scope="module")
def target(installed, directory):
    return targets.from_pretrained(directory, tap_layers=TAPS).model


TOKENS = np.random.default_rng(1).integers(0, V, 19).astype(np.int32)
SIZES = (7, 9)  # of two packed documents; the rest is padding
PACKED = Batch(
    TOKENS[None], np.zeros((1, 19), bool), np.repeat([1, 2, 0], (*SIZES, 3))[None].astype(np.int32),
    np.concatenate([np.arange(7), np.arange(9), np.zeros(3)])[None].astype(np.int32),
)  # fmt: skip


def test_it_is_not_there_unless_installed(directory):
    with pytest.raises(InputError, match=r"'SandwichForCausalLM' .* is not supported"):
        targets.open_target(directory)


def check_packed(features):
    check(features, 0, slice(0, 7), TOKENS[:7])
    check(features, 0, slice(7, 16), TOKENS[7:16])


def grown(target):
    """Twelve tokens, then a tree of seven nodes: their features, the tree, and the token of each node."""
    cache, prompt = target.new_cache(1, 24), np.arange(12, dtype=np.int32)[None]
    cache, first = target.extend(cache, TOKENS[None, :12], prompt, "all")
    tree = Tree((2, 1, 1))
    positions, placement = tree.place(jnp.full(1, 12), slice(None), 24)
    return first, target.extend(cache, TOKENS[None, 12:], positions, "all", placement)[1], tree


def check_grown(first, nodes, tree):
    check(first, 0, slice(0, 12), TOKENS[:12])
    for node in range(7):
        path = [12 + other for other in range(7) if tree.sees_NN[node, other]]
        check(nodes, 0, slice(node, node + 1), TOKENS[[*range(12), *path]], slice(-1, None))


def test_packed_rows(target):
    check_packed(target.features(PACKED))


def test_a_cache_and_a_tree(target):
    check_grown(*grown(target))


def test_in_chunks(target, monkeypatch):
    """Small ones, so that a window leaves some out."""
    monkeypatch.setattr(target_attention, "DENSE_SCORES", 0)
    monkeypatch.setattr(target_attention, "CHUNKS", target_attention.range_attention.Chunks(4, 2))
    decoder._forward.clear_cache()
    check_packed(target.features(PACKED))
    slots = np.where(np.arange(19) < 17, np.arange(19), 24)[None].astype(np.int32)
    features = target.extend(target.new_cache(1, 24), TOKENS[None], slots, "all")[1]
    decoder._forward.clear_cache()
    check(features, 0, slice(0, 17), TOKENS[:17])


def test_over_four_devices(installed, directory):
    mesh = make_mesh(fsdp=2, tensor=2)
    target = targets.from_pretrained(directory, tap_layers=TAPS, mesh=mesh).model
    assert target.state["layers"]["sinks"][...].addressable_shards[0].data.shape == (L, N // 2)
    twice = lambda x: np.concatenate([x, x])  # noqa: E731
    features = target.features(jax.tree.map(twice, PACKED))
    check_packed(jax.tree.map(lambda x: x[1:], jax.device_get(features)))
    cache, prompt = target.new_cache(2, 24), twice(np.arange(12, dtype=np.int32)[None])
    cache, _ = target.extend(cache, twice(TOKENS[None, :12]), prompt, "end")
    positions, placement = Tree((2, 1, 1)).place(jnp.full(2, 12), slice(None), 24)
    nodes = target.extend(cache, twice(TOKENS[None, 12:]), positions, "all", placement)[1]
    check(nodes, 1, slice(6, 7), TOKENS[[*range(13), 14, 16, 18]], slice(-1, None))


def test_greedy_answers(target):
    prompts = [TOKENS[:5].tolist(), TOKENS[5:14].tolist()]
    answers = generate(target, prompts, max_new_tokens=6, stop_tokens=())
    for prompt, answer in zip(prompts, answers, strict=True):
        text = list(prompt)
        for _ in range(6):
            text.append(int(reference(text)[2][-1].argmax()))
        assert list(answer) == text[len(prompt) :]
