"""PyTorch models of transformers as oracles. Imported inside fixtures, so that only parity tests need PyTorch.

Shape letters: B batch, T time, D draft width, E target width, X input width.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch
import transformers
from torch import nn
from transformers import DeepseekV3Config, LlamaConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

# Of each draft: transformers' config, attention, rotary embedding, and the projections that read the input.
FAMILIES = {
    "llama": (LlamaConfig, LlamaAttention, LlamaRotaryEmbedding, ("q_proj", "k_proj", "v_proj")),
    "mla": (
        DeepseekV3Config, DeepseekV3Attention, DeepseekV3RotaryEmbedding,
        ("q_proj", "q_a_proj", "kv_a_proj_with_mqa"),
    ),
}  # fmt: skip


def tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def load(module: nn.Module, weights: dict[str, np.ndarray]) -> nn.Module:
    """Every parameter from the weights, every weight into a parameter."""
    module.load_state_dict({key: tensor(value) for key, value in weights.items()}, strict=True)
    return module.eval()


def additive_mask(visible_BTT: Any) -> torch.Tensor:
    """[B, 1, T, T]: 0 where visible, the least float elsewhere."""
    return torch.where(tensor(visible_BTT), 0.0, torch.finfo(torch.float32).min)[:, None]


class Attention(nn.Module):
    """One attention of transformers whose input is wider than its output, as in an EAGLE-3 layer."""

    def __init__(self, name: str, hf: dict[str, Any], num_in: int):
        super().__init__()
        make_config, make_attention, make_rotary, readers = FAMILIES[name]
        config = make_config(**hf)
        config._attn_implementation = "eager"  # the plain softmax, which takes any mask
        self.inner = make_attention(config, layer_idx=0)
        for reader in readers:
            if getattr(self.inner, reader, None) is not None:
                setattr(self.inner, reader, nn.Linear(num_in, getattr(self.inner, reader).out_features, bias=False))
        self.rotary = [make_rotary(config)]  # a list keeps its buffers out of the state dict

    def forward(self, x_BTX: torch.Tensor, positions_BT: torch.Tensor, mask_B1TT: torch.Tensor) -> torch.Tensor:
        angles = self.rotary[0](x_BTX, positions_BT)
        return self.inner(hidden_states=x_BTX, position_embeddings=angles, attention_mask=mask_B1TT)[0]


class DraftLayer(nn.Module):
    """An EAGLE-3 draft put together from transformers' blocks; parameter names are those of the serving layout."""

    def __init__(self, name: str, hf: dict[str, Any]):
        super().__init__()
        width, eps = hf["hidden_size"], hf["rms_norm_eps"]
        norm = lambda size=width: LlamaRMSNorm(size, eps)  # noqa: E731
        self.fc = nn.Linear(3 * hf.get("target_hidden_size", width), width, bias=False)
        self.midlayer = nn.Module()
        self.midlayer.input_layernorm, self.midlayer.hidden_norm = norm(), norm()
        attention = Attention(name, hf, 2 * width)
        self.midlayer.self_attn, self.rotary = attention.inner, attention.rotary
        self.midlayer.post_attention_layernorm = norm()
        self.midlayer.mlp = LlamaMLP(
            LlamaConfig(**{"hidden_size": width, "intermediate_size": hf["intermediate_size"]})
        )
        self.norm = norm()
        self.lm_head = nn.Linear(width, hf["draft_vocab_size"], bias=False)

    def forward(self, embeds_BTD, taps_BTKE, positions_BT, mask_B1TT) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden state before the final norm, logits) of the first step."""
        layer, h = self.midlayer, self.fc(taps_BTKE.flatten(2))
        x = torch.cat([layer.input_layernorm(embeds_BTD), layer.hidden_norm(h)], dim=-1)
        angles = self.rotary[0](x, positions_BT)
        h = h + layer.self_attn(hidden_states=x, position_embeddings=angles, attention_mask=mask_B1TT)[0]
        h = h + layer.mlp(layer.post_attention_layernorm(h))
        return h, self.lm_head(self.norm(h))


def run(module: nn.Module, *arrays: Any) -> Any:
    """The module on arrays, without gradients, as numpy."""
    with torch.no_grad():
        return jax.tree.map(lambda out: out.numpy(), module(*map(tensor, arrays)))


def random_model(family: str, fields: dict[str, Any]) -> nn.Module:
    """A causal language model of transformers with random weights of a scale that makes every part count: matrices keep
    the size of what they multiply, norms differ from 1, biases and buffers from 0."""
    make = getattr(transformers, f"{family}ForCausalLM")
    model = make(make.config_class(**fields, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(0)
    learned = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "correction_bias" in n)]
    with torch.no_grad():
        for name, weight in learned:
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(noise / weight.shape[-1] ** 0.5)
            else:
                weight.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    return model
