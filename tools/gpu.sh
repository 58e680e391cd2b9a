#!/usr/bin/env bash
# Half an hour of one GPU: its tests, the benchmarks, then the sweep, within the minutes given (docs/gpu.md).
# usage: bash tools/gpu.sh [minutes, 30] [--books FILE.parquet] [--out FOLDER] [--rehearse]
# Runs on an image's Python with torch; what it lacks is installed from wheels/ (tools/wheels.sh), without a network.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
if [ -d wheels ]; then
    venv=$PWD/.venv-gpu
    if [ ! -e "$venv/made" ]; then # on top of the image's Python, which may be a venv itself, or lack pip and ensurepip
        "$python" -m venv --clear --without-pip "$venv"
        place=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        "$python" -c 'import sys; print(*(f"import site; site.addsitedir({p!r})" for p in sys.path if p.endswith("-packages")), sep="\n")' > "$place/image.pth"
        pip=(wheels/pip-*.whl)
        "$venv/bin/python" "${pip[0]}/pip" install -q --no-index --find-links wheels -r tools/gpu_requirements.txt
        touch "$venv/made"
    fi
    python=$venv/bin/python
elif [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then
    python=$PWD/.venv/bin/python
fi
exec "$python" tools/gpu.py "$@"
