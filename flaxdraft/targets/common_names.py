"""Names of weights that the files of several families share, as rows of `files.name_tables`. Layers of one kind are a
group called layers, unless a function is given another name."""

from __future__ import annotations

from flaxdraft.files.name_tables import NameTable
from flaxdraft.targets.decoder import DecoderConfig

LAYER = "model.layers.{i}."
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

OUTSIDE = (("embed", "model.embed_tokens.weight", "copy"), ("norm/scale", "model.norm.weight", "copy"))
UNTIED_HEAD: NameTable = (("head", "lm_head.weight", "copy"),)
_NORMS = ("input_layernorm", "post_attention_layernorm")
LAYER_NORMS = tuple((f"layers/{norm}/scale", f"{LAYER}{norm}.weight", "copy") for norm in _NORMS)
_HEADS = tuple(f"self_attn.{p}_proj" for p in "qkvo")
ATTENTION = tuple((f"layers/{p.replace('.', '/')}/kernel", f"{LAYER}{p}.weight", "transpose") for p in _HEADS)
QKV_BIAS = tuple((f"layers/self_attn/{p}_proj/bias", f"{LAYER}self_attn.{p}_proj.bias", "copy") for p in "qkv")
OUT_BIAS = (("layers/self_attn/o_proj/bias", LAYER + "self_attn.o_proj.bias", "copy"),)
QK_NORM = tuple((f"layers/self_attn/{p}_norm/scale", f"{LAYER}self_attn.{p}_norm.weight", "copy") for p in "qk")
GATED_MLP = tuple((f"layers/mlp/{p}/kernel", f"{LAYER}mlp.{p}.weight", "transpose") for p in _PROJECTIONS)
GATED_MLP_BIAS = tuple((f"layers/mlp/{p}/bias", f"{LAYER}mlp.{p}.bias", "copy") for p in _PROJECTIONS)


def routed_experts(group: str) -> NameTable:
    """Of `nn.moe.MoE` where each expert's projections are tensors of their own."""
    experts = LAYER + "mlp.experts.{e}."
    return (
        (f"{group}/mlp/gate/kernel", LAYER + "mlp.gate.weight", "transpose"),
        *((f"{group}/mlp/experts/{p}", f"{experts}{p}.weight", "transpose") for p in _PROJECTIONS),
    )


def head(config: DecoderConfig) -> NameTable:
    """The head's row, where it is not the embedding."""
    return () if config.tie_word_embeddings else UNTIED_HEAD


def needless(config: DecoderConfig, name: str) -> bool:
    """Tensors that a file may hold and nobody needs: rotary tables of old files, the head's copy where it is tied."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")
