"""The MLA draft (DeepSeek and Kimi family): latent attention on the EAGLE-3 surface."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

from flaxdraft.algorithms.eagle3.draft import COMMON_NAMES, Eagle3Draft, Eagle3Sizes, extra_names
from flaxdraft.algorithms.eagle3.serving.terms import Engine, Kind, Shapes
from flaxdraft.devices.sharding import Sharding
from flaxdraft.interfaces import EmbeddingAndHead
from flaxdraft.nn.mla import MLA, MLAConfig, checked_rope
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.rope import RopeConfig
from flaxdraft.serving.fields import FLAG, POSITIVE, SIZE
from flaxdraft.serving.finding import Finding
from flaxdraft.serving.view import DraftView

ARCHITECTURES = ("Eagle3DeepseekV2ForCausalLM", "Eagle3DeepseekV3ForCausalLM", "DeepseekV3ForCausalLMEagle3")
MODEL_TYPES = ("deepseek_v3", "deepseek_v2", "kimi_k2")
SERVING_ARCHITECTURE = "Eagle3DeepseekV2ForCausalLM"  # the one name that SGLang and vLLM both register

_ALWAYS = (
    ("self_attn/kv_a_proj_with_mqa/kernel", "midlayer.self_attn.kv_a_proj_with_mqa.weight", "transpose"),
    ("self_attn/kv_a_layernorm/scale", "midlayer.self_attn.kv_a_layernorm.weight", "copy"),
    ("self_attn/kv_b_proj/kernel", "midlayer.self_attn.kv_b_proj.weight", "transpose"),
    ("self_attn/o_proj/kernel", "midlayer.self_attn.o_proj.weight", "transpose"),
)
NAME_TABLE = (
    *COMMON_NAMES,
    *_ALWAYS,
    ("self_attn/q_a_proj/kernel", "midlayer.self_attn.q_a_proj.weight", "transpose"),
    ("self_attn/q_a_layernorm/scale", "midlayer.self_attn.q_a_layernorm.weight", "copy"),
    ("self_attn/q_b_proj/kernel", "midlayer.self_attn.q_b_proj.weight", "transpose"),
)
# Trainable, but no server loads a draft without the low-rank query.
NAME_TABLE_PLAIN_QUERY = (
    *COMMON_NAMES,
    *_ALWAYS,
    ("self_attn/q_proj/kernel", "midlayer.self_attn.q_proj.weight", "transpose"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Eagle3Sizes):
    """Sizes of an MLA draft."""

    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    latent_norm_eps: float
    rope: RopeConfig

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "rope", checked_rope(self, "draft.fields"))

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Config:
        """Reads a draft's config.json; the latent norms' epsilon defaults to rms_norm_eps, as servers have it."""
        return cls(
            **cls.from_hf_sizes(config),
            num_attention_heads=config["num_attention_heads"],
            q_lora_rank=config.get("q_lora_rank"),
            kv_lora_rank=config["kv_lora_rank"],
            qk_nope_head_dim=config["qk_nope_head_dim"],
            qk_rope_head_dim=config["qk_rope_head_dim"],
            v_head_dim=config["v_head_dim"],
            latent_norm_eps=config.get("latent_norm_eps", config["rms_norm_eps"]),
            rope=RopeConfig.from_hf(config),
        )

    @classmethod
    def for_target(cls, target: Any, draft_vocab_size: int) -> dict[str, Any]:
        """Defaults next to a target: its width and heads, DeepSeek's proportions between the ranks; the ranks and
        widths of a target that has latent attention itself."""
        ranks = {
            "q_lora_rank": max(target.hidden_size // 3 // 64 * 64, 64),
            "kv_lora_rank": max(target.hidden_size // 4 // 64 * 64, 64),
            "qk_nope_head_dim": target.head_dim,
            "qk_rope_head_dim": target.head_dim // 2,
            "v_head_dim": target.head_dim,
        }
        # A target without a query rank keeps the default: no server loads a draft without one.
        own = {name: getattr(target, name, None) for name in ranks}
        return {
            **cls.sizes_for_target(target, draft_vocab_size),
            "num_attention_heads": target.num_attention_heads,
            **{name: own[name] or default for name, default in ranks.items()},
            "latent_norm_eps": target.rms_norm_eps,
            "rope": target.rope.for_draft(),
        }

    def to_hf(self) -> dict[str, Any]:
        """config.json fields, without the target's layer ids; the engines' tables say who takes them."""
        own_eps = self.latent_norm_eps != self.rms_norm_eps
        return {
            **self.to_hf_sizes(SERVING_ARCHITECTURE, "deepseek_v3"),
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_attention_heads,
            "q_lora_rank": self.q_lora_rank,
            "kv_lora_rank": self.kv_lora_rank,
            "qk_nope_head_dim": self.qk_nope_head_dim,
            "qk_rope_head_dim": self.qk_rope_head_dim,
            "v_head_dim": self.v_head_dim,
            "rope_interleave": True,
            "first_k_dense_replace": 1,  # the one layer is dense
            "max_position_embeddings": self.rope.max_position_embeddings,
            **self.rope.to_hf(),
            **({"latent_norm_eps": self.latent_norm_eps} if own_eps else {}),
        }


def name_table(config: Config):
    """The rows for this config."""
    return (*(NAME_TABLE_PLAIN_QUERY if config.q_lora_rank is None else NAME_TABLE), *extra_names(config))


def attention(config: Config, precision: Precision, rngs: nnx.Rngs, sharding: Sharding) -> MLA:
    names = [field.name for field in dataclasses.fields(MLAConfig) if hasattr(config, field.name)]  # no biases
    mla = MLAConfig(**{name: getattr(config, name) for name in names})
    return MLA(mla, 2 * config.hidden_size, config.hidden_size, precision, rngs, sharding)


def make(config: Config, vocab, target: EmbeddingAndHead, *, precision, sharding, rngs) -> Eagle3Draft:
    """A draft with fresh weights; see `Eagle3Draft`."""
    heads = attention(config, precision, rngs, sharding)
    embedding_VD = None if config.owns_embedding else target.embedding()
    return Eagle3Draft(config, heads, vocab, embedding_VD, precision=precision, sharding=sharding, rngs=rngs)


def _weights(config: Mapping[str, Any]) -> Shapes:
    """As engines load them; written down apart from NAME_TABLE, with which tests compare it."""
    heads, q_rank, rank = config["num_attention_heads"], config.get("q_lora_rank"), config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    hidden = config["hidden_size"]
    shapes = {
        "kv_a_proj_with_mqa.weight": (rank + rope, 2 * hidden),
        "kv_a_layernorm.weight": (rank,),
        "kv_b_proj.weight": (heads * (nope + value), rank),
        "o_proj.weight": (hidden, heads * value),
    }
    if q_rank is None:
        return shapes | {"q_proj.weight": (heads * (nope + rope), 2 * hidden)}
    return shapes | {
        "q_a_proj.weight": (q_rank, 2 * hidden),
        "q_a_layernorm.weight": (q_rank,),
        "q_b_proj.weight": (heads * (nope + rope), q_rank),
    }


def _latent_attention(engine: Engine, view: DraftView) -> Iterator[Finding]:
    config = view.config
    if not engine.serves:
        return
    if config.get("q_lora_rank") is None:
        yield Finding("refused", "an MLA draft without q_lora_rank cannot be served; SGLang and vLLM both need it",
                      "train with draft.fields.q_lora_rank")  # fmt: skip
    eps = config["rms_norm_eps"]
    if config.get("latent_norm_eps", eps) != eps:
        yield Finding("wrong", f"latent_norm_eps {config['latent_norm_eps']} differs from rms_norm_eps {eps}; it uses "
                      "rms_norm_eps for both", "train with equal ones")  # fmt: skip
    if not config.get("rope_interleave", True):
        yield Finding("wrong", "rope_interleave is false; vLLM turns interleaved pairs always", "train interleaved")


def _yarn(rope: Mapping[str, Any]) -> Iterator[Finding]:
    if rope.get("mscale") is None or rope.get("mscale_all_dim") is None:
        yield Finding("wrong", "yarn with one of mscale and mscale_all_dim absent: readers differ in the default",
                      "write both, 1.0 and 0.0 where there is none")  # fmt: skip


SERVING = Kind(
    name="mla", title="DeepSeek-MLA", architecture=SERVING_ARCHITECTURE, model_type="deepseek_v3",
    claims=lambda config: bool(config.get("kv_lora_rank")),
    sizes=("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    fields={"q_lora_rank": SIZE, "kv_lora_rank": SIZE, "latent_norm_eps": POSITIVE, "rope_interleave": FLAG},
    attention=_weights, rules=(_latent_attention,), yarn=_yarn,
)  # fmt: skip
