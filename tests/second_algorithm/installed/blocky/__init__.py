"""A second algorithm, for tests: all proposals of a pass come out of one pass of the draft.

A block is the newest token and mask tokens behind it; every position of it sees the tapped states of the text before
the newest token, and the whole block. Training draws such blocks from answers. The draft keeps the target's embedding
and head, frozen, and knows every token of it. It stands in tests alone, outside the package, which finds it through its
entry point.
"""
