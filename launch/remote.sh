# shellcheck shell=bash
# Sourced by tpu.sh, gpu.sh and slurm.sh on the laptop: what they print, the archive of the code, secrets, many hosts.
# Bash 3.2 and the tools of macOS are enough. A script that sources it defines
#   reach HOST COMMAND    runs the shell COMMAND on the host, with this stdin
# and sets HOSTS, the names of all hosts.
set -euo pipefail
DRY_RUN=${DRY_RUN:-}
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

# The words as a shell reads them.
quoted() {
  local word text=
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) text="$text $(printf '%q' "$word")" ;;
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
  [ -z "${SCRATCH:-}" ] || return 0
  SCRATCH=$(umask 077 && mktemp -d "${TMPDIR:-/tmp}/insec.XXXXXX")
  trap 'rm -rf "$SCRATCH"' EXIT
}

# Sets COMMIT, the name of the code that `pack` packs: HEAD, or with DIRTY=1 HEAD-dirty-TREE if something was changed.
name_code() {
  local changed index
  COMMIT=$(git rev-parse --short=12 HEAD 2> /dev/null) || fail "$PWD is no git checkout; clone the repository with git"
  TREE=HEAD
  changed=$(git status --porcelain)
  [ -n "$changed" ] || return 0
  [ -n "${DIRTY:-}" ] || fail "$(printf '%s\n' "$changed" | wc -l | tr -d ' ') files are not committed, such as" \
    "$(printf '%s\n' "$changed" | head -1 | cut -c4-); commit them, or give --dirty to send them as they are"
  scratch
  index=$SCRATCH/index
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
  copy=$SCRATCH/code
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

# Writes FILE with NAME=VALUE of the secrets and settings that are set here, each ended by a zero byte: `host.sh start`
# reads it on stdin. NAMES are further ones, which must be set.
environment_file() {
  local file=$1 name
  shift
  (umask 077 && : > "$file")
  for name; do
    case $name in
      '' | [0-9]* | *[!A-Za-z0-9_]*) fail "--secret $name: it takes the name of an environment variable, not its value" ;;
    esac
    [ -n "${!name:-}" ] || fail "--secret $name: this variable is not set here; export it first"
  done
  for name in "${SECRETS[@]}" "${SETTINGS[@]}" "$@"; do
    [ -z "${!name:-}" ] || printf '%s=%s\0' "$name" "${!name}" >> "$file"
  done
}

# Runs FUNCTION HOST [ARGUMENT...] for all hosts at once, with the host's name before each line; sets FAILED, the hosts
# where it failed, and ANSWERS, a folder with a file of stdout for each host.
each() {
  local function=$1 host index=0 processes=() width=0
  shift
  scratch
  ANSWERS=$SCRATCH/answers
  rm -rf "$ANSWERS"
  mkdir "$ANSWERS"
  FAILED=()
  for host in "${HOSTS[@]}"; do
    [ "${#host}" -le "$width" ] || width=${#host}
  done
  for host in "${HOSTS[@]}"; do
    (
      set -o pipefail
      { "$function" "$host" "$@" 2>&3 3>&- | tee "$ANSWERS/${host//\//_}"; } 3>&1 | label "$host" "$width"
    ) &
    processes[index]=$!
    index=$((index + 1))
  done
  index=0
  for host in "${HOSTS[@]}"; do
    wait "${processes[index]}" || FAILED[${#FAILED[@]}]=$host
    index=$((index + 1))
  done
  [ "${#FAILED[@]}" -eq 0 ]
}

# Writes each line of stdin to stderr, after a name.
label() {
  local line
  while IFS= read -r line || [ -n "$line" ]; do
    printf "%-$2s  %s\n" "$1" "$line" >&2
  done
}

# Sends host.sh to the host; prints yes if the host has the code of COMMIT.
greet() {
  # shellcheck disable=SC2088  # the host expands ~
  reach "$1" "mkdir -p ~/insec_jax && cat > ~/insec_jax/host.sh.$$ && mv ~/insec_jax/host.sh.$$ ~/insec_jax/host.sh &&
    bash ~/insec_jax/host.sh has $COMMIT" < "$(dirname "${BASH_SOURCE[0]}")/host.sh"
}

# Sends the archive to the host unless it has the code; then makes the environment there.
provide() {
  local host=$1 archive=$2
  shift 2
  if [ "$(cat "$GREETED/${host//\//_}" 2> /dev/null)" != yes ]; then
    reach "$host" "bash ~/insec_jax/host.sh unpack $COMMIT" < "$archive" || return
  fi
  reach "$host" "bash ~/insec_jax/host.sh setup $COMMIT $(quoted "$@")" < /dev/null
}

# Brings the code and the environment with these extras to all hosts.
provide_all() {
  local archive
  scratch
  each greet || broken "no answer from ${FAILED[*]}; look at the messages above"
  GREETED=$SCRATCH/greeted
  rm -rf "$GREETED"
  mv "$ANSWERS" "$GREETED"
  archive=$SCRATCH/code.tar.gz
  [ -f "$archive" ] || pack "$archive"
  each provide "$archive" "$@" || broken "the environment is not ready on ${FAILED[*]}; look at the messages above"
}

# Starts the job on one host; the environment comes from a file.
start_on() {
  local host=$1 job=$2 environment=$3
  shift 3
  reach "$host" "bash ~/insec_jax/host.sh start $job $COMMIT $(quoted "$@")" < "$environment"
}

# The value of a key in a line of JSON from `host.sh status`; empty for null. Only for keys before the free texts.
field() {
  printf '%s\n' "$2" | sed -n "s/^.*\"$1\": \"\{0,1\}\([^\",}]*\).*$/\1/p" | sed 's/^null$//'
}
