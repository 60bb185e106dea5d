#!/usr/bin/env bash
# One program on a Cloud TPU slice, made if need be and made again when it is preempted:
#
#   bash launch/tpu_pod.sh --name=mo --zone=us-east5-b --type=v5litepod-16 [--spot] [--version=v2-alpha-tpuv5-lite] \
#     [--cache=/mnt/FILESTORE/cache] [--dry_run] -- train --config=configs/red_lora.py:8b --workdir=gs://BUCKET/red
#
# Needs gcloud, logged in.  Copies this checkout's last commit to every worker, sets it up there, starts the same
# command on all of them (one alone would wait for the rest) and shows what they print.  What follows -- is a
# program of robust_mo and its arguments; --workdir must be a bucket or a folder that all workers see, such as a mounted
# Filestore, and --output such a folder: there the command goes on after a preemption.  Each worker starts it again, for
# ten starts in all, where it dies of a signal or is told to stop.  The slice is kept at the end: gcloud compute tpus
# tpu-vm delete NAME --zone=ZONE.  The workers meet at a port of the first, opened between them by the network's
# firewall: jax's own is 8482 since 0.8.1 (8476 before); JAX_COORDINATOR_PORT=8476 before this command takes another.
# Where it is set here, the workers get HF_TOKEN, which gated models want.  --cache is a folder of theirs for models and
# a teacher's answers; in one that all of them see these outlive a preemption.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "tpu_pod.sh: $1" >&2; exit 2; }
say() { echo "tpu_pod.sh: $*" >&2; }

name='' zone='' type='' cache='' version=tpu-ubuntu2204-base spot=() dry_run='' port=${JAX_COORDINATOR_PORT:-8482}
while [ $# -gt 0 ]; do
  case "$1" in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --cache=*) cache=${1#*=} ;;
    --spot) spot=(--spot) ;;
    --dry_run) dry_run=yes ;;
    --) shift; break ;;
    *) fail "unknown argument $1: see the top of the script, and put the program after --" ;;
  esac
  shift
done
for needed in name zone type; do [ "${!needed}" ] || fail "--$needed must be given"; done
case "${1:-}" in
  train | evaluate | sample) ;;
  *) fail "after -- comes '${1:-}': give train, evaluate or sample, which run on several hosts" ;;
esac
where='' extras=''
for argument in "${@:2}"; do
  case "$argument" in
    --workdir=gs://*) where=yes ;;
    --workdir=/* | --output=/*) where=yes ;;
    --workdir | --output) fail "write $argument=..." ;;
    --workdir=* | --output=*) fail "$argument is no path of all workers: give one that begins with /, or gs://BUCKET/... for a run" ;;
  esac
  [[ "$argument" != *gs://* ]] || extras='; .venv/bin/python -m pip install --quiet gcsfs==2026.10.1'
done
[ "$where" ] || fail "there is no --workdir (of sample --output) after --: give one that all workers see"
[[ "$port" =~ ^[0-9]+$ ]] || fail "JAX_COORDINATOR_PORT is '$port': give the number of a port"

tpu() { run gcloud compute tpus tpu-vm "$1" "$name" --zone="$zone" "${@:2}"; }
run() { if [ "$dry_run" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
state() {  # nothing where there is no such slice
  gcloud compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(state)' 2>"$errors" && return
  grep -q NOT_FOUND "$errors" || { cat "$errors" >&2; fail "gcloud does not say how the slice $name is, see above"; }
}
# The archive unpacks over an earlier copy; the workers' own .venv stays.  Ubuntu 22.04's own Python is 3.10.
setup="set -e; mkdir -p robust_mo; tar -xzf robust_mo.tgz -C robust_mo; rm robust_mo.tgz; cd robust_mo; chmod 600 workers.env
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  command -v python3.11 >/dev/null || {
    # A new machine's own upgrades may hold the lock.
    sudo apt-get -o DPkg::Lock::Timeout=600 update -qq
    sudo apt-get -o DPkg::Lock::Timeout=600 install -yqq python3.11 python3.11-venv
  }
  export PYTHON=python3.11
fi
bash launch/setup.sh --tpu$extras"
# Above 128: a signal, also jax's end where another worker died; 75: told to stop, as by SIGTERM before maintenance.
# What a broken connection left running goes on unheard, and holds the lock.
program="cd robust_mo; . ./workers.env; export JAX_COORDINATOR_PORT=$port ROBUST_MO_STOPPED_STATUS=75; exec 9>.lock
flock -n 9 || { echo an earlier start still runs here: waiting for it \(pkill -f robust_mo ends both: then start again\) >&2; flock 9; }
alone=0
for start in \$(seq 10); do
  began=\$SECONDS
  .venv/bin/python -m robust_mo.$(printf '%q ' "$@"); status=\$?
  [ \$status -gt 128 ] || [ \$status = 75 ] || exit \$status
  # Who has waited ten minutes for the others twice in a row has one of them that ended for a reason of its own.
  took=\$((SECONDS - began))
  if [ \$status = 75 ] && [ \$took -ge 600 ] && [ \$took -lt 700 ]; then alone=\$((alone + 1)); else alone=0; fi
  [ \$alone -lt 2 ] || { echo another worker does not come: look at its last line >&2; exit \$status; }
  told=\"the program ended with status \$status, start \$start of 10\"
  [ \$status = 75 ] || told=\"\$told (it or another worker died, then jax ended it with the stack above)\"
  echo \"\$told: the same command goes on\" >&2
  sleep 10
done; exit \$status"

[ "$dry_run" ] || command -v gcloud >/dev/null || fail "there is no gcloud: install the Google Cloud CLI and log in"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
archive=$scratch/robust_mo.tgz errors=$scratch/errors
{  # in a file, since all can read a command
  [ -z "${HF_TOKEN:-}" ] || printf 'export HF_TOKEN=%q\n' "$HF_TOKEN"
  [ -z "$cache" ] || printf 'export HF_HOME=%q ROBUST_MO_CACHE=%q\n' "$cache/huggingface" "$cache"
} >"$scratch/workers.env"
run git archive --format=tgz --add-file="$scratch/workers.env" --output="$archive" HEAD

had=
while true; do
  found=$([ "$dry_run" ] || state)
  case "$found" in
    '')
      # To bash 3.2 an empty array is unset.
      if ! tpu create --accelerator-type="$type" --version="$version" ${spot[@]+"${spot[@]}"}; then
        [ "$had" ] || exit 1
        say "there is no slice to be had now: asking again in a minute"
        sleep 60
        continue
      fi
      ;;
    READY) ;;
    PREEMPTED | TERMINATED) tpu delete --quiet; continue ;;
    CREATING | STARTING | RESTARTING | REPAIRING) say "the slice is $found"; sleep 20; continue ;;
    *) fail "the slice $name is $found: start or delete it (gcloud compute tpus tpu-vm --help)" ;;
  esac
  had=yes status=0
  {
    run gcloud compute tpus tpu-vm scp "$archive" "$name:robust_mo.tgz" --zone="$zone" --worker=all \
      && tpu ssh --worker=all --command="$setup" && tpu ssh --worker=all --command="$program"
  } || status=$?
  [ "$status" != 0 ] || exit 0
  found=$(state)
  if [ "$found" = READY ]; then
    say "the program ended with status $status and the slice still stands: read above, the first error counts" \
      "(workers that do not meet: open port $port between them, or set JAX_COORDINATOR_PORT); the same command goes on"
    exit "$status"
  fi
  say "the slice is ${found:-gone}: it was preempted; making another, on which the run goes on"
done
