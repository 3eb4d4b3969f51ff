#!/usr/bin/env bash
# experiments/launch/one_host.sh 2 run.yaml mesh.fsdp=2
#
# So many processes on this host, with one GPU each: the form that several hosts have, tried on one. The losses are those
# of one process with as many GPUs (python -m flaxdraft.train --config run.yaml mesh.fsdp=2). Starts all of them again as
# long as they may go on; SIGTERM is passed on, and then the run saves and the script ends.
set -u
count=$1 config=$2
shift 2
export FLAXDRAFT_COORDINATOR=localhost:${PORT:-55527} FLAXDRAFT_NUM_PROCESSES=$count
asked=
while true; do
    processes=()
    trap 'asked=yes; kill -TERM "${processes[@]}"' TERM INT
    for ((i = 0; i < count; i++)); do
        CUDA_VISIBLE_DEVICES=$i FLAXDRAFT_PROCESS_ID=$i python -m flaxdraft.train --config "$config" "$@" &
        processes+=($!)
    done
    code=0
    for process in "${processes[@]}"; do
        wait "$process"
        one=$?
        while kill -0 "$process" 2>/dev/null; do # the signal ended the wait, and not the process
            wait "$process"
            one=$?
        done
        if ((one == 2 || code == 0)); then code=$one; fi # wrong input ends the others in other ways
    done
    case $asked$code in
    75 | 134 | 143) echo "exit code $code: starting again" >&2 ;;
    *) exit $code ;;
    esac
done
