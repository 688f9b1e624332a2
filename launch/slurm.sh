#!/usr/bin/env bash
# Runs a command on the GPU nodes of a Slurm cluster; called on a login node, in a clone of this repository.
#   launch/slurm.sh run JOB [OPTIONS] -- COMMAND...     queues the command under a name and returns
#   launch/slurm.sh status JOB       one line of JSON; the exit code is that of the job once it has ended
#   launch/slurm.sh logs JOB         prints the log from its start until the job ends; the exit code is the job's
#   launch/slurm.sh stop JOB         lets the run save, ends it and does not queue it again
#   launch/slurm.sh list             one line of JSON for each job
# Options of run:
#   --nodes N         number of nodes (1)
#   --gpus N          GPUs of each node; each gets one process (1; 0: nodes without GPUs, one process each)
#   --cpus N          CPU cores of each process (8)
#   --time T          time limit of one session, as sbatch takes it: MINUTES, H:MM:SS or D-HH:MM:SS (1-00:00:00)
#   --grace SECONDS   SIGTERM comes so long before the time limit; the run saves in this time (300)
#   --tries N         sessions that may fail one after another, with a node lost for example (5)
#   --restarts N      sessions that may follow the first one, for whatever reason (100)
#   --sbatch OPTION   a further option of sbatch, such as --partition=gpu or --account=lab; may be repeated
#   --extras "A B"    extras of setup.py that the run needs ("cuda gcs data")
#   --secret NAME     environment variable that the run gets besides HF_TOKEN and WANDB_API_KEY; may be repeated
#   --fit TOPOLOGY    compiles a step for these GPUs before the job is queued, such as h100:8
#   --no-preflight    leaves out the checks, here and on the nodes
#   --dirty           takes the code with its uncommitted changes; without it they are refused
#   --wait            follows the log until the job ends, as logs does
#   --dry-run         prints what would be done
# A session that ends with exit code 42 (saved: the time limit, a preemption) or fails is queued again, and the same
# command goes on. 0, 2 (wrong input) and 3 (a loss is not finite) end the job. The workdir must be in a bucket or on a
# drive that all nodes share, as the home must be. Code, environments and jobs are in ~/insec_jax.
# Never run on a cluster.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/remote.sh
. "$here/remote.sh"
jobs=$HOME/insec_jax/slurm
POLL_SECONDS=${POLL_SECONDS:-5}
HOSTS=("login node")
command -v squeue > /dev/null || fail "there is no squeue here; call this on a login node of a Slurm cluster"

# shellcheck disable=SC2317,SC2329  # called by remote.sh
reach() {
  bash -c "$2"
}

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"
}

# JOB, which must be a name; a second argument: there must be such a job.
check_name() {
  case $1 in
    '' | [!A-Za-z0-9]* | *[!A-Za-z0-9._-]*) fail "JOB '$1': give a name of letters, digits, '.', '_' and '-'" ;;
  esac
  job=$jobs/$1
  [ $# -eq 1 ] || [ -d "$job" ] || fail "there is no job $1; launch/slurm.sh list names those that are there"
}

# A whole number of at least $3.
check_number() {
  case $2 in
    '' | *[!0-9]*) fail "$1 $2: give a whole number" ;;
  esac
  [ "$2" -ge "$3" ] || fail "$1 $2: give at least $3"
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

# Sets state to that of the job in Slurm, such as RUNNING, or to nothing; reason and nodes beside it.
ask() {
  local answer
  answer=$(squeue --noheader --user="$(id -un)" --states=all --format='%i|%T|%r|%N' 2>&1) \
    || broken "squeue does not answer: $(printf '%s\n' "$answer" | tail -1); the job is not touched, try again later"
  answer=$(printf '%s\n' "$answer" | grep "^$(cat "$job/id" 2> /dev/null || echo none)|" | tail -1) || answer='|||'
  IFS='|' read -r _ state reason nodes << END
$answer
END
  case $state in
    # Jobs that are over stay in the list for some minutes.
    COMPLETED | FAILED | CANCELLED | TIMEOUT | NODE_FAIL | OUT_OF_MEMORY | BOOT_FAIL | DEADLINE | PREEMPTED) state= ;;
  esac
}

# The number of a finished job, or nothing.
code_of() {
  cat "$job/code" 2> /dev/null || true
}

