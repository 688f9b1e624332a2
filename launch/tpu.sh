#!/usr/bin/env bash
# The same command on every worker of a Cloud TPU VM slice, spot or not, through gcloud. Every command is shown first.
#   launch/tpu.sh create                                     queues the slice and waits until it is there
#   launch/tpu.sh run python -m insec_jax.train --config=... --workdir=/mnt/shared/run     sends the code, installs, runs
#   launch/tpu.sh delete                                     deletes the slice that create made, and nothing else
# The environment names the slice:
#   TPU=name ZONE=us-east5-a TYPE=v6e-16 VERSION=v2-alpha-tpuv6e [PROJECT=...] [SPOT=1] [RETRIES=10]
# The workdir must lie on a drive that all workers share (Filestore, or another NFS). A run that was preempted or lost a
# worker goes on by the same command, up to RETRIES times; when the slice itself is gone, create it and run again.
# Needs gcloud and a slice, and has not been run on one yet.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${TPU:?name of the slice}" "${ZONE:?its zone}"
where=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"} --quiet)

show() {
  echo "+ $*" >&2
  "$@"
}

on_all() {
  show gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --worker=all --command="$1"
}

create() {
  show gcloud compute tpus queued-resources create "$TPU" --node-id="$TPU" "${where[@]}" \
    --accelerator-type="${TYPE:?such as v6e-16}" --runtime-version="${VERSION:?such as v2-alpha-tpuv6e}" ${SPOT:+--spot}
  until state=$(gcloud compute tpus queued-resources describe "$TPU" "${where[@]}" --format='value(state.state)') &&
      [ "$state" = ACTIVE ]; do
    case $state in FAILED | SUSPENDED) echo "the slice is $state" >&2; exit 1 ;; esac
    echo "the slice is $state" >&2
    sleep 30
  done
}

# The code as git has it here, changes included, so that every worker runs the same; installs once per change of setup.
send() {
  archive=$(mktemp --suffix=.tar)
  trap 'rm -f "$archive"' EXIT
  { git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
      [ -e "$file" ] && printf '%s\0' "$file" || true; done; find .git -type f -print0; } | tar --null -T - -cf "$archive"
  show gcloud compute tpus tpu-vm scp "$archive" "$TPU":insec_jax.tar "${where[@]}" --worker=all
  # The images of some TPUs have Python 3.10 and no newer one.
  on_all 'mkdir -p insec_jax && tar -xf insec_jax.tar -C insec_jax && cd insec_jax &&
    { [ -x .venv/bin/python ] || { sudo apt-get -qq update && sudo apt-get -qq install -y python3.11-venv &&
      python3.11 -m venv .venv; }; } && EXTRAS="tpu gcs" bash launch/setup.sh'
}

run() {
  send
  command=$(printf '%q ' "$@")
  for try in $(seq "${RETRIES:-10}"); do
    code=0
    on_all "cd insec_jax && PATH=\$PWD/.venv/bin:\$PATH JAX_COMPILATION_CACHE_DIR=\$PWD/.venv/xla $command" || code=$?
    case $code in
      0 | 2 | 3) exit "$code" ;;  # done, wrong input, a loss that is not finite: no use in trying again
    esac
    echo "try $try ended with $code; again in 30 s" >&2
    sleep 30
  done
  exit "$code"
}

case ${1:-} in
  create) create ;;
  run) shift; run "$@" ;;
  delete) show gcloud compute tpus queued-resources delete "$TPU" "${where[@]}" --force ;;
  *) sed -n '2,10p' "$0" >&2; exit 2 ;;
esac
