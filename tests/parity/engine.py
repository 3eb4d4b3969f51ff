"""A serving engine's EAGLE-3 draft in PyTorch, from the contract alone: config.json and safetensors in, tokens out.

It shares nothing with the package. Norms are fused with the residual add, latent attention runs in its absorbed form on
a cache of latents, rotary tables come from `rope_parameters`, the head's tokens go through d2t. Needs PyTorch.

Shape letters: T rows, D draft width, N heads, H head width, L latent rank.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


def load_directory(directory: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")


def get_mscale(scale: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(scale) + 1.0 if scale > 1 else 1.0


def rotary(config: dict, width: int, latent: bool) -> tuple[torch.Tensor, float]:
    """(angle a position of each pair, what multiplies cos and sin)."""
    p = config["rope_parameters"]
    frequency = 1.0 / p["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    kind = p["rope_type"]
    if kind == "default":
        return frequency, 1.0
    factor = p["factor"]
    if kind == "linear":
        return frequency / factor, 1.0
    old = p["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = p["low_freq_factor"], p["high_freq_factor"]
        out = []
        for f in frequency.tolist():
            wave = 2 * math.pi / f
            smooth = (old / wave - low) / (high - low)
            blend = (1 - smooth) * f / factor + smooth * f
            out.append(f if wave < old / high else f / factor if wave > old / low else blend)
        return torch.tensor(out, dtype=torch.float64), 1.0
    assert kind == "yarn"

    def correction(rotations):
        return width * math.log(old / (rotations * 2 * math.pi)) / (2 * math.log(p["rope_theta"]))

    first = max(math.floor(correction(p.get("beta_fast", 32))), 0)
    last = min(math.ceil(correction(p.get("beta_slow", 1))), width - 1)
    ramp = ((torch.arange(width // 2, dtype=torch.float64) - first) / max(last - first, 0.001)).clamp(0, 1)
    frequency = frequency / factor * ramp + frequency * (1 - ramp)
    if latent:  # DeepSeek's own formula
        return frequency, get_mscale(factor, p["mscale"]) / get_mscale(factor, p["mscale_all_dim"])
    return frequency, get_mscale(factor)


def rotate(x_TNH: torch.Tensor, positions_T: torch.Tensor, frequency, factor: float, interleaved: bool) -> torch.Tensor:
    angle = (positions_T[:, None].double() * frequency)[:, None]
    cos, sin = (angle.cos() * factor).float(), (angle.sin() * factor).float()
    out = torch.empty_like(x_TNH)
    half = x_TNH.shape[-1] // 2
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, half), slice(half, None))
    a, b = x_TNH[..., first], x_TNH[..., second]
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out


class Draft:
    """One sequence with its cache."""

    def __init__(self, config: dict, tensors: dict[str, torch.Tensor], embedding_VD, *, scale_like_nemo: bool = False):
        """
        Args:
            embedding_VD: the target's, for drafts without their own.
            scale_like_nemo: neither of YaRN's factors, as that trainer's MLA draft has it.
        """
        self.config, self.w = config, {name: value for name, value in tensors.items() if name not in ("d2t", "t2d")}
        self.embedding = self.w.get("embed_tokens.weight", embedding_VD)
        d2t = tensors.get("d2t", torch.zeros(self.w["lm_head.weight"].shape[0], dtype=torch.int64))
        self.target_ids = torch.arange(len(d2t)) + d2t
        self.latent = "kv_lora_rank" in config
        c = config
        if self.latent:
            self.frequency, self.factor = rotary(c, c["qk_rope_head_dim"], latent=True)
            self.scale = (c["qk_nope_head_dim"] + c["qk_rope_head_dim"]) ** -0.5
            p = c["rope_parameters"]
            if p["rope_type"] != "default" and p.get("mscale_all_dim"):
                self.scale *= get_mscale(p["factor"], p["mscale_all_dim"]) ** 2
            if scale_like_nemo:
                self.factor, self.scale = 1.0, (c["qk_nope_head_dim"] + c["qk_rope_head_dim"]) ** -0.5
        else:
            width = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
            self.frequency, self.factor = rotary(c, width, latent=False)
            self.scale = width**-0.5
        self.cache = None

    def norm(self, x, name: str):
        return F.rms_norm(x, (x.shape[-1],), self.w[name + ".weight"], self.config["rms_norm_eps"])

    def add_and_norm(self, x, residual, name: str):
        """The fused kernel: the sum goes on as the residual, its norm is what the next block reads."""
        total = x + residual
        return self.norm(total, name), total

    def linear(self, x, name: str):
        return x @ self.w[name + ".weight"].T

    def forward(self, tokens_T, hidden, positions_T) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits, what the next step reads) of new rows; hidden are tapped states [T, 3, E] or draft states [T, D]."""
        embeds = self.embedding[tokens_T]
        hidden = hidden.flatten(1)
        if hidden.shape[-1] != embeds.shape[-1]:  # engines tell them apart so
            if self.config.get("fc_norm"):
                hidden = torch.cat(
                    [self.norm(h, f"fc_norm.{i}") for i, h in enumerate(hidden.chunk(3, dim=-1))], dim=-1
                )
            if self.config.get("norm_before_fc"):
                hidden = self.norm(hidden, "input_norm")
            hidden = self.linear(hidden, "fc")
        residual, normed = hidden, self.norm(hidden, "midlayer.hidden_norm")
        if self.config.get("norm_before_residual"):
            residual = normed
        x = torch.cat([self.norm(embeds, "midlayer.input_layernorm"), normed], dim=-1)
        attend = self.attend_latents if self.latent else self.attend_heads
        x, residual = self.add_and_norm(attend(x, positions_T), residual, "midlayer.post_attention_layernorm")
        gate, up = (self.linear(x, f"midlayer.mlp.{p}_proj") for p in ("gate", "up"))
        x = self.linear(F.silu(gate) * up, "midlayer.mlp.down_proj")
        normed, before = self.add_and_norm(x, residual, "norm")
        return self.linear(normed, "lm_head"), normed if self.config.get("norm_output") else before

    def remember(self, *new):
        self.cache = new if self.cache is None else [torch.cat(pair) for pair in zip(self.cache, new, strict=True)]
        return self.cache

    def weights_of(self, scores_NTS, positions_T):
        visible = torch.arange(scores_NTS.shape[-1]) <= positions_T[:, None]
        return torch.softmax((scores_NTS * self.scale).masked_fill(~visible, -torch.inf), dim=-1)

    def attend_heads(self, x, positions_T):
        at, heads = "midlayer.self_attn.", self.config["num_attention_heads"]
        kv_heads = self.config.get("num_key_value_heads", heads)
        q, k, v = (self.linear(x, f"{at}{p}_proj").unflatten(-1, (n, -1)) for p, n in
                   (("q", heads), ("k", kv_heads), ("v", kv_heads)))  # fmt: skip
        if f"{at}q_norm.weight" in self.w:  # Qwen3's, of each head
            q, k = self.norm(q, f"{at}q_norm"), self.norm(k, f"{at}k_norm")
        q, k = (rotate(part, positions_T, self.frequency, self.factor, interleaved=False) for part in (q, k))
        k, v = (part.repeat_interleave(heads // kv_heads, dim=1) for part in self.remember(k, v))
        weights = self.weights_of(torch.einsum("tnh,snh->nts", q, k), positions_T)
        return self.linear(torch.einsum("nts,snh->tnh", weights, v).flatten(1), at + "o_proj")

    def attend_latents(self, x, positions_T):
        """Absorbed: queries go into the latent space, values come out of it after the softmax."""
        at, c = "midlayer.self_attn.", self.config
        nope, rank, heads = c["qk_nope_head_dim"], c["kv_lora_rank"], c["num_attention_heads"]
        q = self.norm(self.linear(x, at + "q_a_proj"), at + "q_a_layernorm")
        q = self.linear(q, at + "q_b_proj").unflatten(-1, (heads, -1))
        compressed = self.linear(x, at + "kv_a_proj_with_mqa")
        latent = self.norm(compressed[:, :rank], at + "kv_a_layernorm")
        k_rope = rotate(compressed[:, None, rank:], positions_T, self.frequency, self.factor, interleaved=True)
        q_rope = rotate(q[..., nope:], positions_T, self.frequency, self.factor, interleaved=True)
        latents, keys = self.remember(latent, k_rope[:, 0])
        up = self.w[at + "kv_b_proj.weight"].unflatten(0, (heads, -1))
        q_latent = torch.einsum("tnh,nhl->tnl", q[..., :nope], up[:, :nope])
        scores = torch.einsum("tnl,sl->nts", q_latent, latents) + torch.einsum("tnr,sr->nts", q_rope, keys)
        read = torch.einsum("nts,sl->tnl", self.weights_of(scores, positions_T), latents)
        return self.linear(torch.einsum("tnl,nvl->tnv", read, up[:, nope:]).flatten(1), at + "o_proj")

    @torch.no_grad()
    def propose(self, tokens, taps_TKE, num_steps: int) -> tuple[list[int], list[torch.Tensor]]:
        """The greedy chain behind a prompt and its first answer token, and the state that each step feeds back.

        Row p of the prefill holds the tapped states of p and the token p + 1.
        """
        num = len(tokens) - 1
        logits, state = self.forward(torch.as_tensor(tokens[1:]), torch.as_tensor(taps_TKE[:num]), torch.arange(num))
        chain, states = [int(self.target_ids[logits[-1].argmax()])], [state[-1]]
        for j in range(1, num_steps):
            logits, state = self.forward(torch.tensor(chain[-1:]), states[-1][None], torch.tensor([num - 1 + j]))
            chain.append(int(self.target_ids[logits[-1].argmax()]))
            states.append(state[-1])
        return chain, states
