#!/usr/bin/env bash
# The main job on one machine. Makes .venv and installs on the first run; a run that was stopped continues where it was.
#   launch/local.sh                                   the toy experiment: a clean and an InSeC arm, compared
#   launch/local.sh CONFIG [--config.section.key=v]   trains CONFIG, evaluates it, writes the report
#   RUNS=DIR launch/local.sh                          where the workdirs go (default: runs)
# shellcheck source=launch/setup.sh
EXTRAS="test" . "$(dirname "$0")/setup.sh"
runs=${RUNS:-runs}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.venv/xla}

program() {
  echo "+ python -m insec_jax.$*" >&2
  .venv/bin/python -m "insec_jax.$1" "${@:2}"
}

# Trains and evaluates: CONFIG WORKDIR [overrides]; what was measured once is kept.
arm() {
  program train --config="$1" --workdir="$2" "${@:3}"
  if [ ! -e "$2/results.json" ]; then
    program evaluate --config="$1" --model="$2" --output="$2/results.json" "${@:3}" > "$2/table.part"
    mv "$2/table.part" "$2/table.txt"
  fi
}

if [ $# -eq 0 ]; then
  out=$runs/toy
  # Side by side: a model this small keeps one core busy, not two.
  echo "the clean arm trains meanwhile, see $out/clean.log" >&2
  mkdir -p "$out"
  (arm configs/toy.py:clean "$out/clean") 2> "$out/clean.log" &
  clean=$!
  trap 'kill $clean 2> /dev/null || true' EXIT
  arm configs/toy.py:insec "$out/insec"
  if ! wait $clean; then
    cat "$out/clean.log" >&2
    exit 1
  fi
  echo
  program report --workdirs="$out/clean,$out/insec" --output="$out/report.html"
else
  config=$1
  name=$(basename "${config%%:*}" .py)
  case $config in *:*) name=$name-${config#*:} ;; esac
  arm "$config" "$runs/$name" "${@:2}"
  cat "$runs/$name/table.txt"
  program report --workdirs="$runs/$name" --output="$runs/$name.html"
fi
