#!/usr/bin/env bash
# A run on one GPU box that answers to ssh, such as a rented one, from a laptop that may sleep.
#   launch/gpu.sh run --host=ubuntu@BOX python -m insec_jax.train --config=... --workdir=~/runs/8b     detached
#   launch/gpu.sh setup              sends the code and makes the environment; run does so too
#   launch/gpu.sh status             one line of JSON; the exit code is that of the job once it has ended
#   launch/gpu.sh logs               prints the log until the job ends, also over a connection that breaks
#   launch/gpu.sh stop               lets the run save and ends it
#   launch/gpu.sh list               one line of JSON for each job
#   launch/gpu.sh fetch PATH [TO]    copies a file or folder of the box into the folder TO (.), whole or not at all
#   launch/gpu.sh ssh [WORD...]      a shell, or a command
#
# Options (--name=VALUE or --name VALUE), before the command of run and ssh:
#   --host HOST          what ssh takes: a name of ~/.ssh/config, or USER@ADDRESS; default: the variable BOX
#   --port N             port of ssh; default: that of ~/.ssh/config, or 22
#   --identity FILE      private key of ssh; default: those of ~/.ssh
#   --job JOB            name of the job, of run, status, logs and stop (run)
#   --dry-run            shows the commands and runs none
#   setup, run:
#   --extras "A B"       extras of the installation ("cuda gcs data")
#   --dirty              sends the working tree as it is, not the last commit only
#   run:
#   --secret NAME        environment variable that the run needs, beside HF_TOKEN, WANDB_API_KEY; may be repeated
#   --topology T         compiles a step for these GPUs before the start, such as h100:8
#   --no-check           starts without the checks of preflight.py
#   --wait               prints the log until the end; exit code of the job
#   stop:
#   --grace N            seconds for saving, then SIGKILL (600)
#
# The same run command goes on after a stop, a crash or a restart of the box. The box needs Linux, Python 3.11 or 3.12
# with venv, and with the extra cuda the driver of NVIDIA; the command then ends at once without a GPU.
# Exit codes: 0 done; 2 wrong input, or something is missing; 1 the box or the network; run --wait, logs and status hand
# on that of the job. Variables: INSEC_POLL_SECONDS (30), INSEC_ANSWER_SECONDS (120). Has not been run on a GPU yet.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/remote.sh
. "$here/remote.sh"

box=${BOX:-} port='' identity='' job=run extras='cuda gcs data' topology='' check=yes follows='' grace=600
needed=() command=()

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$here/gpu.sh"
}

# Sets the variables from the options; the first word that is none begins the command.
parse() {
  local option value
  while [ $# -gt 0 ]; do
    option=$1 value=''
    case $option in
      --) shift; break ;;
      --no-check) check_option "$option"; check=''; shift; continue ;;
      --dirty) check_option "$option"; DIRTY=yes; shift; continue ;;
      --wait) check_option "$option"; follows=yes; shift; continue ;;
      --dry-run) DRY_RUN=yes; shift; continue ;;
      --no-check=* | --dirty=* | --wait=* | --dry-run=*) fail "${option%%=*} takes no value" ;;
      --help | -h) usage; exit 0 ;;
      --*=*) value=${option#*=} option=${option%%=*}; shift ;;
      --*) check_option "$option"; [ $# -ge 2 ] || fail "$option needs a value"; value=$2; shift 2 ;;
      *) break ;;
    esac
    check_option "$option"
    [ -n "$value" ] || fail "$option is empty"
    case $option in
      --host) box=$value ;;
      --port) check_number "$option" "$value" 1; port=$value ;;
      --identity) [ -f "$value" ] || fail "--identity=$value: there is no such file"; identity=$value ;;
      --job) job=$value ;;
      --extras) extras=$value ;;
      --secret) needed[${#needed[@]}]=$value ;;
      --topology) topology=$value ;;
      --grace) check_number "$option" "$value" 1; grace=$value ;;
    esac
  done
  [ $# -eq 0 ] || command=("$@")
  case $box in
    '') fail "give the box: --host=USER@ADDRESS, or export BOX" ;;
    -* | *[!A-Za-z0-9._:@%-]*) fail "--host=$box: give USER@ADDRESS, or a name of ~/.ssh/config" ;;
    *:*:*) ;;  # of IPv6
    *:*) fail "--host=$box: give the port as --port=${box##*:}" ;;
  esac
  case $job in [!A-Za-z0-9]* | *[!A-Za-z0-9._-]*) fail "--job=$job: letters, digits, '_', '.' and '-' only" ;; esac
  HOSTS=("$box")
}

