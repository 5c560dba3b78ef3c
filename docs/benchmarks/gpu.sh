#!/usr/bin/env bash
# Test and measure kdlosses on one GPU, in less than ten minutes and without a network:
#
#     docs/benchmarks/gpu.sh --output DIR [--wheels DIR] [--device cuda] [--small]
#
# --wheels  folder whose wheels are all installed for this command only, into DIR/site. Packages of
#           the machine, such as torch and triton, are used where the folder has none.
# --small   tiny sizes, which prove the command on a CPU: gpu.sh --device cpu --small --output DIR
#
# Writes gpu.json and gpu.md into the output folder. docs/benchmarks/README.md says how to collect
# the wheels. Exit codes: 0 done, 1 a stage failed, 2 wrong input.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python}
output= wheels= rest=()

refuse() {
    echo "gpu.sh: $1" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
        --output | --wheels | --device)
            [ $# -ge 2 ] || refuse "$1 needs a value"
            case $1 in
                --output) output=$2 ;;
                --wheels) wheels=$2 ;;
                --device) rest+=(--device "$2") ;;
            esac
            shift 2
            ;;
        --small)
            rest+=(--small)
            shift
            ;;
        *) refuse "unknown option $1; known are --output, --wheels, --device and --small" ;;
    esac
done
[ -n "$output" ] || refuse "--output DIR is needed"
mkdir -p "$output" || refuse "--output $output: cannot be created"
output=$(cd "$output" && pwd)
path=$root

if [ -n "$wheels" ]; then
    [ -d "$wheels" ] || refuse "--wheels $wheels: not a folder"
    files=("$wheels"/*.whl)
    [ -e "${files[0]}" ] || refuse "--wheels $wheels: contains no wheels"
    # Without dependencies: what the folder lacks is the machine's, and torch is never replaced.
    "$python" -m pip install --quiet --no-index --no-deps --upgrade \
        --target "$output/site" "${files[@]}" || refuse "--wheels $wheels: cannot be installed"
    path=$root:$output/site
fi

export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
exec "$python" "$root/docs/benchmarks/gpu.py" --output "$output" ${rest[@]+"${rest[@]}"}
