#!/usr/bin/env bash
# launch.sh RECIPE [--engine single|ddp|zero1|zero2|zero3|fsdp2] [--gpus N] [key=value ...]
#
# Runs `routealign run RECIPE` under the chosen engine. The command that is run is printed first, its exit code is
# ours, and signals reach it directly (exec). PYTHON picks the interpreter, .venv/bin/python when there is one.
set -euo pipefail

usage() {
    echo "usage: launch.sh RECIPE [--engine single|ddp|zero1|zero2|zero3|fsdp2] [--gpus N] [key=value ...]"
}

fail() {
    echo "error: $1" >&2
    exit 2
}

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
    if [[ -x "$here/.venv/bin/python" ]]; then python="$here/.venv/bin/python"; else python="python3"; fi
fi

engine="single"
gpus=""
recipe=""
rest=()
while (($#)); do
    case "$1" in
        --engine | --gpus)
            (($# >= 2)) || fail "$1: found nothing after it, expected a value"
            if [[ "$1" == "--engine" ]]; then engine="$2"; else gpus="$2"; fi
            shift 2
            ;;
        --engine=*) engine="${1#*=}" && shift ;;
        --gpus=*) gpus="${1#*=}" && shift ;;
        -h | --help) usage && exit 0 ;;
        *)
            if [[ -z "$recipe" && "$1" != -* ]]; then recipe="$1"; else rest+=("$1"); fi
            shift
            ;;
    esac
done

[[ -n "$recipe" ]] || fail "no recipe given; $(usage)"
[[ -f "$recipe" ]] || fail "$recipe: no such file; the first argument is a recipe"

found=0
if command -v nvidia-smi >/dev/null 2>&1; then
    # Without a working driver nvidia-smi fails: that is a machine without GPUs.
    found="$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true)"
fi
if [[ -z "$gpus" ]]; then
    if ((found > 0)); then gpus="$found"; else gpus=1; fi
fi
[[ "$gpus" =~ ^[1-9][0-9]*$ ]] || fail "--gpus: found '$gpus', expected a whole number of at least 1"

case "$engine" in
    single)
        command=("$python" -m trainer run "$recipe")
        ;;
    ddp)
        if ((found > 0)); then
            # accelerate takes one process for "not multi".
            if ((gpus > 1)); then multi=(--multi_gpu); else multi=(); fi
            command=("$python" -m accelerate.commands.launch ${multi[@]+"${multi[@]}"} --num_processes "$gpus"
                --num_machines 1 --mixed_precision no --dynamo_backend no)
        else
            # `accelerate launch --cpu --num_processes N` starts one process and says nothing (accelerate 1.15).
            export ACCELERATE_USE_CPU=true
            cores="$(getconf _NPROCESSORS_ONLN)"
            export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > gpus ? cores / gpus : 1))}"
            command=("$python" -m torch.distributed.run --standalone --nproc_per_node "$gpus")
        fi
        command+=(-m trainer run "$recipe")
        ;;
    zero1 | zero2 | zero3 | fsdp2)
        fail "--engine $engine: comes with ds_configs/, which is not there yet; allowed now: single, ddp"
        ;;
    *)
        fail "--engine: found '$engine'; allowed: single, ddp, zero1, zero2, zero3, fsdp2"
        ;;
esac

command+=(${rest[@]+"${rest[@]}"})
printf '+'
printf ' %q' "${command[@]}"
printf '\n'
exec "${command[@]}"
