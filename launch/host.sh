#!/usr/bin/env bash
# Code, environment and detached jobs on a host. tpu.sh and gpu.sh send this file to each host and call it there.
#   host.sh has COMMIT              prints yes or no: whether this host has the code
#   host.sh unpack COMMIT           unpacks the code from a tar.gz on stdin
#   host.sh setup COMMIT [EXTRA...] makes the environment, which commits with the same requirements share
#   host.sh start [--unless-done] JOB COMMIT WORD...   starts a command that goes on without the connection. NAME=VALUE
#                                   on stdin, each ended by a zero byte, go into its environment and nowhere else; the
#                                   last one is END. A job that runs the same command is left as it is, and so is one
#                                   that has ended with exit code 0 with --unless-done
#   host.sh call COMMIT WORD...     runs a command now, with such an environment
#   host.sh status JOB              one line of JSON: state (running, ended, lost or absent), exit code, last lines
#   host.sh follow JOB [LINE]       prints the log from that line (1) until the job ends; its exit code is the job's
#   host.sh number JOB [LINE]       the same, each line with its number, from 1, and a colon in front
#   host.sh stop JOB [SECONDS]      SIGTERM, and SIGKILL after so many seconds (600); `status` says that it was called
#   host.sh halt JOB [SECONDS]      the same, for a job that is started again at once
#   host.sh list                    one line of JSON for each job
# All is kept below ~/insec_jax. Needs Linux with bash, python3, util-linux and coreutils.
set -euo pipefail
umask 077
base=$HOME/insec_jax

fail() {
  echo "error: $*" >&2
  exit 2
}

broken() {
  echo "error: $*" >&2
  exit 1
}

need() {
  [ "$1" -ge "$2" ] || fail "host.sh $3: $(sed -n "s/^#   host.sh $3 */expects /p" "$0" | head -1)"
}

unpack() {
  local code=$base/code/$1
  exec 9> "$code.lock"
  flock 9
  if [ -d "$code" ]; then
    cat > /dev/null
    return
  fi
  rm -rf "$code.partial"
  mkdir "$code.partial"
  tar -xzf - -C "$code.partial" || broken "the code did not arrive whole; run the command again"
  mv "$code.partial" "$code"
}

# The oldest tested Python of this host; some images of TPU VMs have 3.10 only.
find_python() {
  local python
  for python in python3.12 python3.11 python3; do
    if "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2> /dev/null
    then
      echo "$python"
      return
    fi
  done
  echo "installing python3.11-venv" >&2
  # A VM that has just started may be installing updates.
  if ! { sudo -n apt-get -qq update &&
    sudo -n apt-get -qq -o DPkg::Lock::Timeout=300 install -y python3.11-venv; } > "$base/apt.log" 2>&1; then
    tail -3 "$base/apt.log" >&2
    broken "this host has no Python 3.11 or 3.12 with venv, and it could not be installed; install python3.11-venv"
  fi
  echo python3.11
}

setup() {
  local commit=$1 code=$base/code/$1 began=$SECONDS python minor key venv extras
  shift
  [ -d "$code" ] || fail "this host has no code of commit $commit; send it with unpack"
  mkdir -p "$base/venv"
  python=$(find_python)
  minor=$("$python" -c 'import sys; print("%d%d" % sys.version_info[:2])')
  extras=$(printf '%s\n' "$@" | sort -u | paste -sd, -)
  key=py$minor-$(cat "$code/setup.py" "$code/launch/constraints-py$minor.txt" | cksum | cut -d' ' -f1)-${extras//,/-}
  venv=$base/venv/$key
  exec 9> "$venv.lock"
  flock -n 9 || { echo "waiting for another set-up of the same environment"; flock 9; }
  if [ ! -f "$venv/complete" ]; then
    echo "installing with $python, a few minutes, once for these requirements"
    rm -rf "$venv" "$venv.source"
    "$python" -m venv "$venv"
    # From a copy: pip writes into the folder that it builds.
    cp -r "$code" "$venv.source"
    if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$venv.source${extras:+[$extras]}" \
      -c "$code/launch/constraints-py$minor.txt" > "$venv.log" 2>&1; then
      tail -5 "$venv.log" >&2
      broken "pip could not install the requirements; see $venv.log on this host"
    fi
    rm -rf "$venv.source"
    touch "$venv/complete"
  fi
  ln -sfn "$venv" "$code/.venv"
  echo "ready: commit $commit, $("$venv/bin/python" --version 2>&1), $((SECONDS - began)) s"
}

# Whether a process of the job is alive: all of them hold the lock. A process id could be another one's after a reboot.
is_running() {
  [ -f "$1/lock" ] && ! flock -n -s "$1/lock" true
}

# Exports what `environment_file` of remote.sh wrote to stdin.
read_environment() {
  local line=''
  while IFS= read -r -d '' line && [ "$line" != END ]; do
    export "${line?}"
  done
  [ "$line" = END ] || broken "the environment did not arrive whole; run the command again"
}

# Goes to the code, with its environment.
enter() {
  cd "$1"
  export PATH=$1/.venv/bin:$PATH PYTHONPATH=$1 PYTHONUNBUFFERED=1
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR-$base/xla}
}