status() {
  local code
  ask
  code=$(code_of)
  python3 - "$job" "$state" "$reason" "$nodes" << 'PYTHON'
import json, pathlib, sys

job, state, reason, nodes = pathlib.Path(sys.argv[1]), *sys.argv[2:]


def read(file):
  path = job / file
  return path.read_text(errors="replace").strip() if path.exists() else ""


def last_line(file):
  lines = read(file).splitlines()
  return lines[-1] if lines else ""


words = read("words").split("\0")
given = [word.partition("=")[2] or words[at + 1] for at, word in enumerate(words) if word.startswith("--workdir")]
paths = [pathlib.Path(folder).expanduser() / "metrics.jsonl" for folder in given if "://" not in folder]
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
  trap 'kill "$reader" 2> /dev/null' EXIT
  while [ -z "$(code_of)" ]; do
    ask
    if [ -z "$state" ]; then
      sleep "$POLL_SECONDS"  # its last file may not be seen here yet
      [ -n "$(code_of)" ] || broken "the job $(basename "$job") is gone from Slurm without an exit code: it was" \
        "cancelled, or the cluster does not queue jobs again; the same run command goes on"
    fi
    sleep "$POLL_SECONDS"
  done
  sleep 1.2  # what was written last: the reader looks once a second
  exit "$(code_of)"
}

stop() {
  touch "$job/stop"
  local waited=0 signalled=
  while [ -z "$(code_of)" ]; do
    ask
    case $state in
      '') break ;;
      PENDING | REQUEUED | REQUEUE_HOLD | SPECIAL_EXIT) show scancel "$(cat "$job/id")" || true ;;
      RUNNING)
        [ -n "$signalled" ] || show scancel --signal=TERM --batch "$(cat "$job/id")" && signalled=yes
        if [ "$waited" -ge "$(cat "$job/grace")" ]; then show scancel "$(cat "$job/id")" || true; fi
        ;;
    esac
    sleep "$POLL_SECONDS"
    waited=$((waited + POLL_SECONDS))
  done
  if [ -n "$(code_of)" ]; then echo "ended with exit code $(code_of)"; else echo "cancelled; no exit code"; fi
}

