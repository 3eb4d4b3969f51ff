"""How a process of a run ends: what it says, what it tells the others, and its exit code.

0, all is done; 2, wrong input, with one message; 75, the run can go on from its last checkpoint and should be started
again (it was asked to stop, or another process was lost); 1, a bug, with a traceback, or answers that a draft must not
have changed, with a message. Two more mean "start it again":
134, where the JAX runtime was the first to miss process 0, whose end it notices as quickly as the watchdog does and
answers with SIGABRT; and 143, SIGTERM outside training.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable

from flaxdraft.config import HostsConfig
from flaxdraft.devices import hosts
from flaxdraft.devices.watchdog import RESTART
from flaxdraft.errors import InputError, WrongAnswersError
from flaxdraft.progress import CONSOLE
from flaxdraft.train.guards import PreemptedError

_SECONDS_TO_HEAR = 3.0  # after an error that a lost peer may have caused, for the watch to say so


def supervised(config: HostsConfig, work: Callable[[], None]) -> int:
    """Joins the run and does the work; the exit code. Of many processes, one that fails ends all of them."""
    try:
        hosts.join(config)
        CONSOLE.quiet = not hosts.is_main()
        work()
    except InputError as error:
        _hear_of_a_lost_peer()
        return _fail(2, str(error))
    except PreemptedError as error:
        if hosts.is_main():
            print(f"flaxdraft: {error} (exit code {RESTART})", file=sys.stderr)
        code = RESTART
    except WrongAnswersError as error:  # every process has found it, with all else done
        if hosts.is_main():
            print(f"flaxdraft: {error}", file=sys.stderr)
        code = 1
    except Exception as error:
        if hosts.peers() is None:
            raise
        traceback.print_exc()
        _hear_of_a_lost_peer()
        return _fail(1, f"{type(error).__name__}: {error}")
    else:
        code = 0
    if (peers := hosts.peers()) is not None:
        peers.close()
    return code


def _hear_of_a_lost_peer() -> None:
    """A collective, or a save that all take part in, may fail before the watch has noticed why. It ends the process,
    with its own code, while this waits."""
    if hosts.peers() is not None:
        time.sleep(_SECONDS_TO_HEAR)


def _fail(code: int, why: str) -> int:
    if (peers := hosts.peers()) is not None:
        peers.fail(code, why)  # ends the process
    print(f"flaxdraft: {why}", file=sys.stderr)
    return code