call() {
  check_code "$1"
  read_environment
  enter "$base/code/$1"
  shift
  exec "$@" < /dev/null
}

check_code() {
  [ -d "$base/code/$1" ] || fail "this host has no code of commit $1; send it with unpack"
  [ -d "$base/code/$1/.venv/" ] || fail "this host has no environment for commit $1; make it with setup"
}

start() {
  local done_is_enough=''
  if [ "$1" = --unless-done ]; then
    done_is_enough=yes
    shift
  fi
  local name=$1 job=$base/jobs/$1 commit=$2 same=''
  shift 2
  check_code "$commit"
  read_environment
  mkdir -p "$job"
  if [ "$(cat "$job/commit" "$job/command" 2> /dev/null)" = "$commit"$'\n'"$(printf '%q ' "$@")" ]; then
    same=yes
  fi
  exec 8> "$job/lock"
  if ! flock -w 1 8; then
    [ -n "$same" ] || fail "the job $name is running on $(hostname), of commit $(cat "$job/commit"):" \
      "$(cat "$job/command"); stop it, or give another name"
    echo "$name is running already: process $(cat "$job/pid")"
    return
  fi
  if [ -n "$same" ] && [ -n "$done_is_enough" ] && [ "$(cat "$job/code" 2> /dev/null)" = 0 ]; then
    echo "$name has ended already with exit code 0"
    return
  fi
  rm -rf "$job/code" "$job/ended" "$job/pid" "$job/stopped" "$job/tmp"
  mkdir "$job/tmp"
  echo "$commit" > "$job/commit"
  printf '%q ' "$@" > "$job/command"  # to be read by people
  printf '%s\0' "$@" > "$job/words"
  date +%s > "$job/began"
  setsid bash "$0" hold "$name" "$commit" "$@" < /dev/null >> "$job/log" 2>&1 &
  exec 8>&-
  until [ -s "$job/pid" ] || [ -f "$job/code" ]; do sleep 0.05; done
  echo "started $name: process $(cat "$job/pid")"
}

# The process between `start` and the command; it stays until the command has ended and keeps its exit code.
hold() {
  local job=$base/jobs/$1 status=0
  trap : TERM HUP INT
  echo "--- $(date -u +%Y-%m-%dT%H:%M:%SZ) commit $2: $(cat "$job/command")"
  enter "$base/code/$2"
  export TMPDIR=$job/tmp
  shift 2
  "$@" &
  echo "$!" > "$job/pid.new"
  mv "$job/pid.new" "$job/pid"
  until wait "$!" && status=0 || status=$?; ! kill -0 "$!" 2> /dev/null; do :; done  # a signal to this shell ends `wait`
  echo "--- $(date -u +%Y-%m-%dT%H:%M:%SZ) exit code $status"
  date +%s > "$job/ended"
  echo "$status" > "$job/code.new"
  mv "$job/code.new" "$job/code"
}

status() {
  local job=$base/jobs/$1 state=lost
  if [ ! -f "$job/began" ]; then
    state=absent
  elif is_running "$job"; then
    state=running
  elif [ -f "$job/code" ]; then
    state=ended
  fi
  python3 - "$1" "$state" "$job" << 'PYTHON'
import json, os, pathlib, sys, time

name, state, job = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])


def read(file):
  path = job / file
  return path.read_text(errors="replace").strip() if path.exists() else ""


def last_line(path):
  """The last whole line of a file that the job wrote, not `hold`."""
  with open(path, "rb") as lines:
    lines.seek(max(0, path.stat().st_size - 65_536))
    whole = lines.read().decode(errors="replace").rpartition("\n")[0].splitlines()
  return next((line for line in reversed(whole) if not line.startswith("--- ")), "")


