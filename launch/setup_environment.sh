#!/usr/bin/env bash
# Makes the project's own environment in .venv, once; does nothing when it is up to date. Called by quickstart.sh and tests/run.sh.
# Usage: setup_environment.sh [EXTRA], for example `setup_environment.sh test`.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
extra="${1:-}"
venv="$root/.venv"
package="$root${extra:+[$extra]}"

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or newer was found on the PATH; install one and run this again." >&2
    exit 2
}

# What the environment was made from: any change to it makes it anew.
stamp="$venv/.made-from-${extra:-base}"
wanted="$(cat "$root/setup.py" "$root/tests/harness_requirements.txt" "${BASH_SOURCE[0]}" | cksum)"
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$venv"  # an earlier attempt may have been interrupted
    python="$(find_python)"
    echo "setting up $venv with $("$python" --version) (once; downloads torch, a few minutes)"
    "$python" -m venv "$venv" || { echo "error: 'python -m venv' failed; install your system's venv package (python3-venv)." >&2; exit 2; }
fi
install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile)
"${install[@]}" "torch==2.13.0" --editable "$package"
if [ "$extra" = test ]; then
    "${install[@]}" --no-deps --requirement "$root/tests/harness_requirements.txt"
fi
# pip compiles on one core. What does not compile is not imported either: templates and files for other versions of Python.
"$venv/bin/python" -m compileall -qq -j 0 "$venv"/lib/python3*/site-packages || true
echo "$wanted" > "$stamp"
