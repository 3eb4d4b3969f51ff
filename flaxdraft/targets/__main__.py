"""python -m flaxdraft.targets ADDRESS: what a target is, what it takes, and one answer of it."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

from flaxdraft.errors import InputError
from flaxdraft.run.commands import ADDRESS, Command, at_least, call
from flaxdraft.run.target_options import AXES, add_target_options, dtype_or_default, on_all_hosts, target_mesh

PROMPT = "What is the capital of France?"


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", help=ADDRESS)
    add_target_options(parser)
    parser.add_argument("--prompt", default=PROMPT, help="what the sample answers")
    parser.add_argument(
        "--new-tokens", type=at_least(0), default=48, help="of the sample; 0: no weights are put on a device"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the card is printed; 2 with one message for wrong input."""
    return call(
        Command(__doc__, _arguments, lambda arguments: on_all_hosts(lambda: show(arguments))),
        argv,
        "python -m flaxdraft.targets",
    )


def show(arguments: argparse.Namespace) -> None:
    import jax

    from flaxdraft import targets
    from flaxdraft.devices.sharding import Sharding
    from flaxdraft.nn.precision import of_both
    from flaxdraft.plugins import first_architecture
    from flaxdraft.progress import CONSOLE
    from flaxdraft.targets import decoder

    dtype = dtype_or_default(arguments.dtype)
    precision = of_both(dtype)
    opened = targets.open_target(arguments.address)
    family, config = opened.family, opened.config()
    shape = dict.fromkeys(AXES, 1) | arguments.mesh
    groups = family.groups(config, precision, Sharding.none())
    _, abstract = decoder.abstract_state(config, groups, precision)
    held = decoder.bytes_per_device(config, abstract, shape)
    tokenizer = opened.tokenizer
    template = "with a chat template" if getattr(tokenizer, "chat_template", None) else "without a chat template"
    devices = " x ".join(f"{axis} {size}" for axis, size in shape.items() if size > 1) or "one device"
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * (config.key_width + config.value_width)
    facts = {
        "path": str(opened.path),
        "family": f"{family.__name__.rpartition('.')[2]}, {first_architecture(opened.hf_config) or '?'}",
        "parameters": f"{sum(math.prod(v.shape) for v in jax.tree.leaves(abstract)) / 1e6:,.1f} M",
        "layers": ", ".join(f"{len(group.layers)} {group.name}" for group in groups),
        "width": f"{config.hidden_size}, {config.num_attention_heads} heads, {config.num_key_value_heads} of keys",
        "vocabulary": f"{config.vocab_size:,}, {'tied' if config.tie_word_embeddings else 'own'} head",
        "context": f"{config.context:,} tokens, {config.rope.rope_type} rotary embedding",
        "tokenizer": f"{len(tokenizer):,} tokens, {template}" if tokenizer else "none found",
        "memory": f"{held / 1e9:.2f} GB of {dtype} weights a device ({devices}), "
                  f"{cache / 1e3:.1f} kB of cache a token in bfloat16",
    }  # fmt: skip
    for name, fact in facts.items():
        CONSOLE.print(f"{name:>11}  {fact}")
    if arguments.new_tokens == 0:
        targets.say_which_head(opened)
        return
    if tokenizer is None or not tokenizer.chat_template:
        raise InputError(f"{opened.path}: no sample without a tokenizer and its chat template; give --new-tokens 0")
    from flaxdraft.data.prompts import check_context, render_messages
    from flaxdraft.decode.generation import generate

    opened.needed_stop_tokens()
    prompt = render_messages(tokenizer, [{"role": "user", "content": arguments.prompt}], "--prompt")
    check_context(len(prompt), "the prompt", arguments.new_tokens, "--new-tokens", config.context)
    loaded = targets.load_target(opened, precision=precision, mesh=target_mesh(arguments.mesh))
    answer = generate(loaded.model, [prompt], max_new_tokens=arguments.new_tokens, stop_tokens=loaded.stop_tokens)[0]
    CONSOLE.print(f"{'prompt':>11}  {arguments.prompt}")
    CONSOLE.print(f"{'answer':>11}  {tokenizer.decode(answer, skip_special_tokens=True)}")


if __name__ == "__main__":
    sys.exit(main())
