#!/usr/bin/env bash
# One program on a Cloud TPU slice, made if need be and made again when it is preempted:
#
#   bash launch/tpu_pod.sh --name=mo --zone=us-east5-b --type=v5litepod-16 --workdir=/mnt/bucket/runs/red [--spot] \
#     [--version=v2-alpha-tpuv5-lite] [--dry_run] -- train --config=configs/red_lora.py:8b
#
# Needs gcloud, logged in.  Copies this checkout's last commit to every worker, sets it up there, starts the same command
# on all of them (one alone would wait for the rest) and shows what they print.  --workdir must be a folder that all
# workers see, such as a mounted bucket or Filestore: there the command goes on after a preemption.  The slice is kept
# at the end: gcloud compute tpus tpu-vm delete NAME --zone=ZONE.
# The workers meet at a port of the first, opened between them by the network's firewall: jax's own is 8482 since 0.8.1
# (8476 before); JAX_COORDINATOR_PORT=8476 before this command takes another.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "tpu_pod.sh: $1" >&2; exit 2; }

name='' zone='' type='' workdir='' version=tpu-ubuntu2204-base spot=() dry_run='' port=${JAX_COORDINATOR_PORT:-8482}
while [ $# -gt 0 ]; do
  case "$1" in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=(--spot) ;;
    --dry_run) dry_run=yes ;;
    --) shift; break ;;
    *) fail "unknown argument $1: see the top of the script, and put the program after --" ;;
  esac
  shift
done
for needed in name zone type workdir; do [ "${!needed}" ] || fail "--$needed must be given"; done
case "$workdir" in /*) ;; *) fail "--workdir=$workdir is no path of all workers: mount the bucket and give /its/path" ;; esac
case "${1:-}" in
  train | evaluate | sample) ;;
  *) fail "after -- comes '${1:-}': give train, evaluate or sample, which run on several hosts" ;;
esac
[[ "$port" =~ ^[0-9]+$ ]] || fail "JAX_COORDINATOR_PORT is '$port': give the number of a port"

tpu() { run gcloud compute tpus tpu-vm "$1" "$name" --zone="$zone" "${@:2}"; }
run() { if [ "$dry_run" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
state() { gcloud compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(state)' 2>/dev/null || true; }
# The archive unpacks over an earlier copy; the workers' own .venv stays.
setup='mkdir -p robust_mo && tar -xzf robust_mo.tgz -C robust_mo && bash robust_mo/launch/setup.sh --tpu'
program="cd robust_mo && JAX_COORDINATOR_PORT=$port .venv/bin/python -m robust_mo.$1 --workdir=$(printf '%q' "$workdir")"
[ $# -lt 2 ] || program+=" $(printf '%q ' "${@:2}")"

[ "$dry_run" ] || command -v gcloud >/dev/null || fail "there is no gcloud: install the Google Cloud CLI and log in"
archive=$(mktemp --suffix=.tgz)
trap 'rm -f "$archive"' EXIT
run git archive --format=tgz --output="$archive" HEAD

while true; do
  found=$([ "$dry_run" ] || state)
  if [ "$found" ] && [ "$found" != READY ]; then
    tpu delete --quiet
    found=
  fi
  [ "$found" ] || tpu create --accelerator-type="$type" --version="$version" "${spot[@]}"
  status=0
  {
    run gcloud compute tpus tpu-vm scp "$archive" "$name:robust_mo.tgz" --zone="$zone" --worker=all \
      && tpu ssh --worker=all --command="$setup" && tpu ssh --worker=all --command="$program"
  } || status=$?
  found=$([ "$dry_run" ] || state)
  if [ "$status" = 0 ]; then exit; fi
  [ "$found" != READY ] || {
    echo "tpu_pod.sh: the program ended with status $status and the slice still stands: read above, the first error counts" \
      "(workers that do not meet: open port $port between them, or set JAX_COORDINATOR_PORT); the same command goes on" >&2
    exit "$status"
  }
  echo "tpu_pod.sh: the slice is ${found:-gone}: it was preempted; making another, on which the run goes on" >&2
  sleep 60
done
