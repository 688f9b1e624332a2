#!/usr/bin/env bash
# A run on a slice of Cloud TPU VMs, spot or not, from a laptop that may sleep. Needs gcloud; every command is shown.
#   launch/tpu.sh create --type=v6e-16 --spot [COMMAND]    asks for the slice and waits for it; first checks whether
#                                                    the command would fit into its memory
#   launch/tpu.sh run python -m insec_jax.train --config=... --workdir=gs://BUCKET/run     detached, on every host
#   launch/tpu.sh run --keep-alive --type=v6e-16 --spot python -m insec_jax.train ...      creates, watches, goes on
#   launch/tpu.sh status | logs | stop               of the job
#   launch/tpu.sh ssh [WORD...]                      a shell, or a command, on one host
#   launch/tpu.sh delete                             deletes what create made, and nothing else
#   launch/tpu.sh list                               all slices in the zone that create made
#
# Options (--name=VALUE or --name VALUE), before the command of run and ssh:
#   --name NAME          name of the slice; default: the variable TPU
#   --zone ZONE          its zone, such as us-east5-a; default: the variable ZONE
#   --project PROJECT    default: the variable PROJECT, or gcloud's own
#   --dry-run            shows the commands and runs none
#   --ssh-flag FLAG      for gcloud compute tpus tpu-vm ssh, such as --ssh-flag=--internal-ip; may be repeated
#   create, run --keep-alive:
#   --type TYPE          such as v6e-16, v5litepod-8, v5p-32 (cores)
#   --version VERSION    runtime version; default: that of the type
#   --spot               may be preempted, and is cheaper
#   --slices N           so many slices in one run (1)
#   --hours N            create: withdraws the request when it is not granted by then. run --keep-alive: ends the run (24)
#   --create-flag FLAG   for gcloud compute tpus queued-resources create, such as --create-flag=--service-account=A
#   run:
#   --job JOB            name of the job, also for status, logs and stop (run)
#   --extras "A B"       extras of the installation ("tpu gcs data")
#   --secret NAME        environment variable that the run needs, beside HF_TOKEN, WANDB_API_KEY; may be repeated
#   --dirty              sends the working tree as it is, not the last commit only
#   --topology T         for the check of memory, such as v6e:4x4; default: that of the type
#   --no-check           starts without the checks of preflight.py
#   --wait               prints the logs until the end; exit code of the job
#   --keep-alive         stays and watches: asks for the slice when it is not there, again when it was preempted, and
#                        starts the job again until it ends with exit code 0, 2 or 3
#   --tries N            starts it again at most so often (20)
#   --then-delete        deletes the slice at the end of --keep-alive
#   run, status, logs, stop, ssh:
#   --host NODE/WORKER   one host only, such as mine/0; default: all (ssh: the first)
#   stop:
#   --grace N            seconds for saving, then SIGKILL (600)
#
# Exit codes: 0 done; 2 wrong input, or something is missing; 1 the cloud, the network or a host; run --wait, run
# --keep-alive and status hand on that of the job. Variables: INSEC_POLL_SECONDS (30), INSEC_ANSWER_SECONDS (120),
# INSEC_GRACE_SECONDS (180: between the ends of the job on the first and the last host). Has not been run on Google Cloud yet.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/remote.sh
. launch/tpu_slice.sh
. launch/keep_alive.sh

NAME=${TPU:-} ZONE=${ZONE:-} PROJECT=${PROJECT:-}
TYPE='' VERSION='' SPOT='' SLICES=1 HOURS=24 JOB=run EXTRAS='tpu gcs data' TOPOLOGY='' NO_CHECK='' WAIT='' KEEP='' TRIES=20
THEN_DELETE='' STATE='' REQUESTED='' ONE_HOST='' MET='' GRACE=600 SURVEYED='' SHOWN=''
SSH_FLAGS=() CREATE_FLAGS=() NEEDED=() COMMAND=()

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' launch/tpu.sh
}

