#!/usr/bin/env bash
# Makes or updates .venv beside this repository: bash launch/setup.sh [--dev] [--gpu] [--tpu]
#   --dev   also what the tests need (pytest, torch, peft, ruff, ..., and the TPU's compiler for the preflight)
#   --gpu   jax with CUDA 13        --tpu   jax with libtpu
# What .venv was once given it keeps up to date.  A second run with nothing new to install takes a second.
# PYTHON=python3.12 chooses another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

# A plugin of another version than jax would be left unused.
for option in --dev --gpu --tpu; do
  [ ! -e ".venv/installed$option" ] || [[ " $* " == *" $option "* ]] || set -- "$@" "$option"
done

requirements=(-r requirements.txt)
for option in "$@"; do
  case "$option" in
    --dev) requirements+=(-r requirements-dev.txt) ;;
    --gpu) requirements+=("jax[cuda13]") ;;
    --tpu) requirements+=("jax[tpu]") ;;
    *) echo "setup.sh: unknown option $option; it takes --dev, --gpu, --tpu" >&2; exit 2 ;;
  esac
done
# Where there is a TPU, jax[tpu] brings its compiler, and the two do not go together.
[[ " $* " != *" --dev "* || " $* " == *" --tpu "* ]] || requirements+=(-r requirements-preflight.txt)

python="${PYTHON:-python3}"
[ ! -x .venv/bin/python ] || python=.venv/bin/python
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || { echo "setup.sh: $python is $("$python" -V), robust_mo needs Python 3.11 or newer: remove .venv, if it is there, and set PYTHON, as in PYTHON=python3.12 bash launch/setup.sh" >&2; exit 2; }
[ -x .venv/bin/python ] || "$python" -m venv .venv

# What was installed last, so that a second run need not ask pip.
wanted="$(cat requirements.txt requirements-dev.txt requirements-preflight.txt pyproject.toml; pwd; .venv/bin/python -V)"
for option in "$@"; do
  stamp=".venv/installed${option}"
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] || stale=yes
done
[ "$#" -gt 0 ] || [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ] || stale=yes
if [ "${stale:-no}" = yes ]; then
  .venv/bin/python -m pip --version > /dev/null 2>&1 \
    || { echo "setup.sh: .venv has no pip, as where python3-venv is missing or it was broken off: remove .venv and start again" >&2; exit 2; }
  echo "installing into .venv (some minutes the first time) ..."
  # What is imported is compiled then; compiling all of it now would take half a minute.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile "${requirements[@]}" --editable .
  printf '%s' "$wanted" > .venv/installed
  for option in "$@"; do printf '%s' "$wanted" > ".venv/installed${option}"; done
fi
echo "ready: source .venv/bin/activate"
