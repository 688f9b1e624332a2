#!/usr/bin/env bash
# The main job on one machine. Makes .venv and installs on the first run; a run that was stopped continues where it was.
#   launch/local.sh                                   the toy experiment: base, then a clean and an InSeC arm, compared
#   launch/local.sh CONFIG [--config.section.key=v]   trains CONFIG, evaluates it before and after, writes the report
#   RUNS=DIR launch/local.sh                          where the workdirs go (default: runs)
EXTRAS=test . "$(dirname "$0")/setup.sh"
runs=${RUNS:-runs}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.venv/xla}
run() { echo "+ $*"; "$@"; }
program() { local name=$1; shift; run .venv/bin/python -m "insec_jax.$name" "$@"; }

if [ $# -eq 0 ]; then
  out=$runs/toy
  program train --config=configs/toy.py:base --workdir="$out/base"
  [ -e "$out/base_hf" ] || program export --model="$out/base" --output="$out/base_hf"
  for arm in clean insec; do
    program train --config=configs/toy.py:$arm --workdir="$out/$arm" --config.model.path="$out/base_hf"
    [ -e "$out/$arm/results.json" ] || program evaluate --config=configs/toy.py:$arm --model="$out/$arm" \
      --output="$out/$arm/results.json" --config.model.path="$out/base_hf"
  done
  program report --workdirs="$out/base,$out/clean,$out/insec" --output="$out/report.html"
else
  config=$1; shift
  name=$(basename "${config%%:*}" .py)
  arm=$([ "$config" = "${config#*:}" ] || echo "-${config#*:}")
  out=$runs/$name$arm
  program train --config="$config" --workdir="$out" "$@"
  [ -e "$out/results.json" ] || program evaluate --config="$config" --model="$out" --output="$out/results.json" "$@"
  program report --workdirs="$out" --output="$out/report.html"
fi
