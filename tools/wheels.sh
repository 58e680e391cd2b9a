#!/usr/bin/env bash
# The packages that an image with Python, torch and triton may lack, as wheels to carry along: tools/gpu.sh installs them.
# usage: bash tools/wheels.sh [python version, 3.12] [folder, wheels]
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:-3.12} folder=${2:-wheels}
pip=(python3 -m pip)
[ -x .venv/bin/python ] && pip=(.venv/bin/python -m pip)
mkdir -p "$folder"
"${pip[@]}" download -q --only-binary :all: --python-version "$version" --implementation cp \
    --platform manylinux_2_35_x86_64 --platform manylinux_2_34_x86_64 --platform manylinux_2_31_x86_64 \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any \
    -r tools/gpu_requirements.txt pip -d "$folder"
if ls "$folder" | grep -qiE '^(torch|triton|nvidia)'; then
    echo "tools/wheels.sh: a requirement brings torch along; take it out of tools/gpu_requirements.txt" >&2
    exit 1
fi
echo "$(ls "$folder" | wc -l) wheels for Python $version in $folder, $(du -sm "$folder" | cut -f1) MB"
