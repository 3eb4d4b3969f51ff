"""python -m flaxdraft.train --config run.yaml [section.field=value ...]"""

from __future__ import annotations

import argparse
import os
import sys

from flaxdraft.config import load_config
from flaxdraft.errors import InputError


def main(argv: list[str] | None = None) -> int:
    """0 when all stages are done; 2 with one message for wrong input."""
    parser = argparse.ArgumentParser(
        prog="python -m flaxdraft.train", description="Train, evaluate and export a draft."
    )
    parser.add_argument("--config", required=True, help="a run configuration (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="single fields of it, changed")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install PyTorch
    try:
        config = load_config(arguments.config, arguments.overrides)
        from flaxdraft.train.run import run  # JAX starts only once the configuration is known to be good

        run(config)
    except InputError as error:
        print(f"flaxdraft: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