list() {
  for job in "$jobs"/*/; do
    job=${job%/}
    [ ! -f "$job/id" ] || status || true
  done
}

parse() {
  nodes_asked=1 gpus=1 cpus=8 limit=1-00:00:00 grace=300 tries=5 restarts=100
  extras="cuda gcs data" topology='' preflight=yes follows='' options=() names=()
  while [ $# -gt 0 ]; do
    case $1 in
      --nodes | --gpus | --cpus | --time | --grace | --tries | --restarts | --sbatch | --extras | --secret | --fit)
        [ $# -gt 1 ] || fail "$1 without a value"
        ;;
    esac
    case $1 in
      --nodes) check_number "$1" "$2" 1; nodes_asked=$2; shift ;;
      --gpus) check_number "$1" "$2" 0; gpus=$2; shift ;;
      --cpus) check_number "$1" "$2" 1; cpus=$2; shift ;;
      --time) limit=$2; shift ;;
      --grace) check_number "$1" "$2" 1; grace=$2; shift ;;
      --tries) check_number "$1" "$2" 1; tries=$2; shift ;;
      --restarts) check_number "$1" "$2" 0; restarts=$2; shift ;;
      --sbatch) options[${#options[@]}]=$2; shift ;;
      --extras) extras=$2; shift ;;
      --secret) names[${#names[@]}]=$2; shift ;;
      --fit) topology=$2; shift ;;
      --no-preflight) preflight= ;;
      --dirty) DIRTY=1 ;;
      --wait) follows=yes ;;
      --dry-run) DRY_RUN=1 ;;
      --) shift; break ;;
      *) fail "run: '$1' is no option; give the command after --, as in launch/slurm.sh run JOB -- python -m ..." ;;
    esac
    shift
  done
  [ $# -gt 0 ] || fail "run: there is no command; give it after --"
  command=("$@")
  session=$(seconds_of "$limit") || fail "--time $limit: give MINUTES, H:MM:SS or D-HH:MM:SS"
  [ "$session" -gt "$grace" ] || fail "--grace $grace is not shorter than --time $limit; give more time"
}

# The variables of this shell that are no business of Slurm's: what sbatch sees it keeps in files of its own.
hidden() {
  compgen -e | grep -E '(_TOKEN|_KEY|_SECRET|_PASSWORD)$' || true
  printf '%s\n' "${SECRETS[@]}" ${names[@]+"${names[@]}"}
}

submit() {
  local name answer without=() tasks=$gpus
  [ "$tasks" -gt 0 ] || tasks=1
  for name in $(hidden | sort -u); do
    without[${#without[@]}]=-u
    without[${#without[@]}]=$name
  done
  set -- --parsable --job-name="insec-$(basename "$job")" --nodes="$nodes_asked" --ntasks-per-node="$tasks" \
    --cpus-per-task="$cpus" --time="$limit" --signal="B:TERM@$grace" --requeue --open-mode=append \
    --output="$job/log" --chdir="$HOME/insec_jax/code/$COMMIT"
  [ "$gpus" -eq 0 ] || set -- "$@" --gpus-per-node="$gpus"
  set -- "$@" ${options[@]+"${options[@]}"} "$HOME/insec_jax/code/$COMMIT/launch/slurm_job.sh" "$(basename "$job")"
  printf '+ %s\n' "$(quoted sbatch "$@")" >&2
  [ -z "$DRY_RUN" ] || return 0
  if ! answer=$(env "${without[@]}" sbatch "$@" 2>&1); then
    case $answer in
      *"Unable to contact"* | *"Socket timed out"* | *"Connection refused"*) name=broken ;;
      *) name=fail ;;
    esac
    "$name" "sbatch: $(printf '%s\n' "$answer" | tail -1); correct the options, or try again later"
  fi
  answer=$(printf '%s\n' "$answer" | tail -1)
  printf '%s\n' "${answer%%;*}" > "$job/id"
  echo "queued $(basename "$job") as Slurm job ${answer%%;*}; launch/slurm.sh logs $(basename "$job") follows it"
}

check_here() {
  local python=$HOME/insec_jax/code/$COMMIT/.venv/bin/python file=$HOME/insec_jax/code/$COMMIT/launch/preflight.py
  scratch
  echo "+ preflight.py check, on this login node" >&2
  (cd "$HOME/insec_jax/code/$COMMIT" && "$python" "$file" check --host login ${topology:+--fit "$topology"} -- \
    "${command[@]}") > "$SCRATCH/checks" || broken "the checks ended early; --no-preflight leaves them out"
  "$python" "$file" table --hosts login < "$SCRATCH/checks" >&2 || exit 2
}

run() {
  cd "$here/.."
  name_code
  if [ -f "$job/id" ] && [ -z "$(code_of)" ]; then
    ask
    [ -z "$state" ] || fail "the job $(basename "$job") is $state as Slurm job $(cat "$job/id"); stop it, or give" \
      "another name"
  fi
  if [ -z "$DRY_RUN" ]; then
    local words
    read -r -a words <<< "$extras"
    provide_all ${words[@]+"${words[@]}"}
    [ -z "$preflight" ] || check_here
    (umask 077 && mkdir -p "$job")
    environment_file "$job/environment" ${names[@]+"${names[@]}"}
    rm -f "$job/code" "$job/stop" "$job/restarts" "$job/failures" "$job/checked" "$job/id"
    printf '%s\0' "${command[@]}" > "$job/words"
    quoted "${command[@]}" > "$job/command"
    printf '%s\n' "$COMMIT" > "$job/commit"
    printf '%s\n' "$grace" > "$job/grace"
    printf '%s\n' "$tries" > "$job/tries"
    printf '%s\n' "$restarts" > "$job/most_restarts"
    [ -n "$preflight" ] || touch "$job/checked"
    touch "$job/log"
  fi
  submit
  [ -z "$follows" ] || [ -n "$DRY_RUN" ] || follow
}

verb=${1:-}
[ $# -eq 0 ] || shift
case $verb in
  run) check_name "${1:-}"; shift; parse "$@"; run ;;
  status | logs | stop)
    check_name "${1:-}" there
    [ $# -eq 1 ] || fail "$verb: '$2' is one word too many"
    case $verb in logs) follow ;; *) "$verb" ;; esac
    ;;
  list) [ $# -eq 0 ] || fail "list: '$1' is one word too many"; list ;;
  -h | --help | help) usage ;;
  *) usage >&2; exit 2 ;;
esac
