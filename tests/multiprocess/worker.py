"""One process of a small training run: the real stages and guards, around a target that is a few random arrays.

python worker.py CONFIG.yaml RESULT.json [field=value ...]
"""

import hashlib
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from flaxdraft.config import load_config
from flaxdraft.data.documents import Answer, AnsweredPrompts, Documents
from flaxdraft.data.draft_vocabulary import choose_vocab
from flaxdraft.devices import hosts
from flaxdraft.interfaces import Features
from flaxdraft.progress import process_log
from flaxdraft.run.material import Material
from flaxdraft.run.setup import Setup, claim_folders, prepare
from flaxdraft.run.supervise import supervised
from flaxdraft.run.training import train_draft
from flaxdraft.serving.trained_draft import AboutTarget
from flaxdraft.stages.directory_lock import directory_lock
from flaxdraft.targets import llama

V, E, LENGTH = 64, 32, 14


def target_stub():
    """What training asks of a target: its sizes, and the arrays that the draft and its teacher take over."""
    hf = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": V, "hidden_size": E,
        "intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }  # fmt: skip
    config = llama.Config.from_hf(hf, (1, 3, 4))
    rng = np.random.default_rng(0)
    embedding, head = (jnp.asarray(rng.normal(size=(V, E)), jnp.float32) for _ in range(2))
    model = SimpleNamespace(
        config=config, embedding=lambda: embedding, head=lambda: head, final_norm=lambda: jnp.ones(E)
    )
    return SimpleNamespace(
        config=config,
        loaded=SimpleNamespace(model=model),
        opened=SimpleNamespace(path=Path("stub"), source=SimpleNamespace(config=hf)),
        about=AboutTarget(hf, config.tap_layers),
    )


def rows(num: int, seed: int, broken: list[int], length: int = LENGTH) -> list[Answer]:
    """Answers whose features say something about the next tokens; those of `broken` rows are NaN."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(1).normal(size=(V, 3, E)).astype(np.float32)
    out = []
    for i in range(num):
        tokens = rng.integers(0, V // 4, length).astype(np.int32)
        taps = directions[np.roll(tokens, -2)] + 0.1 * rng.normal(size=(length, 3, E)).astype(np.float32)
        last = rng.normal(size=(length, E)).astype(np.float32)
        features = Features(taps * (np.nan if i in broken else 1), last, np.roll(tokens, -1), np.full(length, 4.0, "f"))
        out.append(Answer(tokens, 3, features))
    return out


def stub_answers(directory: Path) -> SimpleNamespace:
    """Answers that were made up on the spot."""
    made = {"train": rows(24, 2, json.loads(os.environ.get("WORKER_BROKEN", "[]"))), "held_out": rows(3, 3, [])}
    return SimpleNamespace(directory=directory, rows=made.__getitem__, special=[0, 1], stops=[0])


def material_of(setup: Setup, documents: Documents | None = None) -> Material:
    """What a small run trains on, around the stub of a target."""
    target, answers = target_stub(), stub_answers(setup.data_dir)
    documents = AnsweredPrompts(answers.rows("train"), V) if documents is None else documents
    vocab = choose_vocab(documents.token_counts, [0, 1], setup.config.draft.draft_vocab_size)
    return Material(target, answers, documents, vocab, target.loaded.model)


def train(runs, name: str, *overrides: str, documents: Documents | None = None):
    """A small run in this process, on two devices where the overrides do not say otherwise; its parameters, whose
    digest is kept like that of a run in a process of its own."""
    config = load_config(str(runs.root / "run.yaml"), [f"output_dir={runs.root / name}", "mesh.data=2", *overrides])
    setup = prepare(config)
    claim_folders(setup)
    params = train_draft(setup, material_of(setup, documents)).params
    write_result(runs.result(name), params)
    return params


def write_result(path: Path, params) -> None:
    """A digest of the weights, and the sum of magnitudes of each."""
    leaves = jax.tree.leaves(params)
    digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in leaves)).hexdigest()
    path.write_text(json.dumps({"digest": digest, "params": [float(np.abs(x).sum()) for x in leaves]}))


def work(config, result: Path) -> None:
    setup = prepare(config)
    claim_folders(setup)
    log = process_log(setup.draft_dir / "logs" / f"process-{jax.process_index()}.log", speaks=hosts.is_main())
    with log, directory_lock(setup.draft_dir) if hosts.is_main() else nullcontext():
        params = train_draft(setup, material_of(setup)).params
    write_result(result, params)


def main() -> int:
    sys.modules["torch"] = None  # TensorBoard's writer would import it, which takes a quarter of a small run's time
    config = load_config(sys.argv[1], sys.argv[3:])
    return supervised(config.hosts, lambda: work(config, Path(sys.argv[2])))


if __name__ == "__main__":
    sys.exit(main())
