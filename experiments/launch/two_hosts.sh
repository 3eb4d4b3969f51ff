#!/usr/bin/env bash
# On the first host:   experiments/launch/two_hosts.sh 0 first-host:55527 run.yaml mesh.data=16
# On the second one:   experiments/launch/two_hosts.sh 1 first-host:55527 run.yaml mesh.data=16
#
# Starts the process again as long as it may go on.
set -u
export FLAXDRAFT_PROCESS_ID=$1 FLAXDRAFT_COORDINATOR=$2 FLAXDRAFT_NUM_PROCESSES=2
config=$3
shift 3
while true; do
    python -m flaxdraft.train --config "$config" "$@"
    code=$?
    case $code in
    75 | 134 | 143) echo "exit code $code: starting again" >&2 ;;
    *) exit $code ;;
    esac
done
