# shellcheck shell=bash
# Sourced by tpu.sh, gpu.sh and slurm.sh on the laptop: what they print, the archive of the code, secrets, many hosts.
# Bash 3.2 and the tools of macOS are enough. A script that sources it defines
#   reach HOST COMMAND    runs the shell COMMAND on the host, with this stdin
# and sets HOSTS, the names of all hosts.
set -euo pipefail
# Set by options and by these programs only, never by the environment: sites of Slurm set SCRATCH, for example.
DRY_RUN='' DIRTY='' QUIET='' NOTES='' BATCH='' AT_ONCE=16 INSEC_SCRATCH=''
POLL_SECONDS=${INSEC_POLL_SECONDS:-30}       # between two looks
ANSWER_SECONDS=${INSEC_ANSWER_SECONDS:-120}  # for an answer of the cloud, or of a host to a short command
HOSTS=()
SECRETS=(HF_TOKEN WANDB_API_KEY)
SETTINGS=(HF_ENDPOINT WANDB_BASE_URL WANDB_ENTITY WANDB_MODE TRACKIO_SERVER_URL TRACKIO_SPACE_ID INSEC_RUN_TOKEN)

# Exit code 2: wrong input, or something is missing.
fail() {
  echo "error: $*" >&2
  exit 2
}

# Exit code 1: the machine, the network or the cloud.
broken() {
  echo "error: $*" >&2
  exit 1
}

# Ends unless the VALUE of the option is a whole number of at least LEAST.
check_number() {
  case $2 in '' | *[!0-9]* | 0?* | ??????????*) fail "$1=$2: give a whole number" ;; esac
  [ "$2" -ge "$3" ] || fail "$1=$2: give at least $3"
}

# The words as a shell reads them.
quoted() {
  local word text='' quote="'" escaped="'\\''"
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) text="$text '${word//$quote/$escaped}'" ;;
      *) text="$text $word" ;;
    esac
  done
  printf '%s' "${text# }"
}

# Prints the command and runs it; with DRY_RUN prints it only.
show() {
  printf '+ %s\n' "$(quoted "$@")" >&2
  [ -n "$DRY_RUN" ] || "$@"
}

# A folder for files of this program that only its user may read.
scratch() {
  [ -z "$INSEC_SCRATCH" ] || return 0
  INSEC_SCRATCH=$(umask 077 && mktemp -d "${TMPDIR:-/tmp}/insec.XXXXXX")
  trap 'rm -rf "$INSEC_SCRATCH"' EXIT
}

# Sleeps; a signal to this program is handled at once.
nap() {
  sleep "$1" &
  wait "$!"
}

# Runs the command, with this stdin, and kills it after so many seconds. In a process group of its own: gcloud starts ssh.
# It cannot ask at the terminal then, which would stop it for ever: `reach` reads BATCH.
within() {
  # shellcheck disable=SC2034
  local seconds=$1 process watch status=0 BATCH=yes
  shift
  set -m
  "$@" <&0 &
  process=$!
  (
    sleep "$seconds"
    kill -- "-$process"
    kill -CONT -- "-$process"  # a stopped process handles no other signal
    sleep 5
    kill -KILL -- "-$process"
  ) > /dev/null 2>&1 3>&- &
  watch=$!
  disown "$watch"
  set +m
  wait "$process" 2> /dev/null || status=$?
  # By SIGKILL: on SIGTERM a shell that has only been forked yet runs the EXIT trap of this one, which deletes INSEC_SCRATCH.
  kill -KILL -- "-$watch" 2> /dev/null || true
  return "$status"
}

# Sets COMMIT, the name of the code that `pack` packs: HEAD, or with DIRTY=1 HEAD-dirty-TREE if something was changed.
name_code() {
  local changed index
  COMMIT=$(git rev-parse --short=12 HEAD 2> /dev/null) || fail "$PWD is no git checkout; clone the repository with git"
  TREE=HEAD
  changed=$(git status --porcelain)
  [ -n "$changed" ] || return 0
  [ -n "$DIRTY" ] || fail "$(printf '%s\n' "$changed" | wc -l | tr -d ' ') files are not committed, such as" \
    "$(printf '%s\n' "$changed" | head -1 | cut -c4-); commit them, or give --dirty to send them as they are"
  scratch
  index=$INSEC_SCRATCH/index
  cp "$(git rev-parse --git-path index)" "$index"
  GIT_INDEX_FILE=$index git add --all
  TREE=$(GIT_INDEX_FILE=$index git write-tree)
  COMMIT=$COMMIT-dirty-$(printf '%s' "$TREE" | cut -c1-12)
}

