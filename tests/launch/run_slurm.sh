#!/usr/bin/env bash
# Runs launch/slurm.sbatch under a real Slurm: one node with two tasks, on loopback, configured in a temporary folder.
#
#     apt-get install slurm-wlm munge && tests/launch/run_slurm.sh
#
# A run is preempted by another job, and then gets the signal that comes before a time limit. Each time it must save and
# be queued again, and in the end equal a run that nothing stopped. A job that is cancelled must not come back, and each
# task must see both of the node's (pretended) GPUs. `qstar` and `python` are those of the environment; the devices are CPUs.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
steps=${STEPS:-150}

fail() {
    echo "run_slurm.sh: $*" >&2
    [ -z "${work:-}" ] || tail -n 15 "$work"/*.out "$work"/slurm*.log >&2 2>/dev/null || true
    exit 1
}
for name in slurmctld slurmd munged sbatch; do
    PATH=$PATH:/usr/sbin command -v "$name" >/dev/null || fail "no $name; apt-get install slurm-wlm munge brings it"
done
command -v qstar >/dev/null || fail "no qstar on PATH: activate the environment that has it"
PATH=$PATH:/usr/sbin

work=$(mktemp -d)
chmod 755 "$work" # munged distrusts a folder that others can write to, and slurmd one that it cannot enter
daemons=()
clean_up() {
    if [ "${#daemons[@]}" -gt 0 ]; then
        scancel --user="$(id -un)" 2>/dev/null || true
        wait_for 30 "" idle || true
        kill "${daemons[@]}" 2>/dev/null || true
        wait "${daemons[@]}" 2>/dev/null || true
    fi
    rm -rf "$work"
}
trap clean_up EXIT

wait_for() { # wait_for SECONDS WHAT COMMAND...: WHAT is said if the time runs out; nothing if it is empty
    local until=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$until" ] || { [ -n "$what" ] && fail "$what"; return 1; }
        sleep 0.2
    done
}
idle() { [ -z "$(squeue -h)" ]; }
up() { [ "$(sinfo -h -p low -o %T)" = idle ]; }
state() { squeue -h -j "$1" -o %T; }
ended() { [ -z "$(state "$1")" ]; }
restarts() { scontrol show job "$1" | grep -o "Restarts=[0-9]*" | cut -d= -f2; }
restarted() { [ "$(restarts "$1")" -ge "$2" ] && [ "$(state "$1")" = RUNNING ]; }
ended_as() { # ended_as JOB STATE
    wait_for 300 "job $1 did not end within five minutes" ended "$1"
    scontrol show job "$1" | grep -q "JobState=$2" || fail "job $1 should end as $2: $(scontrol show job "$1" | grep JobState)"
}

# A Slurm without cgroups, accounting or root's folders; credentials expire fast, for a requeued job waits until they do.
host=$(hostname -s)
mkdir -m 700 "$work"/{munge,state,spool}
head -c 1024 /dev/urandom >"$work/munge/key"
chmod 400 "$work/munge/key"
ln -s /dev/null "$work/gpu0" # a GPU is a device file to Slurm
ln -s /dev/zero "$work/gpu1"
read -r controller_port node_port < <(python - <<'PYTHON'
import socket
sockets = [socket.socket() for _ in range(2)]
for each in sockets:
    each.bind(("127.0.0.1", 0))
print(*(each.getsockname()[1] for each in sockets))
PYTHON
)
cat >"$work/slurm.conf" <<CONF
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller_port
SlurmdPort=$node_port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$work/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=1,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
SlurmdParameters=config_overrides
KillWait=5
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 Gres=gpu:2 State=UNKNOWN
PartitionName=low Nodes=$host Default=YES PriorityTier=1 GraceTime=240
PartitionName=high Nodes=$host PriorityTier=10 PreemptMode=OFF
CONF
cat >"$work/gres.conf" <<CONF
AutoDetect=off
NodeName=$host Name=gpu File=$work/gpu[0-1]
CONF
export SLURM_CONF=$work/slurm.conf
munged --force --foreground --socket="$work/munge/socket" --key-file="$work/munge/key" --pid-file="$work/munge/pid" \
    --seed-file="$work/munge/seed" --log-file="$work/munge/log" 2>"$work/munged.stderr" &
daemons+=($!)
wait_for 20 "munged did not start: $(cat "$work/munged.stderr")" test -S "$work/munge/socket"
slurmctld -D 2>"$work/slurmctld.stderr" &
daemons+=($!)
slurmd -D 2>"$work/slurmd.stderr" &
daemons+=($!)
wait_for 60 "Slurm's node did not come up" up

submit() { # submit NAME WORDS...: prints the number of the job
    sbatch --parsable --gpus-per-node=2 --ntasks-per-node=2 --time=60 --output="$work/$1.out" "$root/launch/slurm.sbatch" "${@:2}"
}
train() { # train NAME
    submit "$1" dpo --model "$work/policy" --data.train "$work/pairs.jsonl" --out "$work/$1" --train.steps "$steps" \
        --train.batch_size 4 --train.log_every 1 --train.save_every 0 --train.reference_samples 0 --mesh.fsdp 2 \
        --mesh.min_shard_size 64
}

# A job that is cancelled does not come back. Its command is a stand-in, which stops as `qstar` does.
mkdir "$work/bin"
cat >"$work/bin/qstar" <<'COMMAND'
#!/usr/bin/env bash
trap 'exit 75' TERM
echo "task $SLURM_PROCID sees $CUDA_VISIBLE_DEVICES"
for _ in {1..600}; do sleep 0.1; done
COMMAND
chmod +x "$work/bin/qstar"
job=$(PATH="$work/bin:$PATH" submit cancelled dpo)
both() { [ "$(grep -c sees "$work/cancelled.out")" = 2 ]; }
wait_for 60 "the tasks of job $job did not start" both
[ "$(sort "$work/cancelled.out")" = $'task 0 sees 0,1\ntask 1 sees 0,1' ] ||
    fail "each task should see GPUs 0,1: $(cat "$work/cancelled.out")"
scancel "$job"
ended_as "$job" CANCELLED
echo "two tasks saw both GPUs, and a cancelled job stayed away"

# The run, with programs that are compiled fast rather than well.
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=1 XLA_FLAGS="--xla_backend_optimization_level=0 ${XLA_FLAGS:-}"
as_in_tests() { (cd "$root" && python -c "from pathlib import Path; from tests.faults.jobs import *; $1"); }
as_in_tests "prepare(Path('$work'))"
whole=$(train whole)
ended_as "$whole" COMPLETED

run=$(train run)
has() { [ "$(wc -l <"$work/run/metrics.jsonl")" -ge "$1" ]; }
wait_for 300 "job $run did not begin to train" grep -q "^estimate" "$work/run.out"
other=$(sbatch --parsable --partition=high --ntasks=1 --output="$work/other.out" --wrap "echo preempted job $run")
ended_as "$other" COMPLETED
wait_for 300 "job $run was preempted and did not come back" restarted "$run" 1
wait_for 300 "job $run did not go on" has $((steps / 3))
scancel --signal=TERM "$run" # as before a time limit: to the tasks, but not to the script
wait_for 300 "job $run was told to stop and did not come back" restarted "$run" 2
ended_as "$run" COMPLETED
mapfile -t stops < <(grep -o "stopped after step [0-9]* of $steps, which is saved" "$work/run.out" | sort -u)
[ "${#stops[@]}" = 2 ] || fail "the run should have stopped and saved twice, after different steps: ${stops[*]:-never}"
as_in_tests "
run, whole = (trained(Path('$work') / name) for name in ('run', 'whole'))
different = [name for name in run | whole if run.get(name) != whole.get(name)]
exit(f'not equal to the run that nothing stopped: {different}' if different else 0)" || fail "the runs differ"
printf 'equal to the run that nothing stopped, though\n'
printf 'preempted, then signalled before a time limit: %s; %s\n' "${stops[@]}"
