#!/usr/bin/env bash
# Runs a command on the GPU nodes of a Slurm cluster; called on a login node, in a clone of this repository.
#   launch/slurm.sh run --nodes=2 --gpus=8 python -m insec_jax.train --config=... --workdir=DIR      queues it
#   launch/slurm.sh status           one line of JSON; the exit code is that of the job once it has ended
#   launch/slurm.sh logs             prints the log from its start until the job ends; the exit code is the job's
#   launch/slurm.sh stop             lets the run save, ends it and does not queue it again
#   launch/slurm.sh list             one line of JSON for each job
#
# Options (--name=VALUE or --name VALUE), before the command of run:
#   --job JOB            name of the job, of each verb but list (run)
#   run:
#   --nodes N            number of nodes (1)
#   --gpus N             GPUs of each node; each gets one process (1; 0: nodes without GPUs, one process each)
#   --cpus N             CPU cores of each process (8)
#   --time T             time limit of one session: MINUTES, H:MM:SS or D-HH:MM:SS (1-00:00:00)
#   --grace N            seconds for saving: SIGTERM comes so long before the time limit (300)
#   --tries N            sessions that may fail one after another, with a node lost for example (5)
#   --restarts N         sessions that may follow the first one, for whatever reason (100)
#   --sbatch OPTION      a further option of sbatch, such as --sbatch=--partition=gpu; may be repeated
#   --extras "A B"       extras of the installation ("cuda gcs data")
#   --secret NAME        environment variable that the run needs, beside HF_TOKEN, WANDB_API_KEY; may be repeated
#   --topology T         compiles a step for these GPUs before the job is queued, such as h100:8
#   --no-check           starts without the checks of preflight.py, here and on the nodes
#   --dirty              takes the working tree as it is, not the last commit only
#   --wait               follows the log until the job ends, as logs does
#   --dry-run            shows the commands and runs none
#
# A session that ends with exit code 42 (saved: the time limit, a preemption) or fails is queued again, and the same
# command goes on. 0, 2 (wrong input) and 3 (a loss is not finite) end the job. The workdir must be in a bucket or on a
# drive that all nodes share, as the home must be. Code, environments and jobs are in ~/insec_jax.
# Exit codes: 0 done; 2 wrong input, or something is missing; 1 the cluster; run --wait, logs and status hand on that of
# the job. Variable: INSEC_POLL_SECONDS (30). Has not been run on a cluster yet.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/remote.sh
. "$here/remote.sh"
jobs=$HOME/insec_jax/slurm
HOSTS=(login)

# shellcheck disable=SC2317,SC2329  # called by remote.sh
reach() {
  bash -c "$2"
}

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"
}

# Sets `job`, the folder of the job; with an argument there must be such a job.
find_job() {
  case $name in
    [!A-Za-z0-9]* | *[!A-Za-z0-9._-]*) fail "--job=$name: give a name of letters, digits, '.', '_' and '-'" ;;
  esac
  job=$jobs/$name
  [ $# -eq 0 ] || [ -d "$job" ] || fail "there is no job $name; launch/slurm.sh list names those that are there"
}

# The seconds of a time limit as sbatch reads it.
seconds_of() {
  awk -v text="$1" 'BEGIN {
    days = 0; has_days = split(text, part, "-") > 1
    if (text !~ /^([0-9]+-[0-9]+(:[0-9]+(:[0-9]+)?)?|[0-9]+(:[0-9]+(:[0-9]+)?)?)$/) exit 1
    if (has_days) { days = part[1]; text = part[2] }
    n = split(text, t, ":")
    if (has_days) s = t[1] * 3600 + t[2] * 60 + t[3]
    else if (n == 3) s = t[1] * 3600 + t[2] * 60 + t[3]
    else s = t[1] * 60 + t[2]
    print days * 86400 + s
  }'
}

