"""python -m flaxdraft.train --config run.yaml [section.field=value ...]

The same command on every host of a run. Exit codes: see supervise.py.
"""

from __future__ import annotations

import argparse
import os
import sys

from flaxdraft.config import load_config
from flaxdraft.errors import InputError


def main(argv: list[str] | None = None) -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m flaxdraft.train", description="Train, evaluate and export a draft."
    )
    parser.add_argument("--config", required=True, help="a run configuration (YAML)")
    parser.add_argument(
        "--allow-change", action="append", default=[], metavar="SECTION.FIELD",
        help="go on with what is there although this field was another one; may be given several times",
    )  # fmt: skip
    parser.add_argument("--plan", action="store_true", help="say what it would take (memory, compute) and end")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="single fields of it, changed")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install PyTorch
    try:
        config = load_config(arguments.config, arguments.overrides)
    except InputError as error:
        print(f"flaxdraft: {error}", file=sys.stderr)
        return 2
    # JAX starts only once the configuration is known to be good.
    from flaxdraft.run.run import plan, run
    from flaxdraft.run.supervise import supervised

    work = (lambda: plan(config)) if arguments.plan else (lambda: run(config, arguments.allow_change))
    return supervised(config.hosts, work)


if __name__ == "__main__":
    sys.exit(main())
