"""What a compiled training step reduces over devices, and where."""

import collections
import re

import jax


def computations(text: str) -> dict[str, str]:
    """The computations of an HLO module by name."""
    found = {}
    for part in re.split(r"\n\n", text):
        header = re.match(r"\s*(?:ENTRY )?%?([\w.\-]+) \(", part)
        if header:
            found[header.group(1)] = part
    return found


def inside_loops(parts: dict[str, str]) -> set[str]:
    """The computations that some while loop runs."""
    waiting = [name for text in parts.values() for name in re.findall(r"(?:body|condition)=%?([\w.\-]+)", text)]
    seen = set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += [other for other in re.findall(r"%?([\w.\-]+)", parts[name]) if other in parts]
    return seen


def reduced_operands(text: str) -> tuple[collections.Counter, collections.Counter]:
    """Operands of the cross-device reductions inside and outside of loops, counted by shape, turned or not."""
    parts = computations(text)
    loops = inside_loops(parts)
    counts = collections.Counter(), collections.Counter()
    for name, part in parts.items():
        for result in re.findall(r" = (.*?) (?:all-reduce|reduce-scatter)(?:-start)?\(", part):
            shapes = (tuple(sorted(map(int, dims.split(",")))) for dims in re.findall(r"f32\[([\d,]+)\]", result))
            counts[name not in loops].update(shapes)
        assert " reduce-scatter(" not in part  # XLA's CPU compiler makes none: its result would need another shape
    return counts


def matrices(counts: collections.Counter) -> int:
    """How many operands have the rank of a matrix gradient, or of a half of one; activations have more."""
    return sum(number for shape, number in counts.items() if len(shape) == 2)


def matrix_shapes(trained, tensor: int) -> collections.Counter:
    """Of each device's part of the gradients before the reduction: whole along fsdp, cut along tensor."""
    shapes = collections.Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained.params):
        if leaf.ndim > 1:
            name = jax.tree_util.keystr(path)
            cut = 0 if re.search("o_proj|down_proj|embed_tokens|(correction|markov|selector).*lm_head", name) else 1
            once = "q_a_proj|kv_a_proj|mask_hidden|correction.*(input_proj|state_proj|projection)|confidence"
            whole = re.search(f"{once}|selector.*projection|_conv", name)
            parts = (n // (tensor if axis == cut and not whole else 1) for axis, n in enumerate(leaf.shape))
            shapes[tuple(sorted(parts))] += 1
    return shapes
