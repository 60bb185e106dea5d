#!/usr/bin/env bash
# A real SLURM on this one machine, for trying what is meant for clusters; nothing of a cluster is needed.  As root:
#
#   bash tests/slurm/one_machine.sh install   # apt-get install slurm-wlm and munge (Debian, Ubuntu)
#   bash tests/slurm/one_machine.sh start     # then: export SLURM_CONF=/tmp/one_machine_slurm/slurm.conf; sinfo
#   bash tests/slurm/one_machine.sh stop
#
# munged proves who is who, slurmctld keeps the queue, slurmd runs the jobs.  No systemd and no cgroups are used, so that
# it works in a container, and the node says that it has eight CPUs however many there are.  Everything lies in
# /tmp/one_machine_slurm; an installed SLURM's own settings are left alone.
set -euo pipefail

folder=/tmp/one_machine_slurm
fail() { echo "one_machine.sh: $1" >&2; exit 2; }

case "${1:-}" in
  install) apt-get update && exec apt-get install --yes --no-install-recommends slurm-wlm munge ;;
  start | stop) ;;
  *) fail "give one of install, start, stop" ;;
esac

for daemon in slurmctld slurmd munged; do  # those that an earlier start began, by their files
  file=$folder/$daemon.pid
  if [ -f "$file" ]; then
    kill "$(cat "$file")" 2>/dev/null || true
    for _ in $(seq 50); do kill -0 "$(cat "$file" 2>/dev/null)" 2>/dev/null || break; sleep 0.2; done
  fi
done
rm -rf "$folder"
[ "$1" = start ] || exit 0

command -v slurmctld >/dev/null || fail "there is no slurmctld: bash tests/slurm/one_machine.sh install"
command -v munged >/dev/null || fail "there is no munged: bash tests/slurm/one_machine.sh install"
[ "$(id -u)" = 0 ] || fail "start it as root, who alone may run jobs for others"

mkdir -p "$folder"/{state,spool,munge}
chmod 755 "$folder"
head -c 1024 /dev/urandom > "$folder/munge/key"
chmod 600 "$folder/munge/key"
munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munged.pid" \
  --log-file="$folder/munged.log" --seed-file="$folder/munge/seed"

host=$(hostname -s)
# A requeued job waits until its first credentials have expired: two minutes, unless told.
cat > "$folder/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=60
MinJobAge=3600
NodeName=$host NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=$host MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
CONF
export SLURM_CONF=$folder/slurm.conf
slurmctld
slurmd
for _ in $(seq 60); do
  if sinfo --noheader --format=%t 2>/dev/null | grep -q idle; then
    echo "SLURM runs: export SLURM_CONF=$folder/slurm.conf"
    exit 0
  fi
  sleep 0.5
done
fail "the node does not come up: see the logs in $folder"
