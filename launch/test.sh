#!/usr/bin/env bash
# Set-up, then the tests: bash launch/test.sh [--slow] [more arguments of pytest]
#   --slow   also the tests that train, sample and study for real
set -euo pipefail
cd "$(dirname "$0")/.."

bash launch/setup.sh --dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
if [ "${1:-}" = --slow ]; then
  shift
  exec .venv/bin/python -m pytest -m "" "$@"
fi
exec .venv/bin/python -m pytest "$@"
