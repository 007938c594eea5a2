#!/usr/bin/env bash
# Sets up .venv and runs every check: lint, types, import contracts, tests, two at a time. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup_environment.sh test
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/lint-imports
exec .venv/bin/python -m pytest -n 2 "$@"
