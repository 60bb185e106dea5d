#!/usr/bin/env bash
# Set-up, then the tests: bash launch/test.sh [--slow | --all] [more arguments of pytest]
#   --slow   also the tests that train, sample and study for real
#   --all    also those for which CI has no time
set -euo pipefail
cd "$(dirname "$0")/.."

bash launch/setup.sh --dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
pytest=(.venv/bin/python -m pytest)
quick=("${pytest[@]}" -n 2 --dist loadfile)  # two at a time: one leaves half of two cores idle
case "${1:-}" in
  --slow) slow="slow and not longest"; shift ;;
  --all) slow="slow or longest"; shift ;;
  *) exec "${quick[@]}" "$@" ;;
esac
"${quick[@]}" "$@" || [ $? -eq 5 ]  # 5: none of the tests asked for is a quick one
exec "${pytest[@]}" -m "$slow" "$@"
