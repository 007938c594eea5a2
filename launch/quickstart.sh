#!/usr/bin/env bash
# Sets up .venv and pretrains a small Phase 8 model on Python's standard library; arguments go to launch/pretrain.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup_environment.sh
exec .venv/bin/python launch/pretrain.py --config configs/quickstart.yaml "$@"
