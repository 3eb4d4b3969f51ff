"""A target whose next token is mostly a fixed map of the token DISTANCE back, and drafts that know just that.

They agree often and not always, so runs of every length are accepted. All is written by hand: attention finds the
token DISTANCE back by its rotary angle alone (from a constant feature), the draft puts its embedding in the place of
its hidden state (a second set of heads takes the old one away), and reads the target's head. Whoever feeds such a draft
a wrong token or position, turns it by another rotary base, or carries another hidden state on, loses the agreement.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from test_contracts import TARGET_HF

from flaxdraft.algorithms.eagle3.drafter import ChainDrafter
from flaxdraft.algorithms.eagle3.drafts import llama, mla
from flaxdraft.data.answers import answer_greedily
from flaxdraft.decode.decoding import ReadyDraft
from flaxdraft.devices.sharding import Sharding
from flaxdraft.devices.weight_places import on_mesh
from flaxdraft.interfaces import VocabMap
from flaxdraft.nn.precision import Precision
from flaxdraft.targets import decoder
from flaxdraft.targets import deepseek as deepseek_target
from flaxdraft.targets import llama as llama_target

V, D, HEADS = 64, 32, 4
DISTANCE, ANGLE = 4, 0.1  # tokens; of the rotary pair that finds them, radians a token
VOCAB = VocabMap(np.delete(np.arange(V), np.arange(5, V, 9)), V)  # some tokens can never be drafted
SHARP = 120.0  # of queries and keys
STOP, LIMIT = 7, 24  # the token that ends an answer, and its longest one
STOPS = (STOP, -1)  # as many everywhere, since programs are compiled for a number of them


def seeks(width: int, pair: int, interleaved: bool = False) -> np.ndarray:
    """A query over keys of ones that is highest DISTANCE back: one rotary pair, turned back by as much."""
    query = np.zeros(width)
    at = [2 * pair, 2 * pair + 1] if interleaved else [pair, pair + width // 2]
    # Keys are (1, 1), at 45 degrees.
    query[at] = np.cos(np.pi / 4 - DISTANCE * ANGLE), np.sin(np.pi / 4 - DISTANCE * ANGLE)
    return SHARP * query


# Attention of the first layer, [in, out], for each family.
LLAMA_FIRST = {
    "q_proj": np.outer(np.eye(D)[0], np.tile(seeks(8, 1), HEADS)),
    "k_proj": np.outer(np.eye(D)[0], np.full(D, SHARP)),
    "v_proj": np.eye(D), "o_proj": 4 * np.eye(D),
}  # fmt: skip
DEEPSEEK_FIRST = {
    "q_a_proj": np.outer(np.eye(D)[0], np.ones(8)),
    "q_b_proj": np.outer(np.eye(8)[0], np.tile(np.append(np.zeros(4), seeks(8, 1, interleaved=True)), HEADS)),
    "kv_a_proj_with_mqa": np.concatenate([np.eye(D), np.outer(np.eye(D)[0], np.full(8, SHARP))], axis=1),
    "kv_b_proj": np.pad(np.eye(D).reshape(D, HEADS, 8), ((0, 0), (0, 0), (4, 0))).reshape(D, -1),
    "o_proj": 4 * np.eye(D),
}  # fmt: skip
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"], "q_lora_rank": 8, "kv_lora_rank": D, "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 2, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
}  # fmt: skip


def make_target(dtype=jnp.float32, noise=0.5, seed=0, family="llama", mesh=None):
    sharding = Sharding.none() if mesh is None else Sharding.parallel()
    module, first, more = {"llama": (llama_target, LLAMA_FIRST, {}),
                           "deepseek": (deepseek_target, DEEPSEEK_FIRST, DEEPSEEK)}[family]  # fmt: skip
    hf = TARGET_HF | more | {
        "num_hidden_layers": 4, "num_key_value_heads": HEADS, "tie_word_embeddings": False,
        "max_position_embeddings": 512,
    }  # fmt: skip
    config, precision = module.Config.from_hf(hf, (0, 1, 2)), Precision(dtype, dtype)
    groups = module.groups(config, precision, sharding)
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
        if path[0] == groups[0].name and path[-2] in first:
            weight[0] = first[path[-2]]
        return leaf.replace(jnp.asarray(weight, dtype))

    state = nnx.from_flat_state([(path, fill(path, leaf)) for path, leaf in nnx.to_flat_state(abstract)])
    state = state if mesh is None else on_mesh(state, mesh, sharding)
    return decoder.build(config, groups, state, precision, mesh, sharding)


def make_draft(name, target, vocab=VOCAB, sharding=Sharding.none(), **fields):  # noqa: B008 (immutable)
    """Of the target above. `vocab` and `fields` of the config are what the draft says of itself; its weights are the
    same whatever they are."""
    module = {"llama": llama, "mla": mla}[name]
    sizes = module.Config.for_target(target.config, VOCAB.draft_vocab_size) | {"num_attention_heads": HEADS}
    sizes |= {"num_key_value_heads": HEADS, "head_dim": 16} if name == "llama" else {
        "q_lora_rank": 8, "kv_lora_rank": 2 * D, "qk_nope_head_dim": 4, "qk_rope_head_dim": 8, "v_head_dim": 16,
    }  # fmt: skip
    dtype = target.precision.param
    draft = module.make(
        module.Config(**sizes | fields), vocab, target, precision=Precision(dtype, dtype),
        sharding=sharding, rngs=nnx.Rngs(0),
    )  # fmt: skip
    params = nnx.state(draft, nnx.Param)
    for path, leaf in nnx.to_flat_state(params):
        leaf[...] = jnp.ones_like(leaf[...]) if path[-1] == "scale" else jnp.zeros_like(leaf[...])
    nnx.update(draft, params)
    # Two heads bring the embedding of the token DISTANCE back, the other two take the normed hidden state away.
    values = np.zeros((2 * D, HEADS, 16))
    values[:D, :2], values[D:, 2:] = np.eye(D).reshape(D, 2, 16), -np.eye(D).reshape(D, 2, 16)
    _attend(draft.self_attn, name, values, dtype)
    draft.self_attn.o_proj.kernel[...] = jnp.asarray(np.concatenate([np.eye(D), np.eye(D)]), dtype)
    draft.norm.scale[...] = jnp.full(D, 5.0, dtype)  # the normed state is not the state
    draft.lm_head.kernel[...] = target.head()[VOCAB.target_ids_W].T
    return draft


def _attend(attention, name, values, dtype):
    """Rotary queries and keys from the constant feature, and the values, as each architecture has them."""
    if name == "llama":
        queries = np.stack([seeks(16, 2)] * 2 + [np.full(16, 20.0)] * 2)
        attention.q_proj.kernel[...] = jnp.asarray(np.outer(np.eye(2 * D)[0], queries), dtype)
        attention.k_proj.kernel[...] = jnp.asarray(np.outer(np.eye(2 * D)[0], np.full(HEADS * 16, SHARP)), dtype)
        attention.v_proj.kernel[...] = jnp.asarray(values.reshape(2 * D, -1), dtype)
        return
    queries, latent, heads = np.zeros((8, HEADS, 12)), np.zeros((2 * D, 2 * D + 8)), np.zeros((2 * D, HEADS, 20))
    queries[0, :, 4:] = np.stack([seeks(8, 1, interleaved=True)] * 2 + [np.full(8, 20.0)] * 2)
    latent[:, : 2 * D], latent[0, 2 * D :] = np.eye(2 * D), SHARP
    heads[:, :, 4:] = values
    attention.q_a_proj.kernel[...] = attention.q_a_proj.kernel[...].at[0].set(1.0)
    attention.q_b_proj.kernel[...] = jnp.asarray(queries.reshape(8, -1), dtype)
    attention.kv_a_proj_with_mqa.kernel[...] = jnp.asarray(latent, dtype)
    attention.kv_b_proj.kernel[...] = jnp.asarray(heads.reshape(2 * D, -1), dtype)


def ready(draft):
    """As decoding takes it."""
    return ReadyDraft(*nnx.split(draft), ChainDrafter())


def prompts(num, seed=0, longest=24):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V, rng.integers(1, longest)).tolist() for _ in range(num)]


def own_answers(target, some):
    """Each prompt with the target's own answer, one token after the other, and features."""
    return answer_greedily(target, some, LIMIT, (STOP,), len(some), lambda num: None)


