"""The EAGLE-3 draft around its attention: everything that Llama and MLA drafts have in common.

One layer fed by three tapped target states (arXiv 2503.01840, section 3):
    x = concat(input_layernorm(embed), hidden_norm(h)); h = h + attn(x); h = h + mlp(post_attention_layernorm(h))
    logits = lm_head(norm(h))
EAGLE-3.1 adds two switches: `fc_norm`, one RMSNorm for each tapped state before fc, and `norm_output`, by which the
next step reads norm(h) instead of h. Drafts of the speculators project may have two more: `norm_before_fc`, one RMSNorm
over all three tapped states, and `norm_before_residual`, by which the residual starts from hidden_norm(h).

Shape letters: B batch, T time, D draft width, E target width, V target vocabulary, W draft vocabulary,
N heads, K key/value heads, H head width, C value width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_type_hints

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flaxdraft.devices.sharding import Sharding, along, gathered
from flaxdraft.errors import InputError
from flaxdraft.interfaces import VocabMap
from flaxdraft.nn.layers import Frozen, GatedMLP, RMSNorm, column
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.self_attention import Heads
from flaxdraft.nn.vocabulary import lookup
from flaxdraft.serving.fields import FLAG, SIZE, Expected, Positive, Size

# (JAX path, PyTorch key, transform) of the weights around the attention, in the servers' flat layout.
COMMON_NAMES = (
    ("fc/kernel", "fc.weight", "transpose"),
    ("input_layernorm/scale", "midlayer.input_layernorm.weight", "copy"),
    ("hidden_norm/scale", "midlayer.hidden_norm.weight", "copy"),
    ("post_attention_layernorm/scale", "midlayer.post_attention_layernorm.weight", "copy"),
    ("mlp/gate_proj/kernel", "midlayer.mlp.gate_proj.weight", "transpose"),
    ("mlp/up_proj/kernel", "midlayer.mlp.up_proj.weight", "transpose"),
    ("mlp/down_proj/kernel", "midlayer.mlp.down_proj.weight", "transpose"),
    ("norm/scale", "norm.weight", "copy"),
    ("lm_head/kernel", "lm_head.weight", "transpose"),
)
FC_NORM_NAMES = (
    ("fc_norm_low/scale", "fc_norm.0.weight", "copy"),
    ("fc_norm_mid/scale", "fc_norm.1.weight", "copy"),
    ("fc_norm_high/scale", "fc_norm.2.weight", "copy"),
)
INPUT_NORM_NAMES = (("input_norm/scale", "input_norm.weight", "copy"),)
OWN_EMBEDDING_NAMES = (("embed_tokens", "embed_tokens.weight", "copy"),)

# What a field of each type must hold.
_EXPECTED = {
    bool: FLAG,
    int: SIZE,
    int | None: Expected("a positive integer or null", Size | None),
    float: Expected("a positive number (YAML reads 1e-6 as text; write 1.0e-6)", Positive),
}
SWITCHES = ("fc_norm", "norm_output", "norm_before_fc", "norm_before_residual")  # false where absent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eagle3Sizes:
    """Sizes that every draft config has; names as in config.json."""

    hidden_size: int
    intermediate_size: int
    target_hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    rms_norm_eps: float
    fc_norm: bool = False
    norm_output: bool = False
    norm_before_fc: bool = False
    norm_before_residual: bool = False

    @property
    def owns_embedding(self) -> bool:
        """Where the widths differ the target's embedding does not fit, and the draft trains its own."""
        return self.target_hidden_size != self.hidden_size

    def __post_init__(self):
        for name, kind in get_type_hints(type(self)).items():
            value, expected = getattr(self, name), _EXPECTED.get(kind)
            if expected is not None and not expected.fits(value):
                raise InputError(f"draft.fields.{name}: found {value!r}, expected {expected.phrase}")
        if self.fc_norm and self.norm_before_fc:
            raise InputError(
                "draft.fields.norm_before_fc: found it true with fc_norm; tapped states are normed each by itself or "
                "all together, expected one of the two"
            )
        if self.draft_vocab_size > self.vocab_size:
            raise InputError(
                f"draft.draft_vocab_size: {self.draft_vocab_size} is larger than the target's vocabulary "
                f"{self.vocab_size}"
            )
        if 3 * self.target_hidden_size == self.hidden_size:
            raise InputError(
                f"draft.fields.hidden_size: {self.hidden_size} equals 3 x target_hidden_size; servers tell tapped "
                "states from draft states by their width, so this draft could not be served"
            )

    @classmethod
    def from_hf_sizes(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The common sizes of a config.json, as keyword arguments.

        Raises:
            InputError: several layers or tied embeddings, which no portable draft has.
        """
        if config.get("num_hidden_layers", 1) != 1:
            raise InputError(f"draft config: num_hidden_layers is {config['num_hidden_layers']}, expected 1")
        if config.get("tie_word_embeddings"):
            raise InputError("draft config: tie_word_embeddings is true, expected false (a draft has its own head)")
        nested = config.get("eagle_config") or {}
        hidden = config["hidden_size"]
        return {
            "hidden_size": hidden,
            "intermediate_size": config["intermediate_size"],
            "target_hidden_size": config.get("target_hidden_size") or hidden,
            "vocab_size": config["vocab_size"],
            "draft_vocab_size": config.get("draft_vocab_size") or config["vocab_size"],
            "rms_norm_eps": config["rms_norm_eps"],
            "fc_norm": bool(config.get("fc_norm", config.get("use_aux_norm"))),  # SGLang reads both names
            "norm_output": bool(config.get("norm_output")),
            "norm_before_fc": bool(config.get("norm_before_fc", nested.get("norm_before_fc"))),
            "norm_before_residual": bool(config.get("norm_before_residual", nested.get("norm_before_residual"))),
        }

    @classmethod
    def sizes_for_target(cls, target: Any, draft_vocab_size: int) -> dict[str, Any]:
        """The common fields of a draft next to a target, before overrides."""
        return {
            "hidden_size": target.hidden_size,
            "intermediate_size": target.intermediate_size,
            "target_hidden_size": target.hidden_size,
            "vocab_size": target.vocab_size,
            "draft_vocab_size": draft_vocab_size,
            "rms_norm_eps": target.rms_norm_eps,
            **dict.fromkeys(SWITCHES, False),
        }

    def to_hf_sizes(self, architecture: str, model_type: str) -> dict[str, Any]:
        """The common fields of config.json; `target_hidden_size` only where it differs, never a null."""
        out = {
            "architectures": [architecture],
            "model_type": model_type,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": 1,
            "vocab_size": self.vocab_size,
            "draft_vocab_size": self.draft_vocab_size,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "num_aux_hidden_states": 3,
        }
        if self.target_hidden_size != self.hidden_size:
            out["target_hidden_size"] = self.target_hidden_size
        # Only where true: a trainer exists that reads a false norm_output as "no norm before the head".
        return out | {switch: True for switch in SWITCHES if getattr(self, switch)}


def extra_names(config: Eagle3Sizes) -> tuple:
    """Name-table rows of the weights that only some configs have."""
    norms = FC_NORM_NAMES if config.fc_norm else INPUT_NORM_NAMES if config.norm_before_fc else ()
    return norms + (OWN_EMBEDDING_NAMES if config.owns_embedding else ())


class Eagle3Draft(nnx.Module):
    """The surface of `surface.Draft`; a draft architecture gives the config and the attention."""

    def __init__(
        self,
        config: Any,
        attention: Heads,
        vocab: VocabMap,
        embedding_VD: Float[Array, "V D"] | None,
        *,
        precision: Precision,
        sharding: Sharding,
        rngs: nnx.Rngs,
    ):
        """
        Args:
            embedding_VD: the target's embedding, kept frozen; None where the widths differ, and then the draft
                owns a trained one.
            vocab: the target ids of the draft's tokens; it travels with the draft.

        Raises:
            InputError: the vocabulary map or the embedding does not fit the config.
        """
        c = config
        vocab.check_fits(c)
        if c.owns_embedding != (embedding_VD is None):
            raise InputError("draft embedding: the target's is used exactly where draft and target widths are equal")
        self.config = c
        self.sharding = sharding
        self.precision = precision
        if c.owns_embedding:
            shape = (c.vocab_size, c.hidden_size)
            embedding = nnx.initializers.normal(0.02)(rngs.params(), shape, precision.param)
            self.embed_tokens = nnx.Param(embedding, place="weight_ve")
        else:
            assert embedding_VD is not None, "a draft without an embedding of its own gets the target's"
            if embedding_VD.shape != (c.vocab_size, c.hidden_size):
                raise InputError(
                    f"draft embedding: found {embedding_VD.shape}, expected {(c.vocab_size, c.hidden_size)}"
                )
            self.embed_tokens = Frozen(embedding_VD, place="weight_ve")
        if c.fc_norm:
            self.fc_norm_low, self.fc_norm_mid, self.fc_norm_high = (
                RMSNorm(c.target_hidden_size, c.rms_norm_eps, precision) for _ in range(3)
            )
        if c.norm_before_fc:
            self.input_norm = RMSNorm(3 * c.target_hidden_size, c.rms_norm_eps, precision)
        self.fc = column(3 * c.target_hidden_size, c.hidden_size, precision, rngs, sharding)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, precision)
        self.hidden_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, precision)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, precision)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, precision, rngs, sharding)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, precision)
        # The loss reads the head's master weights; the logits of a served draft are as exact.
        exact = dataclasses.replace(precision, float8=False)
        self.lm_head = column(c.hidden_size, c.draft_vocab_size, exact, rngs, sharding)
        self.target_ids = Frozen(jnp.asarray(vocab.target_ids_W, jnp.int32), place="whole")
        self.draft_ids = Frozen(jnp.asarray(vocab.to_draft()), place="whole")

    @property
    def softmax_scale(self) -> float:
        return self.self_attn.softmax_scale

    def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings in compute precision."""
        return lookup(self.embed_tokens[...], tokens_BT, self.sharding).astype(self.precision.compute)

    def project(self, taps_BTKE: Float[Array, "B T K E"]) -> Float[Array, "B T D"]:
        """fc over the three tapped states, low, mid, high: as they are, each normed by itself (`fc_norm`), or all
        together (`norm_before_fc`).

        Raises:
            InputError: the features are not those of the draft's target.
        """
        found, wanted = taps_BTKE.shape[2:], (3, self.config.target_hidden_size)
        if found != wanted:
            raise InputError(
                f"features: tapped states of shape {found} a token, expected {wanted} from the draft's "
                "target_hidden_size; the features and the draft are of different targets"
            )
        if self.config.fc_norm:
            norms = self.fc_norm_low, self.fc_norm_mid, self.fc_norm_high
            taps_BTKE = jnp.stack([norm(taps_BTKE[:, :, i]) for i, norm in enumerate(norms)], axis=2)
        joined = taps_BTKE.reshape(*taps_BTKE.shape[:2], -1)
        hidden_BTD = self.fc(self.input_norm(joined) if self.config.norm_before_fc else joined)
        # Nobody sums over the taps' width, which every device holds: fc is split by its outputs, put together here.
        spec = along(hidden_BTD, self.sharding.act_btd)
        return hidden_BTD if spec is None else jax.reshard(hidden_BTD, spec)

    def _inputs_anew(self, products: Callable) -> Callable:
        """`products`, with what they multiply (norms, the gated product) made again for the gradient: the unroll would
        keep it for every step, beside the results of products that it is made of. Not in float8, whose factors are
        narrow and take longer to make."""
        if self.precision.float8:
            return products
        return jax.checkpoint(products, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)

    def token_projections(self, embeds_BTD: Float[Array, "B T D"]) -> Any:
        """What the attention's first projections make of the normed embedding, the first half of their input. It does
        not depend on the unroll step, so one product serves all steps that read a token."""
        half = slice(None, self.config.hidden_size)
        return self.self_attn.project(self.input_layernorm(embeds_BTD), half)

    def projections(self, token_projections: Any, hidden_BTD: Float[Array, "B T D"]) -> Any:
        """The same of the whole input: normed embedding first, normed hidden state second."""
        half = slice(self.config.hidden_size, None)
        of_hidden = self._inputs_anew(lambda x: self.self_attn.project(self.hidden_norm(x), half))(hidden_BTD)
        return jax.tree.map(jnp.add, token_projections, of_hidden)

    def query(self, projections: Any, positions_BT: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
        return self.self_attn.query(projections, positions_BT)

    def key_value(
        self, projections: Any, positions_BT: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K C"]]:
        return self.self_attn.key_value(projections, positions_BT)

    def finish(self, hidden_BTD: Float[Array, "B T D"], heads_BTNC: Float[Array, "B T N C"]) -> Float[Array, "B T D"]:
        """Output projection, residual (the layer's input, or its norm iff `norm_before_residual`) and feed-forward: the
        hidden state that the recurrence carries, before the final norm, or after it iff `norm_output`."""
        if self.config.norm_before_residual:
            hidden_BTD = self.hidden_norm(hidden_BTD)
        hidden_BTD = hidden_BTD + self.self_attn.output(heads_BTNC)
        hidden_BTD = hidden_BTD + self._inputs_anew(lambda x: self.mlp(self.post_attention_layernorm(x)))(hidden_BTD)
        return self.norm(hidden_BTD) if self.config.norm_output else hidden_BTD

    def head_input(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What lm_head reads, given what `finish` returned: normed exactly once."""
        return hidden_BTD if self.config.norm_output else self.norm(hidden_BTD)

    def head(self) -> Float[Array, "D W"]:
        """lm_head's master weights, whole along fsdp."""
        return gathered(self.lm_head.kernel[...], self.lm_head.spec)

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T W"]:
        """At least float32."""
        out = self.lm_head(self.head_input(hidden_BTD))
        return out.astype(jnp.promote_types(out.dtype, jnp.float32))
