#!/usr/bin/env bash
# Half an hour of one GPU: its tests, the benchmarks, then the sweep, within the minutes given (docs/gpu.md).
# usage: bash tools/gpu.sh [minutes, 30] [--books FILE.parquet] [--out FOLDER] [--rehearse]
# Runs on an image's Python with torch; what it lacks is installed from wheels/ (tools/wheels.sh), without a network.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
if [ -d wheels ]; then
    [ -x .venv-gpu/bin/python ] || "$python" -m venv --system-site-packages .venv-gpu
    python=$PWD/.venv-gpu/bin/python
    "$python" -m pip install -q --no-index --find-links wheels -r tools/gpu_requirements.txt
elif [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then
    python=$PWD/.venv/bin/python
fi
exec "$python" tools/gpu.py "$@"