def answers(rows):
    return [row.tokens[row.num_prompt :].tolist() for row in rows]


def assert_lossless(decoded, rows, depth):
    """The target's own answers. Runs of every length up to `depth` draft tokens are accepted, some cut by a stop token
    and some by the limit."""
    assert [one.tokens for one in decoded] == answers(rows)
    assert [sum(one.yields) for one in decoded] == [row.num_answer - 1 for row in rows]
    assert {gained for one in decoded for gained in one.yields} == set(range(1, depth + 2))
    lasts = {(one.tokens[-1] == STOP, one.yields[-1] > 1) for one in decoded if one.yields}
    assert lasts == {(True, True), (True, False), (False, True), (False, False)}


def assert_stops_cut(run, stops, depth):
    """Each answer without stops, cut at each of its tokens in turn by making that token the stop.

    Args:
        run: decodes, given two stop tokens.
    """
    whole = run((-1, -1))
    assert all(len(one.tokens) == LIMIT for one in whole)
    cut_at = set()
    for stop in stops:
        for one, want in zip(run((-1, stop)), whole, strict=True):
            end = want.tokens.index(stop) + 1 if stop in want.tokens else LIMIT
            assert one.tokens == want.tokens[:end]
            # The passes are those of the longer answer, the last one cut.
            ends = np.cumsum([1, *want.yields])
            assert np.cumsum([1, *one.yields]).tolist() == [*ends[ends < end], end]
            cut_at.add(int(end - ends[ends < end].max(initial=1)))
    assert set(range(1, depth + 2)) <= cut_at