# Sets state to that of the job in Slurm, such as RUNNING, or to nothing; reason and nodes beside it. Returns 1, with
# trouble, if Slurm does not answer.
ask() {
  local answer
  answer=$(squeue --noheader --user="$(id -un)" --states=all --format='%i|%T|%r|%N' 2>&1) \
    || { trouble="squeue does not answer: $(printf '%s\n' "$answer" | tail -1)"; return 1; }
  answer=$(printf '%s\n' "$answer" | grep "^$(cat "$job/id" 2> /dev/null || echo none)|" | tail -1) || answer='|||'
  IFS='|' read -r _ state reason nodes << END
$answer
END
  case $state in
    # Jobs that are over stay in the list for some minutes.
    COMPLETED | FAILED | CANCELLED | TIMEOUT | NODE_FAIL | OUT_OF_MEMORY | BOOT_FAIL | DEADLINE | PREEMPTED) state= ;;
  esac
}

# The same for a command that looks once.
ask_once() {
  ask || broken "$trouble; the job is not touched, try again later"
}

# The same for a command that looks until the job ends.
ask_again() {
  until ask; do
    echo "$trouble; trying again" >&2
    sleep "$POLL_SECONDS"
  done
}

# The number of a finished job, or nothing.
code_of() {
  cat "$job/code" 2> /dev/null || true
}

status() {
  local code
  ask_once
  code=$(code_of)
  python3 - "$job" "$state" "$reason" "$nodes" << 'PYTHON'
import json, os, pathlib, sys

job, state, reason, nodes = pathlib.Path(sys.argv[1]), *sys.argv[2:]


def read(file):
  path = job / file
  return path.read_text(errors="replace").strip() if path.exists() else ""


def last_line(file):
  lines = read(file).splitlines()
  return lines[-1] if lines else ""


words = read("words").split("\0")
given = [word.partition("=")[2] for word in words if word.startswith("--workdir=")]
given += [value for word, value in zip(words, words[1:]) if word == "--workdir"]
paths = [pathlib.Path(os.path.expanduser(folder)) / "metrics.jsonl" for folder in given if "://" not in folder]
metrics = None
for path in paths:
  try:
    metrics = json.loads(path.read_text().rstrip().splitlines()[-1])
  except (OSError, ValueError, IndexError):
    pass
code = read("code")
kind = "ended" if code else {"": "lost", "PENDING": "pending", "REQUEUED": "pending"}.get(state, "running")
print(json.dumps({
  "job": job.name,
  "state": kind,
  "code": int(code) if code else None,
  "slurm": f"{read('id')} {state}".strip(),
  "reason": reason if kind == "pending" else "",
  "nodes": nodes,
  "restarts": int(read("restarts") or 0),
  "commit": read("commit"),
  "command": read("command"),
  "log": last_line("log"),
  "metrics": metrics,
}))
PYTHON
  if [ -n "$code" ]; then return "$code"; fi
  [ -n "$state" ] || return 1
}

follow() {
  local reader
  tail -n +1 -F "$job/log" 2> /dev/null &
  reader=$!
  trap 'kill "$reader" 2> /dev/null; rm -rf "$INSEC_SCRATCH"' EXIT
  while [ -z "$(code_of)" ]; do
    ask_again
    if [ -z "$state" ]; then
      sleep "$POLL_SECONDS"  # its last file may not be seen here yet
      [ -n "$(code_of)" ] || broken "the job $name is gone from Slurm without an exit code: it was" \
        "cancelled, or the cluster does not queue jobs again; the same run command goes on"
    fi
    sleep "$POLL_SECONDS"
  done
  sleep 1.2  # what was written last: the reader looks once a second
  exit "$(code_of)"
}

