"""One run from a target's address to a report: target, data, train, evaluate, export, report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import jax

from flaxdraft.algorithms.eagle3.serving.contract import find_engine
from flaxdraft.config import RunConfig
from flaxdraft.devices import hosts
from flaxdraft.evaluate.report import print_headline
from flaxdraft.progress import CONSOLE, process_log
from flaxdraft.run.estimate import estimate
from flaxdraft.run.run_draft import Run
from flaxdraft.run.run_results import Results
from flaxdraft.stages.directory_lock import directory_lock


def plan(config: RunConfig) -> None:
    """Says what the configuration would take, and does nothing else."""
    stages = Run(config)
    stages.check_draft()
    num_taps = len(stages.target.config.tap_layers)
    planned = estimate(config, stages.mesh, stages.draft_module, stages.draft_config(), stages.algorithm, num_taps)
    for line in planned.lines():
        CONSOLE.print(line)


def run(config: RunConfig, allowed: Sequence[str] = ()) -> None:
    """All stages, then the headline. Of many processes all train; the first one alone asks the target, evaluates,
    exports and reports, while the others wait.

    Args:
        allowed: see `Run`.
    """
    stages = Run(config, allowed)
    results = Results(stages)
    stages.claim_folders()
    log = process_log(stages.draft_dir / "logs" / f"process-{jax.process_index()}.log", speaks=hosts.is_main())
    lock = lambda directory: directory_lock(directory) if hosts.is_main() else nullcontext()  # noqa: E731
    with log, lock(stages.draft_dir):
        with hosts.main_first("data"), lock(stages.data_dir):  # other drafts share the answers
            stages.data()
        if hosts.agree(hosts.is_main() and not results.finished()):
            stages.params  # noqa: B018 (trains, in every process)
        with hosts.main_first("results"):
            if hosts.is_main():
                evaluation = results.evaluate()
                export_dir = results.export()
                report_dir = results.report(evaluation)
                engine = find_engine(config.export.engine)
                print_headline(evaluation, export_dir, report_dir, config.target.path, engine)
