"""python -m flaxdraft.train --config run.yaml [section.field=value ...]

The same command on every host of a run. Exit codes: 0, all stages are done; 2, wrong input, with one message; 75, the
run can go on from its last checkpoint and should be started again (it was asked to stop, or another process was lost).
The JAX runtime's own abort, 134, may be restarted too.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback

from flaxdraft.config import RunConfig, load_config
from flaxdraft.errors import InputError
from flaxdraft.peers import RESTART, leave

_SECONDS_TO_HEAR = 3.0  # after an error that a lost peer may have caused, for the watch to say so


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
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="single fields of it, changed")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install PyTorch
    try:
        config = load_config(arguments.config, arguments.overrides)
    except InputError as error:
        print(f"flaxdraft: {error}", file=sys.stderr)
        return 2
    return _run(config, arguments)


def _run(config: RunConfig, arguments: argparse.Namespace) -> int:
    # JAX starts only once the configuration is known to be good.
    from flaxdraft import hosts
    from flaxdraft.train.guards import PreemptedError
    from flaxdraft.train.run import run

    try:
        hosts.join(config.hosts)
        run(config, arguments.allow_change)
    except InputError as error:
        return _stop(2, str(error))
    except PreemptedError as error:
        print(f"flaxdraft: {error} (exit code {RESTART})", file=sys.stderr)
        _part()
        return RESTART
    except Exception:
        if hosts.peers() is None:
            raise
        traceback.print_exc()
        time.sleep(_SECONDS_TO_HEAR)
        return _stop(1, traceback.format_exc().splitlines()[-1])
    _part()
    return 0


def _stop(code: int, why: str) -> int:
    """Says why, to the user and to the other processes, which end as well."""
    from flaxdraft import hosts

    if hosts.peers() is None:
        print(f"flaxdraft: {why}", file=sys.stderr)
        return code
    hosts.peers().failed(code, why)
    leave(code, why)


def _part() -> None:
    from flaxdraft import hosts

    if hosts.peers() is not None:
        hosts.peers().close()


if __name__ == "__main__":
    sys.exit(main())
