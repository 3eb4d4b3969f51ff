"""SpecForge's own training step of DFlash, from its wheel, beside flaxdraft's: the same device, sitting and batch.

    pip download specforge==0.2.0 --no-deps -d peers          # and torch, transformers: the extra `parity`
    python experiments/bench_block_peer.py peers/specforge-0.2.0-py3-none-any.whl         # CPU: the check, a tiny draft
    python experiments/bench_block_peer.py peers/specforge-0.2.0-py3-none-any.whl --case qwen3-8b --batch 4 \\
        --length 3072 --compute bfloat16 --attention-chunk 1024 --loss-chunk 2048 --rounds 3        # one GPU

Before any timing both compute the loss and every gradient in float32, on short rows: the same weights, tokens, taps and
anchors. Then each side's step (forward, backward, clipping, AdamW over float32 masters) is timed in a process of its
own, in turn; SpecForge's with flex attention and its defaults. A line each: ms, tokens/s of the text, peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
import torch
from bench_block_step import CASES, make, make_example
from bench_step import DTYPES, seconds
from flax import nnx
from transformers import Qwen3Config

from flaxdraft.algorithms.dflash.drafts import qwen3
from flaxdraft.algorithms.dflash.settings import Settings
from flaxdraft.config import TrainConfig
from flaxdraft.files.name_tables import state_to_torch
from flaxdraft.train.optimizer import optimizer
from flaxdraft.train.state import init_state, split_draft
from flaxdraft.train.step import make_train_step

MOST_APART = 1e-4  # of a gradient's norm, and of the loss


def unpacked(wheel: Path) -> None:
    """Its sources, where torch.compile can read them."""
    folder = tempfile.mkdtemp(prefix="specforge-")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    sys.path.insert(0, folder)


def as_torch(array) -> torch.Tensor:
    """A copy of its own, bfloat16 as float32."""
    array = np.asarray(array)
    return torch.from_numpy(np.array(array, np.float32 if array.dtype.kind == "V" else array.dtype))


def specforge_model(case: str, draft: nnx.Module, anchor_BA, length: int, attention: str, device: str, dtype):
    """SpecForge's draft and objective with the weights of ours, asked for the blocks that ours is."""
    from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel
    from specforge.modeling.draft.dflash import DFlashDraftModel

    c, (_, params, frozen) = draft.config, split_draft(draft)
    config = Qwen3Config(
        **{name: getattr(c, name) for name in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers",
                                               "num_attention_heads", "num_key_value_heads", "head_dim",
                                               "rms_norm_eps")},
        rope_parameters={"rope_type": "default", "rope_theta": c.rope.rope_theta}, max_position_embeddings=32768,
        attention_bias=False, block_size=c.block_size, num_target_layers=36,
        dflash_config={"mask_token_id": c.mask_token_id, "target_layer_ids": [*range(c.num_taps)]},
    )  # fmt: skip
    config._attn_implementation = attention
    model = DFlashDraftModel(config).to(device=device, dtype=dtype)
    weights = state_to_torch(params, qwen3.name_table(c), np.float32)
    model.load_state_dict({name: as_torch(array) for name, array in weights.items()})
    tables = [as_torch(frozen[name][...].astype("float32")).to(device=device, dtype=dtype) for name in
              ("embed_tokens", "head")]  # fmt: skip
    embedding = torch.nn.Embedding.from_pretrained(tables[0], freeze=True)
    head = torch.nn.Linear(c.hidden_size, c.vocab_size, bias=False, device="meta")
    head.weight = torch.nn.Parameter(tables[1], requires_grad=False)
    online = OnlineDFlashModel(
        model,
        head,
        embedding,
        c.mask_token_id,
        c.block_size,
        attention,
        anchor_BA.shape[1],
        loss_decay_gamma=Settings().decay_gamma,
    )
    anchors = as_torch(anchor_BA).long().to(device)
    keep = anchors < length
    online._sample_anchor_positions = lambda *_: (torch.where(keep, anchors, 0), keep)
    return model, online


def specforge_batch(example, device: str, dtype) -> dict[str, torch.Tensor]:
    taps = as_torch(example.features.taps_BTKE.astype("float32")).flatten(2)
    return {
        "input_ids": as_torch(example.batch.tokens_BT).long().to(device),
        "hidden_states": taps.to(device=device, dtype=dtype),
        "loss_mask": as_torch(example.batch.assistant_BT).float().to(device),
    }