# Ends if the verb does not read the option.
check_option() {
  local known=' --host --port --identity --dry-run '
  case $verb in
    setup) known="$known--extras --dirty " ;;
    run) known="$known--job --extras --dirty --secret --topology --no-check --wait " ;;
    status | logs) known="$known--job " ;;
    stop) known="$known--job --grace " ;;
  esac
  case $known in *" $1 "*) ;; *) fail "$verb has no option $1; see launch/gpu.sh --help" ;; esac
}

# Runs the shell command on the box, without one a shell; a dead connection ends after a minute.
reach() {
  local words=(ssh -o ConnectTimeout=20 -o ServerAliveInterval=15 -o ServerAliveCountMax=4)
  [ -z "$BATCH" ] || words=("${words[@]}" -o BatchMode=yes)
  [ -z "$port" ] || words=("${words[@]}" -p "$port")
  [ -z "$identity" ] || words=("${words[@]}" -i "$identity")
  show "${words[@]}" "$1" ${2:+"$2"}
}

# Runs host.sh with these words on the box; ends with one line if the box does not answer or has no host.sh yet.
on_box() {
  local code=0
  reach "$box" "[ ! -f ~/insec_jax/host.sh ] && exit 254; bash ~/insec_jax/host.sh $(quoted "$@")" < /dev/null \
    || code=$?
  case $code in
    254) fail "nothing was run on $box yet; launch/gpu.sh run starts a job" ;;
    255) broken "no answer from $box; is it on, and does ssh $box work? A job there goes on meanwhile" ;;
  esac
  return "$code"
}

# Ends unless the box answers. ssh may ask here whether the box is the right one.
meet() {
  reach "$box" true < /dev/null || broken "no answer from $box; is it on, and does ssh $box work?"
}

setup() {
  name_code
  meet
  # shellcheck disable=SC2086  # one word an extra
  provide_all $extras || broken "the environment is not ready on $box; look at the messages above"
}

# The checks of the box, as a table.
preflight() {
  local fit=()
  [ -z "$topology" ] || fit=(--fit "$topology")
  persist check_box ${fit[@]+"${fit[@]}"} || broken "no checks from $box; look at the messages above"
  reach "$box" "python3 ~/insec_jax/code/$COMMIT/launch/preflight.py table --hosts=$box" < "$INSEC_SCRATCH/checks" >&2
}

check_box() {
  reach "$box" "bash ~/insec_jax/host.sh call $COMMIT python launch/preflight.py check --host=$box $(quoted "$@" -- \
    "${command[@]}")" < "$INSEC_SCRATCH/environment" > "$INSEC_SCRATCH/checks"
}

run() {
  [ "${#command[@]}" -gt 0 ] || fail "give the command, such as python -m insec_jax.train --config=... --workdir=..."
  scratch
  name_code
  environment_file "$INSEC_SCRATCH/environment" ${needed[@]+"${needed[@]}"}
  # JAX without a GPU would go on with the CPU, for days.
  case " $extras " in *' cuda '*) command=(env JAX_PLATFORMS=cuda "${command[@]}") ;; esac
  setup
  [ -z "$check" ] || preflight || fail "not started: see above; --no-check starts without the checks"
  start_surely "$box" "$job" "$INSEC_SCRATCH/environment" "${command[@]}" || exit "$(($? == 2 ? 2 : 1))"
  [ -n "$DRY_RUN" ] || echo "started; launch/gpu.sh status, logs, stop --host=$box --job=$job" >&2
  [ -z "$follows" ] || logs
}

