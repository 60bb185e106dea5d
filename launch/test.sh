#!/usr/bin/env bash
# Set-up, then the tests: bash launch/test.sh [--slow] [more arguments of pytest]
#   --slow   also the tests that train, sample and study for real
set -euo pipefail
cd "$(dirname "$0")/.."

bash launch/setup.sh --dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
pytest=(.venv/bin/python -m pytest -n 2 --dist loadfile)  # two at a time: one leaves half of two cores idle
[ "${1:-}" = --slow ] || exec "${pytest[@]}" "$@"
shift
"${pytest[@]}" "$@" || [ $? -eq 5 ]  # 5: none of the tests asked for is a quick one
exec "${pytest[@]}" --no-loadscope-reorder -m slow "$@"
