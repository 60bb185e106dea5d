#!/usr/bin/env bash
# Set-up, then the tests: bash launch/test.sh [--slow | --all] [more arguments of pytest]
#   --slow   also the tests that train, sample and study for real
#   --all    also those for which CI has no time
set -euo pipefail
cd "$(dirname "$0")/.."

bash launch/setup.sh --dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
case "${1:-}" in
  --slow) shift; exec .venv/bin/python -m pytest -m "not longest" "$@" ;;
  --all) shift; exec .venv/bin/python -m pytest -m "" "$@" ;;
  *) exec .venv/bin/python -m pytest "$@" ;;
esac
