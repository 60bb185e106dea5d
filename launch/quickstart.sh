#!/usr/bin/env bash
# Set-up, then the whole experiment on SmolLM2-135M: bash launch/quickstart.sh [--workdir=DIR] [more flags of study]
set -euo pipefail
cd "$(dirname "$0")/.."

workdir=--workdir=runs/quickstart
for option in "$@"; do case "$option" in --workdir=*) workdir= ;; esac; done
bash launch/setup.sh
exec .venv/bin/python -m robust_mo.study --config=configs/quickstart.py ${workdir:+"$workdir"} "$@"
