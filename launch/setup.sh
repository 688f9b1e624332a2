# shellcheck shell=bash
# Sourced by the other scripts: makes .venv on a bare machine (python3 with venv is all it needs) and installs the package.
#   EXTRAS=test . launch/setup.sh
# A second run finds the stamp and returns at once; a change of setup.py or of the constraints installs again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv/bin/python ]; then
  echo "+ python3 -m venv .venv"
  python3 -m venv .venv
fi
minor=$(.venv/bin/python -c 'import sys; print("%d%d" % sys.version_info[:2])')
constraints=launch/constraints-py$minor.txt
if [ ! -f "$constraints" ]; then
  echo "note: Python $minor has no tested set ($constraints); installing the newest versions that setup.py allows"
  constraints=/dev/null
fi
for extra in ${EXTRAS:-test}; do
  stamp=.venv/installed-$extra-$(cat setup.py "$constraints" | cksum | cut -d' ' -f1)
  if [ ! -f "$stamp" ]; then
    echo "+ pip install -e .[$extra] -c $constraints   (about a minute, once)"
    .venv/bin/pip install --quiet --disable-pip-version-check --progress-bar=on -e ".[$extra]" -c "$constraints" 2> .venv/install.log \
      || { cat .venv/install.log >&2; exit 1; }
    touch "$stamp"
  fi
done