# Sets the variables from the options; the first word that is none begins the command.
parse() {
  local option value
  while [ $# -gt 0 ]; do
    option=$1 value=''
    case $option in
      --) shift; break ;;
      --dry-run) DRY_RUN=yes; check_option "$option"; shift; continue ;;
      --spot) SPOT=yes; check_option "$option"; shift; continue ;;
      --dirty) DIRTY=yes; check_option "$option"; shift; continue ;;
      --no-check) NO_CHECK=yes; check_option "$option"; shift; continue ;;
      --wait) WAIT=yes; check_option "$option"; shift; continue ;;
      --keep-alive) KEEP=yes; check_option "$option"; shift; continue ;;
      --then-delete) THEN_DELETE=yes; check_option "$option"; shift; continue ;;
      --help | -h) usage; exit 0 ;;
      --dry-run=* | --spot=* | --dirty=* | --no-check=* | --wait=* | --keep-alive=* | --then-delete=*)
        fail "${option%%=*} takes no value" ;;
      --*=*) value=${option#*=} option=${option%%=*}; shift ;;
      --*) check_option "$option"; [ $# -ge 2 ] || fail "$option needs a value"; value=$2; shift 2 ;;
      *) break ;;
    esac
    [ -n "$value" ] || fail "$option is empty"
    check_option "$option"
    case $option in
      --name) NAME=$value ;;
      --zone) ZONE=$value ;;
      --project) PROJECT=$value ;;
      --type) TYPE=$value ;;
      --version) VERSION=$value ;;
      --slices) check_number "$option" "$value" 1; SLICES=$value ;;
      --hours) check_number "$option" "$value" 1; HOURS=$value ;;
      --tries) check_number "$option" "$value" 1; TRIES=$value ;;
      --grace) check_number "$option" "$value" 1; GRACE=$value ;;
      --job) JOB=$value ;;
      --extras) EXTRAS=$value ;;
      --topology) TOPOLOGY=$value ;;
      --host) ONE_HOST=$value ;;
      --secret) NEEDED[${#NEEDED[@]}]=$value ;;
      --ssh-flag) SSH_FLAGS[${#SSH_FLAGS[@]}]=$value ;;
      --create-flag) check_create_flag "$value"; CREATE_FLAGS[${#CREATE_FLAGS[@]}]=$value ;;
    esac
  done
  [ $# -eq 0 ] || COMMAND=("$@")
}

# Ends if the verb does not read the option.
check_option() {
  local always=' --name --zone --project --dry-run ' slice=' --type --version --spot --slices --hours --create-flag '
  local job=' --job --ssh-flag ' known
  case $VERB in
    create) known="$always$slice--topology" ;;
    run) known="$always$slice$job--host --extras --secret --dirty --topology --no-check --wait --keep-alive --tries --then-delete" ;;
    status | logs) known="$always$job--host" ;;
    stop) known="$always$job--host --grace" ;;
    ssh) known="$always--ssh-flag --host" ;;
    *) known=$always ;;
  esac
  case " $known " in *" $1 "*) ;; *) fail "$VERB has no option $1; see launch/tpu.sh --help" ;; esac
}

# Ends if the workdir of a watched run is on the slice, which is deleted once it was preempted.
check_workdir() {
  local word before='' folder=''
  [ -n "$KEEP" ] && [ -z "$NO_CHECK" ] || return 0
  for word in "${COMMAND[@]}"; do
    case $before in --workdir) folder=$word ;; esac
    case $word in --workdir=*) folder=${word#*=} ;; esac
    before=$word
  done
  case $folder in
    '' | gs://*) ;;
    *) fail "--workdir=$folder is on the slice and goes with it when it is preempted; give gs://BUCKET/NAME" ;;
  esac
}

# Ends if the flag for gcloud is one that the request has already: gcloud would take the last one.
check_create_flag() {
  case ${1%%=*} in
    --labels | --node-id | --node-count | --node-prefix | --accelerator-type | --type | --topology | --runtime-version | \
      --version | --spot | --preemptible | --valid-until* | --zone | --project | --async)
      fail "--create-flag=$1: launch/tpu.sh sets ${1%%=*} itself; leave it out, or use its own option" ;;
  esac
}

# Ends if options are given that only --keep-alive, or only a run without it, reads.
check_together() {
  [ "$VERB" = run ] || return 0
  [ -z "$KEEP" ] || [ -z "$WAIT" ] || fail "--keep-alive stays until the end of the job anyway; leave --wait out"
  [ -z "$KEEP" ] || [ -z "$ONE_HOST" ] || fail "--keep-alive watches all hosts; leave --host out"
  [ -n "$KEEP" ] || [ -z "$TYPE$SPOT$THEN_DELETE$VERSION" ] ||
    fail "--type, --version, --spot and --then-delete need --keep-alive: run takes the slice as it is"
}