def check(case: str, device: str) -> float:
    """The largest relative error of a gradient, norm-wise, and of the loss."""
    draft, algorithm = make(case, "float32")
    example, (graphdef, params, frozen) = make_example(case, algorithm, 2, 48, "float32"), split_draft(draft)

    def loss(params):
        numerator, count = algorithm.sums(nnx.merge(graphdef, params, frozen), example, ()).terms()
        return numerator / count

    with jax.default_matmul_precision("highest"):
        value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    ours = state_to_torch(gradients, qwen3.name_table(draft.config), np.float32)
    anchor_BA = np.asarray(example.chosen.anchor_BA)
    model, online = specforge_model(case, draft, anchor_BA, 48, "eager", device, torch.float32)
    total = online(**specforge_batch(example, device, torch.float32))[0]
    total.backward()
    theirs = {name: weight.grad.cpu().numpy() for name, weight in model.named_parameters()}
    assert theirs.keys() == ours.keys()
    apart = [float(np.linalg.norm(ours[name] - want) / np.linalg.norm(want)) for name, want in theirs.items()]
    return max(abs(float(value) - total.item()) / abs(total.item()), *apart)


def of_flaxdraft(a) -> dict[str, float]:
    how = {"attention_chunk": a.attention_chunk, "loss_chunk": a.loss_chunk, "attention": "chunked"}
    draft, algorithm = make(a.case, a.compute, **how)
    example, (graphdef, params, frozen) = (
        make_example(a.case, algorithm, a.batch, a.length, a.compute),
        split_draft(draft),
    )
    tx = optimizer(TrainConfig(num_steps=1000))
    state = jax.jit(lambda p: init_state(p, tx, algorithm), donate_argnums=0)(params)
    step = make_train_step(graphdef, algorithm, tx, DTYPES[a.compute]).lower(state, frozen, example).compile()

    def call():
        nonlocal state
        state, metrics = step(state, frozen, example)
        return metrics.loss

    took = seconds(call, a.repeats)
    return {"seconds": took, "loss": float(call()), "peak": jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]}


def of_specforge(a) -> dict[str, float]:
    from specforge.optimizer import BF16Optimizer

    dtype = getattr(torch, a.compute)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        draft, algorithm = make(a.case, a.compute)
        example = make_example(a.case, algorithm, a.batch, a.length, a.compute)
        anchor_BA = np.asarray(example.chosen.anchor_BA)
        model, online = specforge_model(a.case, draft, anchor_BA, a.length, "flex_attention", "cuda", dtype)
        batch = specforge_batch(example, "cuda", dtype)
    adamw = BF16Optimizer(model, lr=1e-4, total_steps=1000)

    def call():
        loss = online(**batch)[0]
        loss.backward()
        adamw.step()
        return loss

    for _ in range(3):  # compiles
        call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(a.repeats):
        loss = call()
    torch.cuda.synchronize()
    took = (time.perf_counter() - start) / a.repeats
    return {"seconds": took, "loss": float(loss), "peak": torch.cuda.max_memory_allocated()}


SIDES = {"flaxdraft": of_flaxdraft, "specforge": of_specforge}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--case", choices=CASES, default="tiny")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--compute", choices=DTYPES, default="bfloat16")
    parser.add_argument("--attention-chunk", type=int, default=256)
    parser.add_argument("--loss-chunk", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    a = parser.parse_args()
    unpacked(a.wheel)
    if a.side is not None:
        print(json.dumps(SIDES[a.side](a)))
        return
    apart = check("tiny", "cuda" if torch.cuda.is_available() else "cpu")
    print(f"loss and gradients against SpecForge's: {apart:.2g} apart at most, relative")
    if not apart <= MOST_APART:  # NaN does not pass
        raise SystemExit(f"more than {MOST_APART:g}; nothing is timed")
    if not torch.cuda.is_available():
        print("no GPU: nothing is timed")
        return
    print("| round | side | ms | tokens/s | peak GB |\n" + 5 * "|---" + "|")
    for number in range(a.rounds):
        for side in SIDES:
            told = subprocess.run([sys.executable, *sys.argv, "--side", side], check=True, stdout=subprocess.PIPE)
            found = json.loads(told.stdout.splitlines()[-1])
            if not np.isfinite(found["loss"]):
                raise SystemExit(f"{side}: the loss is not finite")
            rate = a.batch * a.length / found["seconds"]
            print(f"| {number + 1} | {side} | {found['seconds'] * 1e3:.1f} | {rate:,.0f} | {found['peak'] / 1e9:.2f} |",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
