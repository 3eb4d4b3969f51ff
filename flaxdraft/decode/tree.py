"""A tree of draft tokens instead of a chain: several guesses at each place, all verified by one target pass (greedy).

The tree's shape is static: so many children of the root, of each of these, and so on, each node's being the draft's
likeliest tokens behind it. Nodes of one depth share a position, so in both caches node i lies i slots behind the root
and sees what lies before the root, and its own ancestors: tree attention as in arXiv 2305.09781 and
arXiv 2401.15077. What the target agrees with is one path from the root; its keys and values are moved to where a
chain would have left them, and the other branches are written over by the next pass.

Shape letters: B rows, N nodes (the root, node 0, is the newest real token), Q nodes without the root, T nodes of one
depth or of one path, S slots, X columns of a table.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from flaxdraft.errors import InputError
from flaxdraft.interfaces import Placement

MOST_NODES = 512  # each is a row of every target pass, and attends to the whole cache


@dataclasses.dataclass(frozen=True)
class Tree:
    """Nodes are numbered depth by depth, children beside their siblings."""

    widths: tuple[int, ...]  # children of a node, by its depth

    def __post_init__(self):
        given = " ".join(map(str, self.widths))
        if min(self.widths) < 1:
            raise InputError(f"tree: found widths {given}, expected each at least 1")
        if self.num_nodes - 1 > MOST_NODES:
            raise InputError(
                f"tree: widths {given} make {self.num_nodes - 1} draft tokens a target pass, expected at most "
                f"{MOST_NODES}; take fewer or smaller widths"
            )

    @property
    def num_nodes(self) -> int:
        return 1 + int(sum(np.cumprod(self.widths, dtype=object)))

    def level(self, depth: int) -> slice:
        """The nodes of a depth."""
        sizes = np.cumprod((1, *self.widths))
        return slice(int(sizes[:depth].sum()), int(sizes[: depth + 1].sum()))

    @cached_property
    def parent_Q(self) -> np.ndarray:
        levels = [self.level(depth) for depth in range(len(self.widths))]
        nodes = [np.arange(level.start, level.stop) for level in levels]
        return np.concatenate([np.repeat(level_T, width) for level_T, width in zip(nodes, self.widths, strict=True)])

    @cached_property
    def sees_NN(self) -> np.ndarray:
        """bool: whether the second is the first or one of its ancestors."""
        sees_NN = np.eye(self.num_nodes, dtype=bool)
        for node, parent in enumerate(self.parent_Q, 1):
            sees_NN[node] |= sees_NN[parent]
        return sees_NN

    def place(self, root_B: Int[Array, " B"], nodes: slice, num_slots: int) -> tuple[Int[Array, "B T"], Placement]:
        """Positions of some nodes, and their places in a cache whose slot `root_B` is the root's (the number of slots
        marks padding)."""
        sees_TN = self.sees_NN[nodes]
        depth_T, node_T = sees_TN.sum(axis=1, dtype=np.int32) - 1, np.arange(self.num_nodes, dtype=np.int32)[nodes]
        # A column more on either side: everyone sees what lies before the root, nobody what lies behind the tree.
        table_TX = np.pad(np.pad(sees_TN, ((0, 0), (1, 0)), constant_values=True), ((0, 0), (0, 1)))
        ahead_BS = jnp.arange(num_slots)[None] - root_B[:, None]
        visible_TBS = jnp.asarray(table_TX)[:, jnp.clip(ahead_BS, -1, self.num_nodes) + 1]
        slots_BT = root_B[:, None] + jnp.asarray(node_T)[None]
        return root_B[:, None] + jnp.asarray(depth_T)[None], Placement(slots_BT, jnp.moveaxis(visible_TBS, 0, 1))


def right_path(
    tree: Tree, tokens_BN: Int[Array, "B N"], said_BN: Int[Array, "B N"]
) -> tuple[Int[Array, " B"], Int[Array, "B T"]]:
    """How many nodes below the root the target agrees with, and the path through them: the node of each depth.

    Siblings differ, so there is one path at most; behind its end the nodes are any.

    Args:
        said_BN: the target's own token behind each node.
    """
    right_BQ = tokens_BN[:, 1:] == said_BN[:, tree.parent_Q]
    reached_BQ = jnp.all(right_BQ[:, None] | ~jnp.asarray(tree.sees_NN[1:, 1:])[None], axis=-1)
    reached_BN = jnp.pad(reached_BQ, ((0, 0), (1, 0)), constant_values=True)
    levels = [tree.level(depth) for depth in range(len(tree.widths) + 1)]
    path = [level.start + jnp.argmax(reached_BN[:, level], axis=1).astype(jnp.int32) for level in levels]
    return jnp.sum(reached_BQ, axis=1, dtype=jnp.int32), jnp.stack(path, axis=1)