# Ends unless the options name a slice.
check_place() {
  [ -n "$ZONE" ] || fail "give the zone: --zone=us-east5-a, or export ZONE"
  [ "$VERB" = list ] || [ -n "$NAME" ] || fail "give the slice a name: --name=mine, or export TPU"
  case $NAME in
    *[!a-z0-9-]* | [0-9-]* | *- | ??????????????????????????????????????????????????*)
      fail "--name=$NAME: small letters, digits and hyphens, a letter first, at most 49" ;;
  esac
  case $JOB in *[!A-Za-z0-9_.-]* | .* | -*) fail "--job=$JOB: letters, digits, '_', '.' and '-' only" ;; esac
  [ -n "$DRY_RUN" ] || command -v gcloud > /dev/null || fail "there is no gcloud here; see https://cloud.google.com/sdk/docs/install"
}

# Sets VERSION and TOPOLOGY for the type where they are not given.
check_type() {
  local version='' family size chips='' shape='' prefix=''
  [ -n "$TYPE" ] || fail "give the type of the slice, such as --type=v6e-16"
  family=${TYPE%-*} size=${TYPE##*-}
  case $TYPE in
    v5e-*) fail "--type=$TYPE: the cloud calls it v5litepod-$size" ;;
    *[A-Z]*) fail "--type=$TYPE: give small letters" ;;
  esac
  case $size in '' | *[!0-9]*) fail "--type=$TYPE: such as v6e-16, v5litepod-8 or v5p-32" ;; esac
  case $family in
    v6e) version=v2-alpha-tpuv6e chips=$size ;;
    v5litepod) version=v2-alpha-tpuv5-lite family=v5e chips=$size ;;
    v5p) version=v2-alpha-tpuv5 chips=$((size / 2)) ;;
    v4) version=tpu-ubuntu2204-base chips=$((size / 2)) ;;
  esac
  VERSION=${VERSION:-$version}
  [ -n "$VERSION" ] || [ "$STATE" = ACTIVE ] || fail "--type=$TYPE: give its runtime version as well, --version=..."
  case $family-$chips in
    v[56]e-1) shape=1x1 ;; v[56]e-4) shape=2x2 ;; v[56]e-8) shape=2x4 ;; v[56]e-16) shape=4x4 ;; v[56]e-32) shape=4x8 ;;
    v[56]e-64) shape=8x8 ;; v[56]e-128) shape=8x16 ;; v[56]e-256) shape=16x16 ;;
    v4-4 | v5p-4) shape=2x2x1 ;; v4-8 | v5p-8) shape=2x2x2 ;; v4-16 | v5p-16) shape=2x2x4 ;;
    v4-32 | v5p-32) shape=2x4x4 ;; v4-64 | v5p-64) shape=4x4x4 ;; v4-128 | v5p-128) shape=4x4x8 ;;
  esac
  [ "$SLICES" -eq 1 ] || prefix=${SLICES}x
  TOPOLOGY=${TOPOLOGY:-${shape:+$prefix$family:$shape}}
}

# Runs the shell command on the host NODE/WORKER; a dead connection ends after a minute.
reach() {
  show gcloud compute tpus tpu-vm ssh "${1%/*}" --worker="${1#*/}" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"} \
    --quiet --ssh-flag=-oBatchMode=yes --ssh-flag=-oConnectTimeout=20 --ssh-flag=-oServerAliveInterval=15 --ssh-flag=-oServerAliveCountMax=4 \
    ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"} --command="$2"
}

# Sets HOSTS; ends unless the slice is there and ready.
find_hosts() {
  look
  if [ -n "$DRY_RUN" ]; then
    NUM_SLICES=$SLICES
  else
    case $STATE in
      ACTIVE) ;;
      UNKNOWN) refuse "the slice $NAME was not found out" "$ERR" ;;
      ABSENT) fail "there is no slice $NAME in $ZONE; launch/tpu.sh create makes it, run --keep-alive too" ;;
      *) fail "the slice $NAME is $STATE${REASON:+ ($REASON)}, not ACTIVE; create waits for it and replaces a dead one" ;;
    esac
  fi
  look_at_nodes
  [ "$HEALTH" = ready ] || broken "the slice $NAME is not ready: $REASON; run --keep-alive replaces one that is gone"
  if [ -n "$ONE_HOST" ]; then
    case " ${HOSTS[*]} " in *" $ONE_HOST "*) HOSTS=("$ONE_HOST") ;; *) fail "--host=$ONE_HOST is none of ${HOSTS[*]}" ;; esac
  fi
  first_contact
}

# Lets one connection alone make the key of gcloud, if there is none: several at once would each make one.
first_contact() {
  [ -f "$HOME/.ssh/google_compute_engine" ] || [ -n "$MET" ] || persist reach "${HOSTS[0]}" true < /dev/null || true
  MET=yes
}

