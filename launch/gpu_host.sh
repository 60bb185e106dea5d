#!/usr/bin/env bash
# Set-up for GPUs, then one program on all GPUs of this host, started again when it dies:
#
#   bash launch/gpu_host.sh [--dry_run] train --config=configs/red_lora.py:8b --workdir=runs/red
#
# The arguments are a program of robust_mo and its own; chat needs the terminal, which a program has not here.  A program
# that a signal kills (out of memory, a driver's fault) is started again, for ten starts in all, and goes on from its
# last checkpoint; one that ends by itself is not: 0 is done or saved on request (Ctrl-C, SIGTERM, a terminal that is
# closed), 2 is bad input.
set -euo pipefail
cd "$(dirname "$0")/.."

dry_run=
[ "${1:-}" != --dry_run ] || { dry_run=yes; shift; }
[ "${1:-}" != chat ] \
  || { echo "gpu_host.sh: chat needs the terminal: .venv/bin/python -m robust_mo.chat ${*:2}" >&2; exit 2; }
[ -f "robust_mo/${1:-}.py" ] \
  || { echo "gpu_host.sh: there is no program '${1:-}': give train, evaluate, sample, study, ..." >&2; exit 2; }
command=(.venv/bin/python -m "robust_mo.$1" "${@:2}")
if [ "$dry_run" ]; then printf '%s\n' "bash launch/setup.sh --gpu" "${command[*]}"; exit; fi

bash launch/setup.sh --gpu
asked='' program='' early=''
trap 'asked=yes; if [ "$program" ]; then kill -TERM "$program"; else early=yes; fi' TERM INT HUP
for start in $(seq 10); do
  setsid "${command[@]}" &  # Ctrl-C reaches it once, by the trap: a second signal would stop it unsaved
  program=$! status=0
  [ ! "$early" ] || kill -TERM "$program"
  wait "$program" || status=$?
  while kill -0 "$program" 2>/dev/null; do status=0; wait "$program" || status=$?; done  # it saves after a signal
  [ "$status" -gt 128 ] && [ ! "$asked" ] || exit "$status"
  echo "gpu_host.sh: the program died of signal $((status - 128)) (start $start of 10); the same command goes on" >&2
  program=''
  sleep 5
  [ ! "$asked" ] || exit "$status"
done
exit "$status"
