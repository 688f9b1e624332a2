# shellcheck shell=bash disable=SC2034,SC2153  # shares variables with tpu.sh
# Sourced by tpu.sh: `run --keep-alive`. Asks for the slice, starts the job and looks at both every POLL_SECONDS; a slice
# that was preempted is deleted and asked for again, and the same command goes on from its workdir. Nothing is kept on
# this machine: after its end the same command finds the slice and the job, and goes on watching.
GRACE_SECONDS=${INSEC_GRACE_SECONDS:-180}  # between the end of the job on one host and that on the last

# Sets how many hosts RUN the job, have ENDED it, have LOST it (or never had it) and are SILENT; CODES of the ended ones,
# STOPPED if `stop` was called, QUIET_HOSTS, NEWS (the last line of the log of the first host).
survey() {
  local host line state
  RUN=0 ENDED=0 LOST=0 SILENT=0 CODES='' STOPPED='' QUIET_HOSTS='' NEWS=''
  # The commands are shown the first time.
  QUIET=1 NOTES=${SURVEYED:+/dev/null} each status_on "$JOB" || true
  SURVEYED=yes
  for host in "${HOSTS[@]}"; do
    line=$(answer "$host")
    state=$(field state "$line")
    case $state in
      running) RUN=$((RUN + 1)) ;;
      ended) ENDED=$((ENDED + 1)) CODES="$CODES $(field code "$line")" ;;
      lost | absent) LOST=$((LOST + 1)) ;;
      *) SILENT=$((SILENT + 1)) QUIET_HOSTS="$QUIET_HOSTS $host" ;;
    esac
    [ "$(field stopped "$line")" != true ] || STOPPED=yes
    [ -n "$NEWS" ] || NEWS=$(printf '%s' "$line" | sed -n 's/^.*"log": "\(.*\)", "metrics": .*$/\1/p')
  done
}

# The exit code of the job for those of all hosts: 3 if any diverged, 2 if all had wrong input (a host that was lost
# lets the others end with 2 as well), 0 if all are done, else that of the first that is not 0.
verdict() {
  local code first='' zeros=yes twos=yes
  for code; do
    [ "$code" != 3 ] || { echo 3; return; }
    [ "$code" = 0 ] || { zeros=''; first=${first:-$code}; }
    [ "$code" = 2 ] || { twos=''; }
  done
  if [ -n "$zeros" ]; then echo 0; elif [ -n "$twos" ]; then echo 2; elif [ "$first" = 2 ]; then echo 1; else
    echo "$first"
  fi
}

# Stops the job of a host: VERB is stop, or halt for a job that is started again.
stop_on() {
  within $(($3 + ANSWER_SECONDS)) reach "$1" \
    "[ ! -f ~/insec_jax/host.sh ] || bash ~/insec_jax/host.sh $2 $JOB $3" < /dev/null
}

# Ends the watching with this exit code and line; with --then-delete the slice goes as well.
finish() {
  local code=$1
  shift
  echo "$*" >&2
  if [ -n "$THEN_DELETE" ]; then
    look
    remove
    FINISHED=yes
    echo "the slice $NAME is deleted" >&2
  else
    FINISHED=yes
    echo "the slice $NAME is still there and costs money: launch/tpu.sh delete --name=$NAME --zone=$ZONE" >&2
  fi
  exit "$code"
}

# Brings slice, code and job up; what is there already is left as it is. Returns 1 with WHY if it is worth another try.
bring_up() {
  local code=0 start=()
  if ! obtain "$1"; then
    explain "$ERR"
    WHY="no slice: $ERR; $ADVICE"
    case $KIND in
      capacity | network | other) return 1 ;;
      quota) [ -z "$HAD_SLICE" ] || return 1 ;;  # that of the deleted slice may not be free yet
    esac
    refuse "the cloud refuses the slice $NAME" "$ERR"
  fi
  HAD_SLICE=yes
  while look_at_nodes && [ "$HEALTH" = unsure ]; do
    echo "$(date +%H:%M:%S) waiting for the nodes: $REASON" >&2
    [ "$(date +%s)" -lt "$UNTIL" ] || { WHY="the nodes are not ready: $REASON"; return 1; }
    nap "$POLL_SECONDS"
  done
  if [ "$HEALTH" = gone ]; then
    WHY="preempted: $REASON"
    look
    remove
    return 1
  fi
  first_contact
  survey
  [ -z "$STOPPED" ] || [ -z "$HAD_JOB" ] || finish 42 "the job $JOB was stopped by launch/tpu.sh stop"
  [ "$RUN" -eq 0 ] || [ "$RUN" -eq "${#HOSTS[@]}" ] || return 0  # `watch_job` waits for the end of the others
  # shellcheck disable=SC2086  # one word an extra
  if ! provide_all $EXTRAS; then
    WHY="no environment on ${FAILED[*]}"
    [ "$WORST" -ne 2 ] || finish 2 "error: $WHY; look at the messages above"
    replace_silent
    return 1
  fi
  if [ -z "$CHECKED" ] && [ "$RUN" -eq 0 ]; then
    preflight || code=$?
    [ "$code" -ne 2 ] || finish 2 "error: not started: something is missing, see the table above"
    [ "$code" -eq 0 ] || { WHY="the checks got no answer"; return 1; }
    CHECKED=yes
  fi
  # What ran or was done when it was looked at is not done a second time.
  [ $((RUN + ENDED)) -ne "${#HOSTS[@]}" ] || start=(--unless-done)
  if ! start_all ${start[@]+"${start[@]}"}; then
    WHY="not started on ${FAILED[*]}"
    [ "$WORST" -ne 2 ] || finish 2 "error: $WHY; look at the messages above"
    return 1
  fi
  HAD_JOB=yes
}

