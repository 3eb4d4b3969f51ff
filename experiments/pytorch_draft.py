"""EAGLE-3's training step for a Llama draft in plain PyTorch, to be timed beside flaxdraft's.

Written as one would without flaxdraft: fused attention where there is one (`scaled_dot_product_attention` at the first
step; later steps add their own keys to the scores, as the published EAGLE-3 code does), grouped heads without copies of
the keys, the head at supervised rows alone, the teacher's probabilities made once and read by every step, fused AdamW.
Parameters are named as in the servers' files.

Shape letters: B batch, T time, R computed rows, J steps, D draft width, E target width, W draft vocabulary, N query
heads, K key/value heads (G = N / K share one), H head width, M supervised rows of a step.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flaxdraft.algorithms.eagle3.drafts import llama


@dataclasses.dataclass(frozen=True)
class TorchBatch:
    """One batch as a loader would hand it over: everything that depends on masks alone is in it already."""

    tokens_BT: Tensor  # J zeros follow
    taps_BTF: Tensor  # the three tapped states side by side
    last_ME: Tensor  # of the rows after the supervised ones of every step
    rows_BR: Tensor | None  # the rows to compute; None computes all
    at_J: list[Tensor]  # of each step: its supervised rows in [B R]
    teacher_J: list[Tensor]  # of each step: their teachers among `last_ME`
    argmax_J: list[Tensor]  # of each step: the draft id of the target's choice


class Attention(nn.Module):
    def __init__(self, c: llama.Config):
        super().__init__()
        self.heads, self.kv_heads, self.width = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        num_in, linear = 2 * c.hidden_size, lambda i, o: nn.Linear(i, o, bias=False)
        self.q_proj = linear(num_in, self.heads * self.width)
        self.k_proj, self.v_proj = (linear(num_in, self.kv_heads * self.width) for _ in range(2))
        self.o_proj = linear(self.heads * self.width, c.hidden_size)

    def cut(self, x_BTF: Tensor) -> Tensor:
        """[B, heads, T, H]."""
        return x_BTF.unflatten(-1, (-1, self.width)).transpose(1, 2)

    def attend(self, q_BNRH, keys, values, seen_BRT) -> Tensor:
        """To the first step's keys as far as they are seen, and to each row's own keys of the steps after it."""
        (k0, *own_k), (v0, *own_v) = keys, values
        if not own_k:
            mask = {"is_causal": True} if seen_BRT is None else {"attn_mask": seen_BRT[:, None]}
            return F.scaled_dot_product_attention(q_BNRH, k0, v0, enable_gqa=True, **mask)
        q_BKGRH = q_BNRH.unflatten(1, (self.kv_heads, -1)) * self.width**-0.5
        scores = (q_BKGRH.flatten(2, 3) @ k0.transpose(2, 3)).unflatten(2, q_BKGRH.shape[2:4])
        if seen_BRT is None:
            seen_BRT = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()[None]
        scores = scores.masked_fill(~seen_BRT[:, None, None], -torch.inf)
        own = [(q_BKGRH * k[:, :, None]).sum(-1, keepdim=True) for k in own_k]
        weights = torch.cat([scores, *own], dim=-1).softmax(-1)
        first, *rest = weights.split([k0.shape[2], *[1] * len(own)], dim=-1)
        out = (first.flatten(2, 3) @ v0).unflatten(2, q_BKGRH.shape[2:4])
        for weight, v in zip(rest, own_v, strict=True):
            out = out + weight * v[:, :, None]
        return out.flatten(1, 2)


class MLP(nn.Module):
    def __init__(self, c: llama.Config):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(c.hidden_size, c.intermediate_size, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TorchDraft(nn.Module):
    """The whole draft; see flaxdraft/algorithms/eagle3/draft.py for the equations."""

    def __init__(self, c: llama.Config, embedding_VD: Tensor, head_WE: Tensor, step_weights: tuple[float, ...]):
        super().__init__()
        norm = lambda: nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)  # noqa: E731
        self.embedding_VD, self.head_WE, self.step_weights = embedding_VD, head_WE, step_weights
        self.fc = nn.Linear(3 * c.target_hidden_size, c.hidden_size, bias=False)
        self.midlayer = nn.Module()
        self.midlayer.input_layernorm, self.midlayer.hidden_norm = norm(), norm()
        self.midlayer.self_attn = Attention(c)
        self.midlayer.post_attention_layernorm = norm()
        self.midlayer.mlp = MLP(c)
        self.norm = norm()
        self.lm_head = nn.Linear(c.hidden_size, c.draft_vocab_size, bias=False)
        frequency = c.rope.rope_theta ** -(torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
        self.frequency = frequency.float()

    def rotated(self, x_BNTH: Tensor, positions_BT: Tensor) -> Tensor:
        angle = positions_BT[:, None, :, None] * self.frequency
        cos, sin = angle.cos(), angle.sin()
        a, b = x_BNTH.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def unroll(self, batch: TorchBatch) -> list[Tensor]:
        """Hidden states of every step, at the rows to compute."""
        layer, attention = self.midlayer, self.midlayer.self_attn
        length, rows_BR = batch.taps_BTF.shape[1], batch.rows_BR
        at_T = torch.arange(length)
        embeds = layer.input_layernorm(F.embedding(batch.tokens_BT, self.embedding_VD))
        hidden_BTD = self.fc(batch.taps_BTF)
        x0 = torch.cat([embeds[:, 1 : length + 1], layer.hidden_norm(hidden_BTD)], dim=-1)
        positions, x, hidden, seen = at_T[None], x0, hidden_BTD, None
        if rows_BR is not None:
            positions, seen = rows_BR, at_T <= rows_BR[..., None]
            x, hidden = (torch.take_along_dim(y, rows_BR[..., None], dim=1) for y in (x0, hidden_BTD))
        keys = [self.rotated(attention.cut(attention.k_proj(x0)), at_T[None])]
        values, outputs = [attention.cut(attention.v_proj(x0))], []
        for j in range(len(self.step_weights)):
            if j > 0:
                tokens = embeds[:, 1 + j : length + 1 + j]
                if rows_BR is not None:
                    tokens = torch.take_along_dim(embeds, rows_BR[..., None] + 1 + j, dim=1)
                x = torch.cat([tokens, layer.hidden_norm(hidden)], dim=-1)
                keys.append(self.rotated(attention.cut(attention.k_proj(x)), positions + j))
                values.append(attention.cut(attention.v_proj(x)))
            q = self.rotated(attention.cut(attention.q_proj(x)), positions + j)
            heads = attention.attend(q, keys, values, seen)
            hidden = hidden + attention.o_proj(heads.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            outputs.append(hidden)
        return outputs

    def forward(self, batch: TorchBatch) -> tuple[Tensor, list[Tensor]]:
        """The loss, and the top-1 hits of each step, which every trainer logs."""
        with torch.no_grad():
            teacher_MW = (batch.last_ME @ self.head_WE.T).softmax(-1)
        loss, count, hits = 0.0, 0.0, []
        steps = zip(self.step_weights, self.unroll(batch), batch.at_J, batch.teacher_J, batch.argmax_J, strict=True)
        for weight, hidden, at, teacher, argmax in steps:
            logits_MW = self.lm_head(self.norm(hidden.flatten(0, 1)[at]))
            loss = loss + weight * F.cross_entropy(logits_MW, teacher_MW[teacher], reduction="sum")
            count += weight * len(at)
            hits.append((logits_MW.detach().argmax(-1) == argmax).sum())
        return loss / count, hits


def training_step(draft: TorchDraft, forward, optimizer, schedule, clip_norm: float, batch: TorchBatch) -> Tensor:
    """Forward, backward, clipping and AdamW; returns the loss.

    Args:
        forward: the draft, or what `torch.compile` made of it.
    """
    optimizer.zero_grad(set_to_none=True)
    loss, _ = forward(batch)
    loss.backward()
    nn.utils.clip_grad_norm_(draft.parameters(), clip_norm, foreach=True)
    optimizer.step()
    schedule.step()
    return loss.detach()
