"""One host of a run of several: evaluates its share of the answers, for each way to share them out, and prints what
all hosts' parts come to. Arguments: its number, how many there are, the coordinator's port; one process needs none."""

import json
import sys
from pathlib import Path

import jax

index, count = (int(sys.argv[1]), int(sys.argv[2])) if len(sys.argv) > 1 else (0, 1)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_disable_most_optimizations", True)
if count > 1:
    jax.distributed.initialize(f"localhost:{sys.argv[3]}", num_processes=count, process_id=index)

sys.path.insert(0, str(Path(__file__).parents[1]))
from agreeing import VOCAB, make_draft, make_target, prompts  # noqa: E402 (devices are set first)
from flaxdraft.evaluate.hosts import gather_parts  # noqa: E402

from flaxdraft.algorithms.eagle3.objective import Algorithm  # noqa: E402
from flaxdraft.decode.decoding import Settings  # noqa: E402
from flaxdraft.decode.greedy import answer_greedily  # noqa: E402
from flaxdraft.devices.mesh import Sharding, make_mesh  # noqa: E402
from flaxdraft.evaluate.during_training import make_decoded_accept_length  # noqa: E402
from flaxdraft.evaluate.walk import evaluate_teacher_forced, make_accepted  # noqa: E402
from flaxdraft.train.batch_placement import evaluation_batch, own_rows  # noqa: E402
from flaxdraft.train.state import split_draft  # noqa: E402

target = make_target()
rows = answer_greedily(target, prompts(7), 16, 7, 7, lambda num: None)
graphdef, params, frozen = split_draft(make_draft("llama", target))
algorithm = Algorithm(3)
accepted = make_accepted(graphdef, algorithm, frozen, target.head()[VOCAB.target_ids_W])(params)


def show(forced, here):
    total = jax.tree.map(lambda x: x.tolist(), forced.total)
    figures = {name: getattr(total.sums, name) for name in vars(total.sums)}
    figures |= {"passes": total.passes, "gained": total.gained, "answers_here": here}
    ratios = [forced.accept_length, forced.mean_over_rows(), forced.product_of_marginals(), *forced.accuracy().tolist()]
    print(json.dumps(figures | {"ratios": ratios, "loss": forced.mean_loss}), flush=True)


for share in (rows[index::count], rows if index == 0 else []):  # shared out evenly; all to one host
    show(evaluate_teacher_forced(accepted, share, algorithm, 3, gather_parts), len(share))

own_draft = graphdef, frozen
# As the trainer does it: one program over all processes, which holds a part of every batch on each.
mesh = make_mesh(jax.device_count())
with jax.set_mesh(mesh):
    everywhere = jax.NamedSharding(mesh, jax.P())
    parts = jax.device_get((params, frozen, target.head()[VOCAB.target_ids_W]))
    params, frozen, head = jax.tree.map(lambda x: jax.device_put(x, everywhere), parts)
    graphdef = split_draft(make_draft("llama", target, sharding=Sharding.parallel()))[0]
    place = lambda host: evaluation_batch(own_rows(host, mesh), mesh)  # noqa: E731
    accepted = make_accepted(graphdef, algorithm, frozen, head, place)(params)
    show(evaluate_teacher_forced(accepted, rows, algorithm, 4), len(rows))
    # Real decoding: each process takes some of the prompts.
    decoded = make_decoded_accept_length(target, *own_draft, rows, 5, Settings(16, 3, (7,)))
    print(json.dumps({"decoded": decoded(params)}), flush=True)
