#!/usr/bin/env bash
# One session of a job, on its first node; slurm.sh gives it to sbatch, and Slurm starts it again after a requeue.
#   slurm_job.sh JOB
# SIGTERM, from Slurm before the time limit or from `slurm.sh stop`, goes on to the processes, which save and end.
set -uo pipefail
umask 077
name=$1
job=$HOME/insec_jax/slurm/$name
code=$HOME/insec_jax/code/$(cat "$job/commit")
stopping=

say() {
  echo "--- $(date -u +%Y-%m-%dT%H:%M:%SZ) $*"
}

# The end of the job: Slurm must not queue it again.
finish() {
  say "exit code $1${2:+: $2}"
  echo "$1" > "$job/code.new"
  mv "$job/code.new" "$job/code"
  exit "$1"
}

# Another session, after Slurm has ended this one.
again() {
  local restarts=$((${SLURM_RESTART_COUNT:-0} + 1)) most
  most=$(cat "$job/most_restarts")
  [ ! -f "$job/stop" ] || finish "$status" "stopped"
  [ "$restarts" -le "$most" ] || finish "$status" "no more than $most restarts"
  echo "$restarts" > "$job/restarts"
  say "exit code $status$1; queued again"
  scontrol requeue "$SLURM_JOB_ID" || finish 1 "Slurm does not queue it again; the same run command goes on"
  sleep 600  # Slurm ends this script
  finish 1 "Slurm has not ended this session"
}

# Runs srun with these arguments and sets `status`. SIGTERM to srun would kill the processes, so they get it themselves.
step() {
  local process waited=0
  status=143
  [ -z "$stopping" ] || return 0
  srun --export=ALL "$@" &  # sites may have another default
  process=$!
  while kill -0 "$process" 2> /dev/null; do
    if [ -n "$stopping" ]; then
      # Every ten seconds: a step that has just begun may have no processes yet.
      [ $((waited++ % 10)) -ne 0 ] || scancel --signal=TERM "$SLURM_JOB_ID" || true
      sleep 1
    else
      wait "$process"  # ends at a signal, too
    fi
  done
  wait "$process"
  status=$?
}

# What each process of the run is: the command, whose exit code it keeps. SIGTERM reaches the command by itself.
# shellcheck disable=SC2016  # of the process
task='trap : TERM; "$@"; code=$?; echo "$code" > "$0/$SLURM_PROCID"; exit "$code"'

# The exit code of the session for those of its processes; srun hands on the largest. 3 if any diverged, 2 if all had
# wrong input (a process that was lost lets the others end with 2 as well), 42 or 143 if none ended otherwise.
verdict() {
  local number=${SLURM_NTASKS:-$((SLURM_JOB_NUM_NODES * ${SLURM_NTASKS_PER_NODE:-1}))} index code
  local saved='' failed='' twos=0 zeros=0
  if [ -z "$(ls "$job/codes")" ]; then
    echo "$status"  # stopped before they began, or srun itself failed
    return
  fi
  for ((index = 0; index < number; index++)); do
    code=$(cat "$job/codes/$index" 2> /dev/null || echo 1)  # a process that was killed has left none
    case $code in
      0) zeros=$((zeros + 1)) ;;
      2) twos=$((twos + 1)) ;;
      3) echo 3; return ;;
      42 | 143) saved=$code ;;
      *) failed=$code ;;
    esac
  done
  if [ "$zeros" -eq "$number" ]; then echo 0
  elif [ "$twos" -eq "$number" ]; then echo 2
  elif [ -n "$failed" ] || [ "$twos" -gt 0 ]; then echo "${failed:-1}"
  else echo "$saved"; fi
}

# The table of the checks of all nodes; exit code 2 ends the job.
check() {
  # shellcheck disable=SC2016  # each node has its own name
  step --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c \
    'exec python launch/preflight.py check --host "$SLURMD_NODENAME" -- "$@"' check "${command[@]}" \
    > "$job/checks" 2> "$job/checks.err"
  [ -z "$stopping" ] || return 0
  if ! python launch/preflight.py table --hosts "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd, -)" \
    < "$job/checks"; then
    tail -5 "$job/checks.err"
    finish 2 "something is missing on the nodes"
  fi
  touch "$job/checked"
}

trap 'stopping=yes' TERM
[ ! -f "$job/stop" ] || finish 143 "stopped before it began"
mapfile -d '' -t command < "$job/words"
while IFS= read -r -d '' line && [ "$line" != END ]; do
  export "${line?}"
done < "$job/environment"
cd "$code" || finish 1 "there is no $code"
export PATH=$code/.venv/bin:$PATH PYTHONPATH=$code PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR-$HOME/insec_jax/xla}
# JAX without a GPU would go on with the CPU.
[ -z "${SLURM_GPUS_PER_NODE:-}" ] || export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda}
# Nodes may be shared: a port and a token of this job's own.
export JAX_COORDINATOR_PORT=$((10000 + SLURM_JOB_ID % 20000))
INSEC_RUN_TOKEN=${INSEC_RUN_TOKEN:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}
export INSEC_RUN_TOKEN
say "session $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST, commit $(cat "$job/commit"):" \
  "$(cat "$job/command")"
[ -f "$job/checked" ] || check
# A process that was killed leaves the others a minute and a half to name it and end.
rm -rf "$job/codes"
mkdir "$job/codes"
step --label --wait=90 --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  bash -c "$task" "$job/codes" "${command[@]}"
status=$(verdict)
case $status in
  0 | 2 | 3) finish "$status" ;;
  42 | 143) rm -f "$job/failures"; again "" ;;
esac
failures=$(($(cat "$job/failures" 2> /dev/null || echo 0) + 1))
echo "$failures" > "$job/failures"
[ "$failures" -lt "$(cat "$job/tries")" ] || finish "$status" "$failures sessions have failed one after another"
again ", failure $failures of $(cat "$job/tries")"