# Ends unless the box has such a job.
check_job() {
  local line
  line=$(on_box status "$job") || exit $?
  [ "$(field state "$line")" != absent ] || fail "there is no job $job on $box; launch/gpu.sh list names them"
}

# Ends with the exit code of the job; with 0 while it runs, with 1 if it was lost.
status() {
  local line
  line=$(on_box status "$job") || exit $?
  [ -z "$DRY_RUN" ] || return 0
  printf '%s\n' "$line"
  case $(field state "$line") in
    running) ;;
    ended) exit "$(field code "$line")" ;;
    absent) check_job ;;
    *) broken "the job $job was lost: $box was restarted, or its processes were killed; the same run command goes on" ;;
  esac
}

logs() {
  scratch
  if [ -n "$DRY_RUN" ]; then
    on_box follow "$job"
  else
    follow_on "$box" "$job"
    status > /dev/null
  fi
}

# Copies the path of the box into a folder here, through a folder beside its name.
fetch() {
  local path=$1 to=${2:-.} name code=0
  name=$(basename "$path")
  [ -d "$to" ] || fail "$to is no folder here; make it, or give another"
  [ ! -e "$to/$name" ] || fail "$to/$name is there already; move it away, or give another folder"
  scratch
  partial=$(cd "$to" && pwd)/.$name.partial.$$
  trap 'rm -rf "$INSEC_SCRATCH" "$partial"' EXIT  # `partial` is not local: the trap runs outside
  [ -n "$DRY_RUN" ] || mkdir "$partial"
  send_path "$path" < /dev/null | { if [ -n "$DRY_RUN" ]; then cat; else tar -C "$partial" -xf -; fi; } \
    || code=${PIPESTATUS[0]}
  case $code in
    0) [ -n "$DRY_RUN" ] || [ -e "$partial/$name" ] || broken "$path did not arrive whole; run the command again" ;;
    2) exit 2 ;;
    *) broken "$path did not arrive whole; look at the message above, and run the same command again" ;;
  esac
  [ -z "$DRY_RUN" ] || return 0
  mv "$partial/$name" "$to/$name"
  echo "$to/$name"
}

# A tar of the path on stdout. A folder in which a job writes changes meanwhile: tar then has exit code 1.
send_path() {
  reach "$box" "p=$(quoted "$1")
    case \$p in '~/'*) p=\$HOME/\${p#??} ;; esac
    [ -e \"\$p\" ] || { echo \"error: there is no \$p on the box; give a path from / or ~/ on\" >&2; exit 2; }
    tar -C \"\$(dirname \"\$p\")\" --warning=no-file-changed -cf - \"\$(basename \"\$p\")\" || [ \$? -eq 1 ]"
}

verb=${1:-}
case $verb in
  setup | run | status | logs | stop | list | fetch | ssh) shift ;;
  -h | --help | help) usage; exit 0 ;;
  *) usage >&2; exit 2 ;;
esac
parse "$@"
case $verb in
  run | ssh) ;;
  fetch) [ "${#command[@]}" -gt 0 ] && [ "${#command[@]}" -le 2 ] || fail "give what to fetch: fetch PATH [TO]" ;;
  *) [ "${#command[@]}" -eq 0 ] || fail "$verb takes no command, but got ${command[0]}" ;;
esac
case $verb in
  setup) cd "$here/.."; setup ;;
  run) cd "$here/.."; run ;;
  stop) check_job; on_box stop "$job" "$grace" ;;
  list) on_box list ;;
  fetch) fetch "${command[@]}" ;;
  ssh)
    # One word is a line of the shell there, as for ssh; several are words.
    [ "${#command[@]}" -eq 1 ] || command=("$(quoted ${command[@]+"${command[@]}"})")
    reach "$box" "${command[0]}" ;;
  *) "$verb" ;;
esac
