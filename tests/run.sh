#!/usr/bin/env bash
# Sets up .venv and runs every check: lint, types, import contracts, tests, four at a time for two cores, since many wait. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup_environment.sh test
.venv/bin/ruff check .
# mypy keeps one core busy while the other looks at imports, and compiles what the processes that tests start would each compile for themselves
# where Python is told to write no bytecode; the tests do not wait for it.
.venv/bin/mypy & types=$!
.venv/bin/lint-imports
.venv/bin/python -m compileall -qq -x checkpoint/released phase8 tests
code=0
.venv/bin/python -m pytest -n 4 "$@" || code=$?
wait "$types" || { echo "error: mypy has found what is listed above." >&2; code=1; }
exit "$code"
