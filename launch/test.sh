#!/usr/bin/env bash
# The whole test suite on a bare machine: makes .venv, installs, runs pytest. Arguments go to pytest.
# shellcheck source=launch/setup.sh
EXTRAS="test" . "$(dirname "$0")/setup.sh"
exec .venv/bin/python -m pytest --numprocesses=auto --dist=loadfile "$@"