# Checks on this machine whether a step of the command fits into the memory of the slice, before the slice costs money.
check_fit() {
  local python=.venv/bin/python lines
  [ -z "$NO_CHECK$DRY_RUN" ] && [ "${#COMMAND[@]}" -gt 0 ] || return 0
  if [ -z "$TOPOLOGY" ] || ! "$python" -c 'import jax, libtpu' 2> /dev/null; then
    echo "whether it fits into memory is checked on the host only: no $python with jax and libtpu here, or no --topology" >&2
    return 0
  fi
  scratch
  lines=$INSEC_SCRATCH/fit
  "$python" launch/preflight.py check --host here --fit "$TOPOLOGY" -- "${COMMAND[@]}" |
    grep -E '"check": "(fit|command|config)"' > "$lines" || true
  if ! grep -q . "$lines"; then
    echo "whether it fits into memory is not checked: fit compiles train, evaluate, mine and generate only" >&2
    return 0
  fi
  "$python" launch/preflight.py table --hosts=here < "$lines" || fail "no slice was asked for: the run would not start, see above"
}

create() {
  check_type
  check_fit
  trap 'echo "the request for $NAME stays and costs money once it is granted: create waits for it again, delete withdraws it" >&2; exit 130' INT TERM
  obtain $((HOURS * 3600)) || refuse "no slice $NAME" "$ERR"
  [ -n "$DRY_RUN" ] || echo "the slice $NAME is there; launch/tpu.sh run ... starts a job, delete ends the costs" >&2
}

# Checks the hosts with preflight.py, one table; returns 2 if something is missing.
preflight() {
  local host names lines
  QUIET=1 each check_on || { echo "error: no answer from ${FAILED[*]}" >&2; return 1; }
  names='' lines=$INSEC_SCRATCH/checks
  : > "$lines"
  for host in "${HOSTS[@]}"; do
    names=$names${names:+,}$host
    answer "$host" >> "$lines"
  done
  reach "${HOSTS[0]}" "python3 ~/insec_jax/code/$COMMIT/launch/preflight.py table --hosts=$names" < "$lines"
}

# The checks of one host; whether the run fits into the memory is computed on the first only.
check_on() {
  local fit=()
  if [ "$1" = "${HOSTS[0]}" ] && [ -n "$TOPOLOGY" ]; then fit=(--fit "$TOPOLOGY"); fi
  reach "$1" "bash ~/insec_jax/host.sh call $COMMIT python launch/preflight.py check --host $1 $(quoted \
    ${fit[@]+"${fit[@]}"} -- "${COMMAND[@]}")" < "$INSEC_SCRATCH/environment"
}

# Writes what the job gets on stdin, with one token a start: only processes of this start can join it.
make_environment() {
  local INSEC_RUN_TOKEN=${INSEC_RUN_TOKEN:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}
  environment_file "$INSEC_SCRATCH/environment" ${NEEDED[@]+"${NEEDED[@]}"}
}

# Starts the job on all hosts, or halts it on all; the first argument may be --unless-done.
start_all() {
  local worst failed
  make_environment
  each start_surely "${1:+$1 }$JOB" "$INSEC_SCRATCH/environment" "${COMMAND[@]}" && return
  [ "$WORST" -ne 2 ] || return 2
  worst=$WORST failed=${FAILED[*]}
  each stop_on halt 60 || true
  WORST=$worst FAILED=("$failed")
  return 1
}

