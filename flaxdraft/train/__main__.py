"""python -m flaxdraft.train --config run.yaml [section.field=value ...]

The same command on every host of a run. Exit codes: see run/supervise.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from flaxdraft.config import load_config
from flaxdraft.errors import InputError
from flaxdraft.run.commands import Command, call


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a run configuration (YAML)")
    parser.add_argument(
        "--allow-change", action="append", default=[], metavar="SECTION.FIELD",
        help="go on with what is there although this field was another one; may be given several times",
    )  # fmt: skip
    parser.add_argument("--plan", action="store_true", help="say what it would take (memory, compute, time) and end")
    parser.add_argument(
        "--devices", help="to plan for: '8 x H100', or a TPU topology such as v5e:2x2; default: those that JAX sees"
    )
    parser.add_argument("--rate", help="to plan with: '20000 tokens/s' in all or '300 TFLOP/s' a device")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="single fields of it, changed")


def _train(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    # JAX starts only once the configuration is known to be good.
    from flaxdraft.run.plan import plan
    from flaxdraft.run.run import run
    from flaxdraft.run.supervise import supervised

    wanted = {name: getattr(arguments, name) for name in ("devices", "rate")}
    for name, value in wanted.items():
        if value is not None and not arguments.plan:
            raise InputError(f"--{name}: only a plan uses it; give --plan as well")
    if arguments.devices is not None:  # no process or device of this run is asked
        plan(config, **wanted)
        return 0
    work = (lambda: plan(config, **wanted)) if arguments.plan else (lambda: run(config, arguments.allow_change))
    return supervised(config.hosts, work)


def main(argv: Sequence[str] | None = None) -> int:
    """See the top of this file."""
    command = Command("Train, evaluate and export a draft.", _arguments, _train)
    return call(command, argv, "python -m flaxdraft.train")


if __name__ == "__main__":
    sys.exit(main())