# Deletes the slice if some hosts give no answer while others do: a host is broken. When none does, the network may be.
replace_silent() {
  [ "${#FAILED[@]}" -lt "${#HOSTS[@]}" ] || return 0
  look
  remove
}

# Watches until the job has ended for good (ends the program) or is to be started again (returns, with WHY).
watch_job() {
  local mixed='' now told=0 last=''
  while :; do
    now=$(date +%s)
    if [ "$now" -ge "$UNTIL" ]; then
      each stop_on halt 600 || finish 1 "error: the budget of $HOURS hours is over; no answer from ${FAILED[*]}"
      finish 42 "the budget of $HOURS hours is over; the job was stopped, and the same command goes on"
    fi
    look
    case $STATE-$INITIATOR in
      # `remove` waits until it is done: what is going on now is the deletion of somebody else.
      ABSENT-* | DELETING-* | SUSPENDING-USER | SUSPENDED-USER)
        FINISHED=yes
        broken "somebody deletes the slice $NAME; the same command asks for it again and goes on" ;;
      ACTIVE-*) look_at_nodes ;;
      UNKNOWN-*) HEALTH=unsure ;;
      *) HEALTH=gone REASON="the queued resource is $STATE" ;;
    esac
    if [ "$HEALTH" = gone ]; then
      WHY="preempted: $REASON"
      remove
      return
    fi
    if [ "$HEALTH" = ready ]; then
      survey
      [ "$ENDED" -lt "${#HOSTS[@]}" ] || { judge; return; }
      if [ $((RUN + SILENT)) -eq 0 ]; then
        WHY="lost: no host runs it any more"
        return
      fi
      [ $((ENDED + LOST)) -eq 0 ] && mixed='' || mixed=${mixed:-$now}
      if [ -n "$mixed" ] && [ $((now - mixed)) -ge "$GRACE_SECONDS" ]; then
        WHY="it has ended on $((ENDED + LOST)) of ${#HOSTS[@]} hosts only${QUIET_HOSTS:+; no answer from$QUIET_HOSTS}"
        each stop_on halt 60 || true
        [ "$SILENT" -eq 0 ] || remove
        return
      fi
      if [ "$RUN $ENDED $LOST $SILENT" != "$last" ] || [ $((now - told)) -ge 300 ]; then
        last="$RUN $ENDED $LOST $SILENT" told=$now
        echo "$(date +%H:%M:%S) running on $RUN of ${#HOSTS[@]} hosts${QUIET_HOSTS:+, no answer from$QUIET_HOSTS}: $NEWS" >&2
      fi
    fi
    nap "$POLL_SECONDS"
  done
}

# Ends the program if the exit codes of all hosts end the job; else sets WHY.
judge() {
  local code
  # shellcheck disable=SC2086  # one word a code
  code=$(verdict $CODES)
  [ -z "$STOPPED" ] || finish "$code" "the job $JOB was stopped by launch/tpu.sh stop (exit code $code)"
  case $code in
    0) finish 0 "the job $JOB is done" ;;
    2) finish 2 "error: the job $JOB has wrong input: $NEWS" ;;
    3) finish 3 "error: the job $JOB diverged: $NEWS" ;;
  esac
  WHY="it ended with exit code $code"
}

keep_alive() {
  local left tries=0
  UNTIL=$(($(date +%s) + HOURS * 3600))
  HAD_SLICE='' HAD_JOB='' FINISHED='' CHECKED=$NO_CHECK
  lock_keeper
  trap 'exit 130' INT TERM HUP
  while :; do
    left=$((UNTIL - $(date +%s)))
    if [ "$left" -le 0 ] || [ "$tries" -gt "$TRIES" ]; then
      look
      [ "$STATE" != ABSENT ] || { FINISHED=yes; broken "the budget of $HOURS hours and $TRIES tries is over ($WHY); no slice is left"; }
      finish 1 "error: the budget of $HOURS hours and $TRIES tries is over: $WHY"
    fi
    if bring_up "$left"; then watch_job; fi
    tries=$((tries + 1))
    echo "$(date +%H:%M:%S) $WHY; try $tries of $TRIES" >&2
    nap "$POLL_SECONDS"
  done
}

# One watcher a slice on this machine; `delete` ends it.
lock_keeper() {
  mkdir -p "$HOME/.insec_jax"
  name_keeper
  if keeper_lives; then
    fail "process $(cat "$KEEPER") on this machine watches $NAME already; look at it with status and logs"
  fi
  echo "$$" > "$KEEPER"
  trap farewell EXIT
}

# Whatever ends the watching, it must not go unseen that something is left which costs money.
farewell() {
  rm -rf "$INSEC_SCRATCH" "$KEEPER"
  [ -n "$FINISHED" ] || [ -z "$REQUESTED$HAD_SLICE" ] ||
    echo "not watched any more: slice and job go on and cost money; the same command watches again, delete ends them" >&2
}

name_keeper() {
  KEEPER=$HOME/.insec_jax/watch.$ZONE.$PROJECT.$NAME
}

keeper_lives() {
  [ -s "$KEEPER" ] && [ "$(cat "$KEEPER")" != "$$" ] && ps -p "$(cat "$KEEPER")" -o command= 2> /dev/null | grep -q 'tpu\.sh'
}