stop() {
  touch "$job/stop"
  local began=$SECONDS signalled=
  while [ -z "$(code_of)" ]; do
    ask_again
    case $state in
      '') break ;;
      PENDING | REQUEUED | REQUEUE_HOLD | SPECIAL_EXIT) show scancel "$(cat "$job/id")" || true ;;
      RUNNING)
        [ -n "$signalled" ] || show scancel --signal=TERM --batch "$(cat "$job/id")" && signalled=yes
        if [ $((SECONDS - began)) -ge "$(cat "$job/grace")" ]; then show scancel "$(cat "$job/id")" || true; fi
        ;;
      *)
        echo "the job $name is $state" >&2
        if [ $((SECONDS - began)) -ge "$(cat "$job/grace")" ]; then show scancel "$(cat "$job/id")" || true; fi
        ;;
    esac
    sleep "$POLL_SECONDS"
  done
  if [ -n "$(code_of)" ]; then echo "ended with exit code $(code_of)"; else echo "cancelled; no exit code"; fi
}

list() {
  for job in "$jobs"/*/; do
    job=${job%/}
    [ ! -f "$job/id" ] || status || true
  done
}

# Sets the variables from the options; the first word that is none begins the command.
parse() {
  local option value
  name=run nodes_asked=1 gpus=1 cpus=8 limit=1-00:00:00 grace=300 tries=5 restarts=100 extras='cuda gcs data'
  topology='' check=yes follows='' options=() needed=() command=()
  while [ $# -gt 0 ]; do
    option=$1 value=''
    case $option in
      --) shift; break ;;
      --no-check) check=''; shift; continue ;;
      --dirty) DIRTY=yes; shift; continue ;;
      --wait) follows=yes; shift; continue ;;
      --dry-run) DRY_RUN=yes; shift; continue ;;
      --no-check=* | --dirty=* | --wait=* | --dry-run=*) fail "${option%%=*} takes no value" ;;
      --help | -h) usage; exit 0 ;;
      --*=*) value=${option#*=} option=${option%%=*}; shift ;;
      --*) [ $# -ge 2 ] || fail "$option needs a value"; value=$2; shift 2 ;;
      *) break ;;
    esac
    [ -n "$value" ] || fail "$option is empty"
    case $option in
      --job) name=$value ;;
      --nodes) check_number "$option" "$value" 1; nodes_asked=$value ;;
      --gpus) check_number "$option" "$value" 0; gpus=$value ;;
      --cpus) check_number "$option" "$value" 1; cpus=$value ;;
      --time) limit=$value ;;
      --grace) check_number "$option" "$value" 1; grace=$value ;;
      --tries) check_number "$option" "$value" 1; tries=$value ;;
      --restarts) check_number "$option" "$value" 0; restarts=$value ;;
      --sbatch)
        case $value in
          --array | --array=* | -a*) fail "--sbatch=$value: the processes of an array are no run; start several jobs" ;;
        esac
        options[${#options[@]}]=$value ;;
      --extras) extras=$value ;;
      --secret) needed[${#needed[@]}]=$value ;;
      --topology) topology=$value ;;
      *) fail "there is no option $option; see launch/slurm.sh --help" ;;
    esac
  done
  [ $# -eq 0 ] || command=("$@")
  session=$(seconds_of "$limit") || fail "--time=$limit: give MINUTES, H:MM:SS or D-HH:MM:SS"
  [ "$session" -gt "$grace" ] || fail "--grace=$grace is not shorter than --time=$limit; give more time"
}

# The variables of this shell that are no business of Slurm's: what sbatch sees it keeps in files of its own.
hidden() {
  compgen -e | grep -E '(_TOKEN|_KEY|_SECRET|_PASSWORD)$' || true
  printf '%s\n' "${SECRETS[@]}" ${needed[@]+"${needed[@]}"}
}

submit() {
  local variable answer end without=() tasks=$gpus
  [ "$tasks" -gt 0 ] || tasks=1
  for variable in $(hidden | sort -u); do
    without[${#without[@]}]=-u
    without[${#without[@]}]=$variable
  done
  set -- --parsable --job-name="insec-$name" --nodes="$nodes_asked" --ntasks-per-node="$tasks" \
    --cpus-per-task="$cpus" --time="$limit" --signal="B:TERM@$grace" --requeue --open-mode=append \
    --output="$job/log" --chdir="$HOME/insec_jax/code/$COMMIT"
  [ "$gpus" -eq 0 ] || set -- "$@" --gpus-per-node="$gpus"
  set -- "$@" ${options[@]+"${options[@]}"} "$HOME/insec_jax/code/$COMMIT/launch/slurm_job.sh" "$name"
  printf '+ %s\n' "$(quoted sbatch "$@")" >&2
  [ -z "$DRY_RUN" ] || return 0
  if ! answer=$(env "${without[@]}" sbatch "$@" 2>&1); then
    case $answer in
      *"Unable to contact"* | *"Socket timed out"* | *"Connection refused"*) end=broken ;;
      *) end=fail ;;
    esac
    "$end" "sbatch: $(printf '%s\n' "$answer" | tail -1); correct the options, or try again later"
  fi
  answer=$(printf '%s\n' "$answer" | tail -1)
  printf '%s\n' "${answer%%;*}" > "$job/id"
  echo "queued as Slurm job ${answer%%;*}; launch/slurm.sh status, logs, stop --job=$name" >&2
}

# The checks on this login node, before the job waits for nodes.
check_here() {
  local fit=() code=$HOME/insec_jax/code/$COMMIT
  [ -z "$topology" ] || fit=(--fit "$topology")
  bash "$here/host.sh" call "$COMMIT" python launch/preflight.py check --host login ${fit[@]+"${fit[@]}"} -- \
    "${command[@]}" < "$INSEC_SCRATCH/environment" > "$INSEC_SCRATCH/checks" || broken "the checks ended early; see above"
  "$code/.venv/bin/python" "$code/launch/preflight.py" table --hosts=login < "$INSEC_SCRATCH/checks" >&2 \
    || fail "not queued: see above; --no-check queues it without the checks"
}

run() {
  cd "$here/.."
  [ "${#command[@]}" -gt 0 ] || fail "give the command, such as python -m insec_jax.train --config=... --workdir=..."
  name_code
  scratch
  environment_file "$INSEC_SCRATCH/environment" ${needed[@]+"${needed[@]}"}
  if [ -f "$job/id" ] && [ -z "$(code_of)" ]; then
    ask_once
    [ -z "$state" ] || fail "the job $name is $state as Slurm job $(cat "$job/id"); stop it, or give another --job"
  fi
  if [ -z "$DRY_RUN" ]; then
    # shellcheck disable=SC2086  # one word an extra
    provide_all $extras || broken "the environment is not ready; look at the messages above"
    [ -z "$check" ] || check_here
    write_job
  fi
  submit
  [ -z "$follows" ] || [ -n "$DRY_RUN" ] || follow
}

# Writes what slurm_job.sh reads.
write_job() {
  (umask 077 && mkdir -p "$job")
  rm -f "$job/code" "$job/stop" "$job/restarts" "$job/failures" "$job/checked" "$job/id"
  cp "$INSEC_SCRATCH/environment" "$job/environment"
  printf '%s\0' "${command[@]}" > "$job/words"
  quoted "${command[@]}" > "$job/command"
  printf '%s\n' "$COMMIT" > "$job/commit"
  printf '%s\n' "$grace" > "$job/grace"
  printf '%s\n' "$tries" > "$job/tries"
  printf '%s\n' "$restarts" > "$job/most_restarts"
  [ -n "$check" ] || touch "$job/checked"
  touch "$job/log"
}

verb=${1:-}
case $verb in
  run | status | logs | stop | list) shift ;;
  -h | --help | help) usage; exit 0 ;;
  *) usage >&2; exit 2 ;;
esac
parse "$@"
command -v squeue > /dev/null || fail "there is no squeue here; call this on a login node of a Slurm cluster"
[ "${#command[@]}" -eq 0 ] || [ "$verb" = run ] || fail "$verb takes no command, but got ${command[0]}"
case $verb in
  run) find_job; run ;;
  status | stop) find_job there; "$verb" ;;
  logs) find_job there; follow ;;
  list) list ;;
esac
