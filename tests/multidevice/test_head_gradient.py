"""The head's gradient over eight devices: reduced at once, or left to whoever accumulates."""

import jax
import numpy as np
import pytest
from closeness import assert_close
from test_distillation import ACCEPTED, WEIGHTS, make, weighted

from flaxdraft.devices.mesh import BATCH_AXIS, make_mesh
from flaxdraft.ops.distillation import DistillOptions, distill

pytestmark = pytest.mark.numeric

NUM_BATCHES = 3


def head_gradient(num_devices: int, reduced: bool):
    """Gradient of the head over several batches, added up before it is reduced; with the compiled program's text."""
    mesh = make_mesh(num_devices)
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, jax.P(BATCH_AXIS))
        everywhere = jax.NamedSharding(mesh, jax.P())
        states, head, teacher, teacher_head, supervised = make(batch=8)
        states, teacher = jax.device_put((states, teacher), rows)
        supervised = jax.device_put(supervised, jax.NamedSharding(mesh, jax.P(None, BATCH_AXIS)))
        head, teacher_head = jax.device_put((head, teacher_head), everywhere)

        def accumulated(head):
            def loss(head, states):
                plan = DistillOptions(WEIGHTS, chunk=4)
                return weighted(distill(plan, states, head, teacher, teacher_head, supervised, ACCEPTED)[0])

            work = jax.reshard(head, jax.P(None, None, reduced={BATCH_AXIS})) if reduced else head
            total = None
            for i in range(NUM_BATCHES):
                scaled = tuple(x * (1.0 + i) for x in states)
                grad = jax.grad(loss)(work, scaled)
                total = grad if total is None else total + grad
            return jax.reshard(total, jax.P(None, None))

        compiled = jax.jit(accumulated).lower(head).compile()
        return np.asarray(compiled(head)), compiled.as_text()


def reductions(text: str, shape: tuple[int, ...]) -> int:
    """All-reduced operands of the given shape in a compiled program."""
    wanted = f"f32[{','.join(map(str, shape))}]"
    return sum(line.split(" all-reduce(")[0].count(wanted) for line in text.splitlines() if " all-reduce(" in line)


@pytest.mark.parametrize("reduced", [False, True])
def test_one_and_eight_devices_agree(reduced):
    want, _ = head_gradient(1, False)
    got, text = head_gradient(8, reduced)
    assert_close(got, want, ulp=8, of="norm")
    assert reductions(text, want.shape) == (1 if reduced else NUM_BATCHES)