# Writes FILE, a tar.gz of the code that `name_code` has named. It has the git data of the one commit, so that a run
# records the commit and what was changed since; ignored files are not in it.
pack() {
  local file=$1 copy
  scratch
  copy=$INSEC_SCRATCH/code
  rm -rf "$copy"
  git init --quiet "$copy"
  git -C "$copy" fetch --quiet --depth 1 "$PWD" HEAD
  git -C "$copy" -c advice.detachedHead=false checkout --quiet FETCH_HEAD
  if [ "$TREE" != HEAD ]; then
    git -C "$copy" rm -r --quiet . > /dev/null
    git -C "$copy" reset --quiet
    git archive "$TREE" | tar -xf - -C "$copy"
  fi
  # These name this machine and its user.
  rm -rf "$copy/.git/FETCH_HEAD" "$copy/.git/logs" "$copy/.git/hooks"
  printf '.venv\n' > "$copy/.git/info/exclude"
  COPYFILE_DISABLE=1 tar -czf "$file" -C "$copy" .
  rm -rf "$copy"
}

# Writes FILE with NAME=VALUE of the secrets and settings that are set here, each ended by a zero byte, and END: `host.sh
# start` reads it on stdin. NAMES are further ones, which must be set.
environment_file() {
  local file=$1 name
  shift
  (umask 077 && : > "$file")
  for name; do
    case $name in
      '' | [0-9]* | *[!A-Za-z0-9_]*) fail "--secret takes the name of an environment variable, not its value; export it, and give its name" ;;
    esac
    [ -n "${!name:-}" ] || fail "--secret $name: this variable is not set here; export it first"
  done
  for name in "${SECRETS[@]}" "${SETTINGS[@]}" "$@"; do
    [ -z "${!name:-}" ] || printf '%s=%s\0' "$name" "${!name}" >> "$file"
  done
  printf 'END\0' >> "$file"
}

