"""One host of a run of several: evaluates all answers by itself, then together with the others as the trainer does,
and decodes with a target that lies in pieces on all of them; prints what each comes to. Domino's scalar accuracies come
in lines of their own: one process's of all answers and of two parts of them, several processes' of all. Arguments: its
number, how many there are, the coordinator's port; one process needs none."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

index, count = (int(sys.argv[1]), int(sys.argv[2])) if len(sys.argv) > 1 else (0, 1)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_disable_most_optimizations", True)
if count > 1:
    jax.distributed.initialize(f"localhost:{sys.argv[3]}", num_processes=count, process_id=index)

sys.path.insert(0, str(Path(__file__).parents[1]))
from agreeing import VOCAB, make_draft, make_target, prompts  # noqa: E402 (devices are set first)
from eagle3 import algorithm as make_algorithm  # noqa: E402
from said_by_heart import make_algorithm as make_domino  # noqa: E402
from said_by_heart import make_draft as make_domino_draft  # noqa: E402

from flaxdraft.data.answers import answer_greedily  # noqa: E402
from flaxdraft.decode.decoding import Settings  # noqa: E402
from flaxdraft.devices.mesh import make_mesh  # noqa: E402
from flaxdraft.devices.sharding import Sharding  # noqa: E402
from flaxdraft.evaluate.during_training import UntrainedDraft, make_decoded_accept_length  # noqa: E402
from flaxdraft.evaluate.walk import evaluate_teacher_forced, make_accepted  # noqa: E402
from flaxdraft.train.batch_placement import own_rows, placed_rows  # noqa: E402
from flaxdraft.train.state import split_draft  # noqa: E402

target = make_target()
rows = answer_greedily(target, prompts(7), 16, (7,), 7, lambda num: None)
graphdef, params, frozen = split_draft(make_draft("llama", target))
algorithm = make_algorithm(3)
accepted = make_accepted(graphdef, algorithm, frozen, target.head()[VOCAB.target_ids_W])(params)


def show(forced):
    total = jax.tree.map(lambda x: x.tolist(), forced.total)
    figures = {name: getattr(total.sums, name) for name in vars(total.sums)}
    figures |= {"passes": total.passes, "gained": total.gained}
    found = forced.figures()
    ratios = [found[name] for name in ("accept_length", "mean_over_rows", "product_of_marginals")] + found["accuracy"]
    print(json.dumps(figures | {"ratios": ratios, "loss": found["loss"]}), flush=True)


def show_scalars(forced):
    """Domino's accuracies, and the counts that they should be of."""
    sums, figures = forced.total.sums, forced.figures()
    counts = {"hits": sums.blocks.hit_Q, "base_hits": sums.base_hit_Q, "tokens": sums.blocks.asked_Q}
    told = {name: figures[name] for name in ("token_accuracy", "base_token_accuracy", "accept_length")}
    print(json.dumps({"scalars": told | {name: x.tolist() for name, x in counts.items()}}), flush=True)


show(evaluate_teacher_forced(accepted, rows, algorithm, 3))
most = int(np.argmax(np.bincount(np.concatenate([row.tokens[row.num_prompt :] for row in rows]))))
domino, of_heart = make_domino(), split_draft(make_domino_draft(target, most))
if count == 1:
    scored = make_accepted(of_heart[0], domino, of_heart[2], ())(of_heart[1])
    for some in (rows, rows[:4], rows[4:]):  # 3, 3 and 1 in a batch; 3 and 1; 3
        show_scalars(evaluate_teacher_forced(scored, some, domino, 3))
own_draft = UntrainedDraft(graphdef, frozen, algorithm.drafter())
# As the trainer does it: one program over all processes, which holds a part of every batch on each.
mesh = make_mesh(jax.device_count())
with jax.set_mesh(mesh):
    everywhere = jax.NamedSharding(mesh, jax.P())
    parts = jax.device_get((params, frozen, target.head()[VOCAB.target_ids_W]))
    params, frozen, head = jax.tree.map(lambda x: jax.device_put(x, everywhere), parts)
    graphdef = split_draft(make_draft("llama", target, sharding=Sharding.parallel()))[0]
    place = lambda host: placed_rows(own_rows(host, mesh), mesh)  # noqa: E731
    accepted = make_accepted(graphdef, algorithm, frozen, head, place)(params)
    show(evaluate_teacher_forced(accepted, rows, algorithm, 4))
    if count > 1:
        heart = nnx.eval_shape(lambda: make_domino_draft(target, most, sharding=Sharding.parallel()))
        trained, kept = jax.tree.map(lambda x: jax.device_put(x, everywhere), jax.device_get(of_heart[1:]))
        scored = make_accepted(split_draft(heart)[0], domino, kept, (), place)(trained)
        show_scalars(evaluate_teacher_forced(scored, rows, domino, 4))  # two rows or one of each batch on a process
    # Real decoding: all processes decode all prompts, with a target in pieces on them.
    split = target if count == 1 else make_target(mesh=make_mesh(1, count))
    decoded = make_decoded_accept_length(split, own_draft, rows, 5, Settings(16, 3, (7,)))
    print(json.dumps({"decoded": decoded(params)}), flush=True)
