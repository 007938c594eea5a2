#!/usr/bin/env bash
# Runs tests with the oldest versions that setup.py allows, in .venv-oldest: before a release, and before a run on a machine that brings its own torch.
# Arguments go to pytest; without any, the tests of the model and of training run, those of compiled blocks included.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv-oldest
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
# `name>=1.2,<2` becomes `name==1.2.*`.
sed -n '/install_requires/,/\]/s/^ *"\([A-Za-z-]*\)>=\([0-9.]*\).*/\1==\2.*/p' setup.py > "$venv/oldest.txt"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$venv/oldest.txt" pytest pytest-xdist hypothesis tokenizers pyarrow zstandard
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --editable .
[ "$#" -gt 0 ] || set -- tests/model tests/train -n 2
exec "$venv/bin/python" -m pytest "$@"
