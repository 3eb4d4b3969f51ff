"""A target whose next token is mostly a fixed map of its last one, and drafts that know the map but no context.

They agree often and not always, so runs of every length are accepted. The drafts are written by hand: each attends to
its own row alone (a constant feature that the rotary embedding turns), replaces its hidden state by the embedding of
the newest token, and reads the target's head. Whoever feeds them a wrong token or position, or swaps their norms,
loses the agreement.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from test_contracts import TARGET_HF

from flaxdraft.drafts import llama, mla
from flaxdraft.interfaces import VocabMap
from flaxdraft.mesh import Sharding
from flaxdraft.nn import decoder
from flaxdraft.precision import Precision
from flaxdraft.targets import llama as llama_target

V, D = 64, 32
HEADS, WIDTH = 4, 8
VOCAB = VocabMap(np.delete(np.arange(V), np.arange(5, V, 9)), V)  # some tokens can never be drafted


def make_target(dtype=jnp.float32, noise=1.0, seed=0):
    hf = TARGET_HF | {"num_hidden_layers": 4, "tie_word_embeddings": False, "max_position_embeddings": 512}
    config, precision = llama_target.Config.from_hf(hf, (0, 1, 2)), Precision(dtype, dtype)
    groups = llama_target.groups(config, precision, Sharding.none())
    _, abstract = decoder.abstract_state(config, groups, precision)
    rng = np.random.default_rng(seed)
    embed = rng.choice([-1.0, 1.0], (V, D))
    embed[:, 0] = 1
    head = np.empty((V, D))
    head[rng.permutation(V)] = embed
    given = {"embed": embed, "head": head}

    def fill(path, leaf):
        name = "/".join(map(str, path))
        if name in given:
            return leaf.replace(jnp.asarray(given[name], dtype))
        if name.endswith("scale"):
            return leaf.replace(jnp.ones(leaf.shape, dtype))
        weight = rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[-2])
        if "o_proj" in name or "down_proj" in name:
            weight *= noise
        return leaf.replace(jnp.asarray(weight, dtype))

    state = nnx.from_flat_state([(path, fill(path, leaf)) for path, leaf in nnx.to_flat_state(abstract)])
    return decoder.build(config, groups, state, precision)


def make_draft(name, target, **fields):
    """Of the target above; `fields` change its config (a wrong rope base, say) and nothing else."""
    module = {"llama": llama, "mla": mla}[name]
    sizes = module.Config.for_target(target.config, VOCAB.draft_vocab_size) | {"num_attention_heads": HEADS}
    sizes |= {"num_key_value_heads": HEADS, "head_dim": WIDTH} if name == "llama" else {
        "q_lora_rank": 8, "kv_lora_rank": 2 * D, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": WIDTH,
    }  # fmt: skip
    dtype = target.precision.param
    draft = module.make(
        module.Config(**sizes | fields), VOCAB, target.embedding(), precision=Precision(dtype, dtype),
        sharding=Sharding.none(), rngs=nnx.Rngs(0),
    )  # fmt: skip
    params = nnx.state(draft, nnx.Param)
    for path, leaf in nnx.to_flat_state(params):
        leaf[...] = jnp.ones_like(leaf[...]) if path[-1] == "scale" else jnp.zeros_like(leaf[...])
    nnx.update(draft, params)
    newest_less_own = np.concatenate([np.eye(D), -np.eye(D)])  # embedding minus normed hidden state
    attention = draft.self_attn
    if name == "llama":
        attention.q_proj.kernel[...] = attention.q_proj.kernel[...].at[0].set(20.0)
        attention.k_proj.kernel[...] = attention.k_proj.kernel[...].at[0].set(20.0)
        attention.v_proj.kernel[...] = jnp.asarray(newest_less_own, dtype)
    else:
        heads = np.zeros((2 * D, HEADS, 4 + WIDTH))
        heads[:, :, 4:] = newest_less_own.reshape(2 * D, HEADS, WIDTH)
        queries = np.zeros((8, HEADS, 8))
        queries[:, :, 4:] = 60.0 / 8
        latent = np.zeros((2 * D, 2 * D + 4))
        latent[:, : 2 * D], latent[0, 2 * D :] = np.eye(2 * D), 60.0
        attention.q_a_proj.kernel[...] = attention.q_a_proj.kernel[...].at[0].set(1.0)
        attention.q_b_proj.kernel[...] = jnp.asarray(queries.reshape(8, -1), dtype)
        attention.kv_a_proj_with_mqa.kernel[...] = jnp.asarray(latent, dtype)
        attention.kv_b_proj.kernel[...] = jnp.asarray(heads.reshape(2 * D, -1), dtype)
    attention.o_proj.kernel[...] = jnp.eye(D, dtype=dtype)
    draft.lm_head.kernel[...] = target.head()[VOCAB.target_ids_W].T
    return draft


def prompts(num, seed=0, longest=24):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V, rng.integers(1, longest)).tolist() for _ in range(num)]


def cast(draft, dtype):
    """A copy of a draft's state in another precision."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, nnx.state(draft))