run() {
  local code=0
  [ "${#COMMAND[@]}" -gt 0 ] || fail "give the command to run, such as python -m insec_jax.train --config=... --workdir=gs://..."
  scratch
  name_code
  make_environment
  check_workdir
  if [ -n "$KEEP" ]; then check_type; check_fit; fi
  if [ -n "$KEEP" ] && [ -z "$DRY_RUN" ]; then keep_alive; fi
  [ -z "$KEEP" ] || obtain $((HOURS * 3600))
  find_hosts
  if [ -n "$MADE" ]; then TYPE=$MADE SLICES=$NUM_SLICES; check_type; fi
  # shellcheck disable=SC2086  # one word an extra
  provide_all $EXTRAS || broken "the environment is not ready on ${FAILED[*]}; look at the messages above"
  if [ -z "$NO_CHECK" ]; then
    preflight || code=$?
    [ "$code" -ne 2 ] || fail "not started: something is missing, see the table above; --no-check starts without the checks"
    [ "$code" -eq 0 ] || broken "the checks got no answer; run the same command again"
  fi
  start_all || { [ "$WORST" -eq 2 ] && exit 2; broken "not started on ${FAILED[*]}; run the same command again"; }
  [ -n "$DRY_RUN" ] || echo "started; launch/tpu.sh status, logs, stop --name=$NAME --zone=$ZONE --job=$JOB" >&2
  if [ -n "$WAIT" ]; then
    AT_ONCE=${#HOSTS[@]} each follow_on "$JOB" || true
    status
  fi
}

# Prints slice and job, and ends with the exit code of the job: 0 while it runs, 1 if it was lost or a host is silent.
status() {
  local host line
  find_hosts
  scratch
  survey
  [ -z "$DRY_RUN" ] || exit 0
  echo "slice $NAME: $STATE, $MADE, ${#HOSTS[@]} hosts; job $JOB: running on $RUN, ended on $ENDED, lost on $LOST, no answer from $SILENT"
  for host in "${HOSTS[@]}"; do
    line=$(answer "$host")
    printf '%s  %s, exit code %s, %s s, commit %s\n' "$host" "$(field state "$line" | grep . || echo silent)" \
      "$(field code "$line" | grep . || echo -)" "$(field seconds "$line" | grep . || echo -)" "$(field commit "$line")"
  done
  [ -z "$NEWS" ] || echo "log      $NEWS"
  answer "${HOSTS[0]}" | sed -n 's/^.*, "metrics": \({.*}\)}$/metrics  \1/p'
  [ "$SILENT" -eq 0 ] || exit 1
  # shellcheck disable=SC2086  # one word a code
  [ "$ENDED" -ne "${#HOSTS[@]}" ] || exit "$(verdict $CODES)"
  [ $((RUN + ENDED)) -eq "${#HOSTS[@]}" ] || exit 1
}

# Ends if no host has had such a job.
check_job() {
  local host
  [ -z "$DRY_RUN" ] || return 0
  QUIET=yes each status_on "$JOB" || return 0
  for host in "${HOSTS[@]}"; do
    [ "$(field state "$(answer "$host")")" = absent ] || return 0
  done
  fail "there is no job $JOB on $NAME; give the --job of a run"
}

delete() {
  name_keeper
  if [ -z "$DRY_RUN" ] && keeper_lives; then
    show kill "$(cat "$KEEPER")"  # or it would ask for the slice again
    while keeper_lives; do sleep 0.2; done
  fi
  NUM_SLICES=$SLICES
  look
  [ -z "$DRY_RUN" ] || STATE=ACTIVE OURS=yes
  remove
  [ -n "$DRY_RUN" ] || echo "nothing of $NAME is left in $ZONE" >&2
}

list() {
  local kind fields
  for kind in queued-resources tpu-vm; do
    if [ "$kind" = tpu-vm ]; then fields=name.basename\(\),state,acceleratorType,labels; else
      fields='name.basename(),state.state,tpu.nodeSpec[0].node.acceleratorType,tpu.nodeSpec[0].node.labels'
    fi
    ask "$kind" list --format="value[separator=\"|\"]($fields)" || refuse "no list" "$ERR"
    printf '%s\n' "$OUT" | sed -n "s/^\([^|]*\)|\([^|]*\)|\([^|]*\)|.*insec-jax=.*$/$kind  \1  \2  \3/p"
  done
}

VERB=${1:-}
case $VERB in
  create | status | run | logs | ssh | stop | delete | list) shift ;;
  -h | --help | help) usage; exit 0 ;;
  *) usage >&2; exit 2 ;;
esac
parse "$@"
check_place
check_together
case $VERB in create | run | ssh) ;; *) [ "${#COMMAND[@]}" -eq 0 ] || fail "$VERB takes no command, but got ${COMMAND[0]}" ;; esac
case $VERB in
  logs) find_hosts; scratch; check_job; AT_ONCE=${#HOSTS[@]} each follow_on "$JOB" ;;
  ssh)
    find_hosts
    # One word is a line of the shell there, as for ssh; several are words.
    [ "${#COMMAND[@]}" -le 1 ] || COMMAND=("$(quoted "${COMMAND[@]}")")
    show gcloud compute tpus tpu-vm ssh "${HOSTS[0]%/*}" --worker="${HOSTS[0]#*/}" --zone="$ZONE" \
      ${PROJECT:+"--project=$PROJECT"} ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"} \
      ${COMMAND[@]+"--command=${COMMAND[0]}"} ;;
  stop) find_hosts; scratch; check_job; each stop_on stop "$GRACE" || broken "not stopped on ${FAILED[*]}" ;;
  *) "$VERB" ;;
esac
