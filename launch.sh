#!/usr/bin/env bash
# launch.sh RECIPE [--engine single|ddp|zero1|zero2|zero3|zero3-offload|fsdp2] [--gpus N]
#           [--nodes N --rank R --master HOST[:PORT]] [--config_file FILE] [key=value ...] [--force] [--dry-run]
#
# Runs `routealign run RECIPE` under the chosen engine (docs/cluster.md). Prints the line it runs. Everything else is in
# trainer/cli/launch.py, which takes this process over (exec): signals reach it, its exit code is ours.
# PYTHON picks the interpreter, .venv/bin/python when there is one.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
    if [[ -x "$here/.venv/bin/python" ]]; then python="$here/.venv/bin/python"; else python="python3"; fi
fi
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m trainer.cli.launch "$@"
