#!/bin/bash
# A recipe on several hosts that ssh reaches without a password; not yet run on a cluster.
#
#   HOSTS="node0 node1" examples/cluster/ssh.sh deit_base --data /shared/imagenet --out /shared/runs/deit_base
#
# --data and --out, and the folder that this is started in, lie on a file system that every host sees. DEITFAST is the
# command's path where the hosts' PATH lacks it, PORT a free port of the first host. Ctrl-C and SIGTERM save on all
# hosts and end with exit code 75: the same command resumes. Each host's output is a file in logs/.

set -u
read -ra hosts <<< "${HOSTS:?the hosts, the first one where the processes meet}"
master=${hosts[0]}:${PORT:-29400}
command=$(printf '%q ' "${DEITFAST:-deitfast}" train "$@" --nodes "${#hosts[@]}" --master "$master" --restarts 3)
folder=$(printf '%q' "$PWD")
mkdir -p logs
rm -f logs/*.pid # of an earlier start: those numbers may be anyone's now

stop() {
    for host in "${hosts[@]}"; do
        ssh -n "$host" "kill -TERM \$(cat $folder/logs/$host.pid)" &
    done
}
trap stop INT TERM

launchers=()
for host in "${hosts[@]}"; do
    ssh -n "$host" "cd $folder && echo \$\$ > logs/$host.pid && exec $command" >> "logs/$host.log" 2>&1 &
    launchers+=($!)
done

highest=0
for launcher in "${launchers[@]}"; do
    wait "$launcher"
    code=$?
    while kill -0 "$launcher" 2> /dev/null; do # a signal ended the wait, not the launcher
        wait "$launcher"
        code=$?
    done
    [ "$code" -gt "$highest" ] && highest=$code
done
exit "$highest"