def metrics():
  """The newest line of metrics.jsonl that this host has: of a local workdir, or the copy of one in a bucket."""
  words = read("words").split("\0")
  folders = [word.partition("=")[2] for word in words if word.startswith("--workdir=")]
  folders += [value for word, value in zip(words, words[1:]) if word == "--workdir"]
  paths = [pathlib.Path(os.path.expanduser(folder)) / "metrics.jsonl" for folder in folders if "://" not in folder]
  try:
    paths = [path for path in [*paths, *job.glob("tmp/insec_gs_*/**/metrics.jsonl")] if path.exists()]
    return json.loads(last_line(max(paths, key=lambda path: path.stat().st_mtime))) if paths else None
  except (OSError, ValueError):  # a name that no file can have, or a file that goes away meanwhile
    return None


began, ended = read("began"), read("ended") if state == "ended" else ""
print(json.dumps({
  "job": name,
  "state": state,
  "code": int(read("code")) if state == "ended" else None,
  "stopped": (job / "stopped").exists(),
  "pid": int(read("pid") or 0) if state == "running" else None,
  "commit": read("commit"),
  "seconds": int(ended or time.time()) - int(began) if began else None,
  "command": read("command"),
  "log": last_line(job / "log") if (job / "log").exists() else "",
  "metrics": metrics() if began else None,
}))
PYTHON
}

follow() {
  local job=$base/jobs/$1 from=${2:-1} reader
  [ -f "$job/log" ] || fail "there is no job $1 on $(hostname)"
  if [ -n "${NUMBERED:-}" ]; then
    # Not in the background as a pipe: the id of its last process would not be that of tail.
    exec 7> >(grep --line-buffered --text -n '')
    tail -n "+$from" -F "$job/log" 2> /dev/null >&7 &
  else
    tail -n "+$from" -F "$job/log" 2> /dev/null &
  fi
  reader=$!
  trap 'kill "$reader" 2> /dev/null' EXIT
  # The reader ends when nobody reads its lines any more.
  while is_running "$job"; do
    kill -0 "$reader" 2> /dev/null || return 0
    sleep 0.5
  done
  # What was written last: the reader looks once a second.
  sleep 1.2
  [ -f "$job/code" ] || broken "the job $1 was lost: this host was restarted, or its processes were killed"
  exit "$(cat "$job/code")"
}

halt() {
  local job=$base/jobs/$1 grace=${2:-600} waited=0
  if is_running "$job"; then
    kill -TERM "$(cat "$job/pid")" 2> /dev/null || true
    while is_running "$job" && [ "$waited" -lt $((grace * 5)) ]; do
      sleep 0.2
      waited=$((waited + 1))
    done
    if is_running "$job"; then
      echo "still running after $grace s: SIGKILL"
      # The process group of `hold`, which is its leader.
      kill -KILL -- "-$(ps -o pgid= -p "$(cat "$job/pid")" | tr -d ' ')" 2> /dev/null || true
      while is_running "$job"; do sleep 0.2; done
    fi
  fi
  if [ -f "$job/code" ]; then echo "ended with exit code $(cat "$job/code")"; else echo "not running"; fi
}

list() {
  local job
  for job in "$base"/jobs/*/; do
    [ ! -d "$job" ] || status "$(basename "$job")"
  done
}

verb=${1:-}
[ $# -eq 0 ] || shift
case $verb in
  has) need $# 1 has; if [ -d "$base/code/$1" ]; then echo yes; else echo no; fi ;;
  unpack) need $# 1 unpack; mkdir -p "$base/code"; unpack "$1" ;;
  setup) need $# 1 setup; setup "$@" ;;
  start) need $# 3 start; start "$@" ;;
  call) need $# 2 call; call "$@" ;;
  hold) hold "$@" ;;
  status) need $# 1 status; status "$1" ;;
  follow) need $# 1 follow; follow "$@" ;;
  number) need $# 1 number; NUMBERED=yes follow "$@" ;;
  stop)
    need $# 1 stop
    [ -d "$base/jobs/$1" ] || fail "there is no job $1 on $(hostname)"
    touch "$base/jobs/$1/stopped"
    halt "$@" ;;
  halt) need $# 1 halt; halt "$@" ;;
  list) list ;;
  -h | --help | help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0" ;;
  *) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0" >&2; exit 2 ;;
esac