# Runs FUNCTION HOST [ARGUMENT...] for all hosts, AT_ONCE at a time, with the host's name before each line; with QUIET
# stdout is not shown, with NOTES=FILE the other lines go there. Sets FAILED, the hosts where it failed, WORST, the
# largest exit code, and ANSWERS, a folder with a file of stdout for each host.
each() {
  local function=$1 host number=0 processes=() width=0
  shift
  scratch
  ANSWERS=$INSEC_SCRATCH/answers
  rm -rf "$ANSWERS"
  mkdir "$ANSWERS"
  FAILED=() WORST=0
  for host in "${HOSTS[@]}"; do
    [ "${#host}" -le "$width" ] || width=${#host}
  done
  for host in "${HOSTS[@]}"; do
    [ "$number" -lt "$AT_ONCE" ] || collect $((number - AT_ONCE))
    (
      set -o pipefail
      [ -z "$NOTES" ] || exec 2>> "$NOTES"
      { "$function" "$host" "$@" 2>&3 3>&- | tee "$ANSWERS/${host//\//_}" | shown; } 3>&1 | label "$host" "$width"
    ) &
    processes[number]=$!
    number=$((number + 1))
  done
  [ "$number" -le "$AT_ONCE" ] || number=$AT_ONCE
  for ((number = ${#HOSTS[@]} - number; number < ${#HOSTS[@]}; number++)); do collect "$number"; done
  [ "$WORST" -eq 0 ]
}

# Passes stdin on, unless QUIET is set.
shown() {
  if [ -n "$QUIET" ]; then cat > /dev/null; else cat; fi
}

# Waits for one process of `each`, whose variables these are.
collect() {
  local code=0
  wait "${processes[$1]}" || code=$?
  [ "$code" -eq 0 ] || FAILED[${#FAILED[@]}]=${HOSTS[$1]}
  [ "$code" -le "$WORST" ] || WORST=$code
}

# Writes each line of stdin to stderr, after a name.
label() {
  local line
  while IFS= read -r line || [ -n "$line" ]; do
    printf "%-$2s  %s\n" "$1" "$line" >&2
  done
}

# The answer of a host in the last `each`.
answer() {
  cat "$ANSWERS/${1//\//_}" 2> /dev/null || true
}

# Runs FUNCTION HOST [ARGUMENT...] up to three times: a connection may break half-way, and each step can be repeated.
# Exit code 2, of `fail` on the host, is final.
persist() {
  local try code=1
  for try in 1 2 3; do
    code=0
    "$@" || code=$?
    case $code in 0 | 2) break ;; esac
    [ "$try" -eq 3 ] || { echo "no success (exit code $code); again" >&2; nap "$POLL_SECONDS"; }
  done
  return "$code"
}

# Sends host.sh to the host; prints yes if the host has the code of COMMIT.
greet() {
  local script
  script=$(dirname "${BASH_SOURCE[0]}")/host.sh
  within "$ANSWER_SECONDS" reach "$1" "mkdir -p ~/insec_jax && cd ~/insec_jax && cat > host.sh.$$ &&
    [ \$(wc -c < host.sh.$$) -eq $(wc -c < "$script") ] && mv host.sh.$$ host.sh && bash host.sh has $COMMIT" < "$script"
}

# Sends the archive to the host.
send_code() {
  reach "$1" "bash ~/insec_jax/host.sh unpack $COMMIT" < "$2"
}

# Makes the environment on the host, with these extras.
set_up() {
  local host=$1
  shift
  reach "$host" "bash ~/insec_jax/host.sh setup $COMMIT $(quoted "$@")" < /dev/null
}

# Sends host.sh, the code unless the host has it, and makes the environment with these extras.
provide() {
  local host=$1 archive=$2 answer
  shift 2
  answer=$(persist greet "$host") || return
  [ "$answer" = yes ] || persist send_code "$host" "$archive" || return
  persist set_up "$host" "$@"
}

# Brings the code and the environment with these extras to all hosts. Returns 1 if one is not ready: FAILED.
provide_all() {
  scratch
  [ -f "$INSEC_SCRATCH/code.tar.gz" ] || pack "$INSEC_SCRATCH/code.tar.gz"
  each provide "$INSEC_SCRATCH/code.tar.gz" "$@"
}

# Starts the job on one host; the environment comes from a file. The words of the command follow.
start_on() {
  local host=$1 job=$2 environment=$3
  shift 3
  within "$ANSWER_SECONDS" reach "$host" "bash ~/insec_jax/host.sh start $job $COMMIT $(quoted "$@")" < "$environment"
}

# The same, repeated when the connection breaks.
start_surely() {
  persist start_on "$@"
}

# One line of JSON on the job of a host.
status_on() {
  within "$ANSWER_SECONDS" reach "$1" \
    "[ ! -f ~/insec_jax/host.sh ] && echo '{\"state\": \"absent\"}' || bash ~/insec_jax/host.sh status $2" < /dev/null
}

# Prints the log of the job of a host until the job ends; takes it up where it was when the connection breaks. gcloud
# connects again by itself and starts the same command once more: the lines have numbers, and none is shown twice.
follow_on() {
  local host=$1 job=$2 state seen=$INSEC_SCRATCH/seen.${1//\//_}
  echo 0 > "$seen"
  while :; do
    reach "$host" "bash ~/insec_jax/host.sh number $job $(($(cat "$seen") + 1))" < /dev/null | unseen "$seen" || true
    state=$(field state "$(status_on "$host" "$job" 2> /dev/null)") || state=''
    case $state in
      ended | lost | absent) return 0 ;;
      '') echo "no answer; trying again" >&2 ;;
      *) echo "the connection broke; going on at line $(($(cat "$seen") + 1))" >&2 ;;
    esac
    nap "$POLL_SECONDS"
  done
}

# Prints the lines of stdin that were not printed before, without their numbers, which begin after that in the file; then
# writes the number of the last one there. A loop of the shell: awk may wait for more lines before it prints one.
unseen() {
  local line first last=0
  first=$(cat "$1")
  while IFS= read -r line; do
    if [ "${line%%:*}" -gt "$last" ] 2> /dev/null; then
      last=${line%%:*}
      printf '%s\n' "${line#*:}"
    fi
  done
  echo $((first + last)) > "$1"
}

# The value of a key in a line of JSON from `host.sh status`; empty for null. Only for keys before the free texts.
field() {
  printf '%s\n' "$2" | sed -n "s/^.*\"$1\": \"\{0,1\}\([^\",}]*\).*$/\1/p" | sed 's/^null$//'
}
