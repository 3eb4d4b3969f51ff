"""A draft of this project in the layouts that other trainers document, for tests that import it."""

import numpy as np
from small_drafts import config_of, random_params
from test_contracts import DRAFTS, V, W
from test_export import params_of

from flaxdraft.files.name_tables import state_to_torch
from flaxdraft.interfaces import VocabMap

IDS = np.sort(np.random.default_rng(5).permutation(V)[:W])  # neither even nor contiguous
LAYER = "midlayer."
SIZES = {
    "vocab_size": V, "draft_vocab_size": W, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "num_hidden_layers": 1, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


class Source:
    """A draft of this project, to be written as another trainer would."""

    def __init__(self, kind="llama", **fields):
        """With random weights."""
        config = config_of(kind, **fields)
        self._set(DRAFTS[kind], config, random_params(kind, config), VocabMap(IDS, V))

    @classmethod
    def of(cls, draft, module, vocab):
        """With the weights of a draft."""
        source = cls.__new__(cls)
        source._set(module, draft.config, params_of(draft), vocab)
        return source

    def _set(self, module, config, params, vocab):
        self.module, self.config, self.params, self.vocab = module, config, params, vocab
        self.tensors = state_to_torch(params, module.name_table(config), np.float32)
        self.hf = config.to_hf()

    def tables(self):
        return self.vocab.tables()

    def renamed(self, old, new):
        return {key.replace(old, new): array for key, array in self.tensors.items()}


def specforge(source):
    """main: `midlayer.`, no embedding, t2d and d2t always, nulls in config.json."""
    return source.tensors | source.tables(), source.hf | {"rope_scaling": None, "sliding_window": None}


def specforge_mla(source):
    """The mla branch: its own class name."""
    config = source.hf | {"architectures": ["DeepseekV3ForCausalLMEagle3"], "model_type": "deepseek_v3"}
    return source.tensors | source.tables(), config


def torchspec(source):
    """`draft_model.` in front, a bfloat16 file, the old rotary buffer."""
    wrapped = {f"draft_model.{key}": array for key, array in (source.tensors | source.tables()).items()}
    return wrapped | {"draft_model.midlayer.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}, source.hf


def nemo(source):
    """`model.layers.0.`, the target's embedding inside, special tokens first in d2t."""
    ids, size = source.vocab.target_ids_W, source.config.draft_vocab_size
    order = np.r_[size - 2 : size, 0 : size - 2]
    tensors = {f"model.{key.replace('midlayer.', 'layers.0.')}": array for key, array in source.tensors.items()}
    tensors["lm_head.weight"] = tensors.pop("model.lm_head.weight")[order]
    tensors["model.embed_tokens.weight"] = np.ones((V, 32), np.float32)
    name = {"llama": "LlamaEagle3DraftModel", "mla": "DeepseekV3Eagle3DraftModel"}[
        source.module.__name__.split(".")[-1]
    ]
    d2t = {"d2t": ids[order] - np.arange(size), "t2d": source.vocab.t2d()}
    return tensors | d2t, source.hf | {"architectures": [name]}


def eagle(source):
    """The official trainer's config: no rotary fields, a plain class name."""
    config = SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16"}
    return source.tensors | source.tables(), config


def speculators(source):
    """The layer's configuration nested, and only what differs from transformers' defaults."""
    nested = {name: value for name, value in SIZES.items() if name != "draft_vocab_size"} | {"rope_theta": 1e4}
    config = {
        "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "draft_vocab_size": W,
        "norm_before_residual": False, "norm_before_fc": False,
        "transformer_layer_config": nested | {"model_type": source.hf["model_type"]},
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5], "target_hidden_size": None,
        "speculators_config": {"algorithm": "eagle3"},
    }  # fmt: skip
    tensors = source.renamed("midlayer.", "layers.0.") | {
        "embed_tokens.weight": np.ones((V, 32), np.float32), "verifier_lm_head.weight": np.ones((W, 32), np.float32),
        "verifier_norm.weight": np.ones(32, np.float32),
    }  # fmt: skip
    return tensors | source.tables(), config


def fused(source):
    """Projections joined, as an engine's own dump has them."""
    tensors = {**source.tensors, **source.tables()}
    attention, mlp = LAYER + "self_attn.", LAYER + "mlp."
    names = [f"{attention}{p}_proj.weight" for p in "qkv"]
    fused_name = f"{attention}qkv_proj.weight"
    if "mla" in source.module.__name__:
        names = [f"{attention}{p}.weight" for p in ("q_a_proj", "kv_a_proj_with_mqa")]
        fused_name = f"{attention}fused_qkv_a_proj.weight"
    tensors[fused_name] = np.concatenate([tensors.pop(name) for name in names])
    tensors[f"{mlp}gate_up_proj.weight"] = np.concatenate(
        [tensors.pop(f"{mlp}{p}_proj.weight") for p in ("gate", "up")]
    )
    return tensors, source.hf


TRAINERS = {
    "specforge": ("llama", specforge), "specforge mla": ("mla", specforge_mla), "torchspec": ("llama", torchspec),
    "torchspec mla": ("mla", torchspec), "nemo": ("llama", nemo), "nemo mla": ("mla", nemo), "eagle": ("llama", eagle),
    "speculators": ("llama", speculators), "speculators qwen3": ("qwen3", speculators), "fused": ("llama", fused),
    "fused mla": ("mla", fused),
}  # fmt: skip
