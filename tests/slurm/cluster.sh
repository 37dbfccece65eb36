#!/usr/bin/env bash
# A SLURM of one node on loopback, brought up by hand and down again: for tests of the batch scripts.
#
#   tests/slurm/cluster.sh up [--install]   start it and print the line that points a shell at it (SLURM_CONF=...)
#   tests/slurm/cluster.sh down             cancel its jobs, stop what `up` has started, remove its folder
#   tests/slurm/cluster.sh check            say what is missing here, status 3; nothing and 0 if it can be started
#
# Needs root, and Debian's slurm-wlm and munge, which only --install installs. Everything of it lies in one folder
# (XBRAID_SLURM_DIR, /tmp/xbraid-slurm): configuration, key, sockets, logs, process ids. An installed SLURM of this
# machine is neither read nor touched.
set -euo pipefail

dir=${XBRAID_SLURM_DIR:-/tmp/xbraid-slurm}
cpus=${XBRAID_SLURM_CPUS:-8} # more than there are: what is tested is how jobs start and end, not how fast they are
daemons=(slurmd slurmctld munged) # in the order in which they are stopped
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$dir/slurm.conf

fail() {
  echo "cluster.sh: $1" >&2
  exit "${2:-1}"
}

check() {
  [ "$(id -u)" = 0 ] || fail "user $(id -un) is not root, who has to start slurmd; try it in a container or as root" 3
  local program missing=()
  for program in munged slurmctld slurmd sbatch srun runuser ss; do
    command -v "$program" > /dev/null || missing+=("$program")
  done
  [ ${#missing[@]} = 0 ] || fail "no ${missing[*]} here; 'tests/slurm/cluster.sh up --install' installs \
Debian's slurm-wlm and munge" 3
}

install() {
  [ "$(id -u)" = 0 ] || fail "--install needs root" 3
  command -v apt-get > /dev/null || fail "--install needs apt-get; install SLURM and munge otherwise" 3
  # RUNLEVEL keeps Debian from starting the services, which would listen on every interface.
  export RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -qq -y --no-install-recommends slurm-wlm munge iproute2 util-linux > "$dir.install.log" 2>&1 \
    || fail "apt-get failed: $(tail -n 3 "$dir.install.log")" 3
  rm -f "$dir.install.log"
}

# The first ports of a range that nobody listens on.
free_ports() {
  local port found=0
  for port in $(seq 26810 26899); do
    if [ "$found" -lt "$1" ] && [ -z "$(ss -Hltn "sport = :$port")" ]; then
      echo "$port"
      found=$((found + 1))
    fi
  done
  [ "$found" = "$1" ] || fail "no $1 free ports between 26810 and 26899"
}

configure() {
  local host ports partition="Nodes=ALL State=UP DefaultTime=10 MaxTime=1-00"
  host=$(hostname -s)
  mapfile -t ports < <(free_ports 2)
  cat > "$SLURM_CONF" << END
ClusterName=xbraid
FirstJobId=$(($(date +%s) % 60000000 + 1))
SlurmctldHost=$host(127.0.0.1)
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort=${ports[0]}
SlurmdPort=${ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,requeue_delay=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=pmi2
KillWait=10
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus State=UNKNOWN
PartitionName=main Default=YES PriorityTier=10 PreemptMode=OFF $partition
PartitionName=low PriorityTier=1 GraceTime=60 $partition
PartitionName=high PriorityTier=20 PreemptMode=OFF $partition
END
}

up() {
  [ "${1:-}" != --install ] || install
  check
  [ ! -e "$dir" ] || fail "$dir is there: the cluster is up, or was not brought down; first 'tests/slurm/cluster.sh down'"
  mkdir -m 0755 "$dir"
  mkdir "$dir/state" "$dir/spool" "$dir/munge"
  configure
  trap down_if_failed EXIT
  head -c 1024 /dev/urandom > "$dir/munge/key"
  chmod 0400 "$dir/munge/key"
  chmod 0711 "$dir/munge"
  chown -R munge: "$dir/munge"
  runuser -u munge -- "$(command -v munged)" --key-file="$dir/munge/key" --socket="$dir/munge/socket" \
    --pid-file="$dir/munge/munged.pid" --log-file="$dir/munge/munged.log" --seed-file="$dir/munge/seed" > /dev/null
  ln -s munge/munged.pid "$dir/munged.pid"
  slurmctld -c
  slurmd
  local _
  for _ in $(seq 100); do
    if [ "$(sinfo -h -p main -o %t 2> /dev/null)" = idle ]; then
      echo "export SLURM_CONF=$SLURM_CONF"
      return
    fi
    sleep 0.2
  done
  fail "the node is $(sinfo -h -p main -o %t) after 20 s"
}

down_if_failed() {
  local status=$?
  [ $status = 0 ] || { tail -n 5 "$dir"/*.log >&2; down; }
  exit $status
}

# Processes are stopped by the ids in their files, and only if they still are what the file says.
stop() {
  local pid _
  pid=$(cat "$dir/$1.pid" 2> /dev/null) || return 0
  for _ in $(seq 50); do
    grep -qs "$1" "/proc/$pid/cmdline" || return 0
    kill "$pid" 2> /dev/null || true
    sleep 0.2
  done
  kill -KILL "$pid" 2> /dev/null || true
}

down() {
  [ -e "$SLURM_CONF" ] || return 0 # what is removed below is a folder that `up` has made
  local _ daemon
  if scancel -u "$(id -un)" 2> /dev/null; then
    for _ in $(seq 75); do
      [ -n "$(squeue -h 2> /dev/null)" ] || break
      sleep 0.2
    done
  fi
  for daemon in "${daemons[@]}"; do
    stop "$daemon"
  done
  rm -rf "$dir"
}

case "${1:-}" in
  up) up "${2:-}" ;;
  down) down ;;
  check) check ;;
  *) fail "'${1:-}' is none of up, down, check; try 'tests/slurm/cluster.sh up'" 2 ;;
esac
