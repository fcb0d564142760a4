#!/usr/bin/env bash
# A real Slurm cluster of four nodes on this machine, to try and to test multi-node jobs.
#
#   slurm/devcluster.sh up [DIR]       start it (installs the Debian packages where they are missing)
#   slurm/devcluster.sh status [DIR]   what runs; exit code 0 when every part answers
#   slurm/devcluster.sh down [DIR]     stop it and remove everything it wrote
#   slurm/devcluster.sh run [DIR] -- COMMAND...   up, COMMAND, and down again if it was down before
#
# `up` and `status` write one line to stdout, for `eval "$(slurm/devcluster.sh up)"`: the export of
# SLURM_CONF by which sbatch, squeue, sacct and mvat_dist.submit find this cluster. Words go to stderr.
# `up` mends: whatever does not run is started, whatever runs is left alone.
#
# DIR, or MVAT_DEVCLUSTER, holds all state (default: $XDG_RUNTIME_DIR or /tmp, then mvat-devcluster). It has
# to be new, empty or a devcluster's, and ours alone (mode 700): what it configures is started as this user.
# MVAT_DEVCLUSTER_PORT is the first of 13 ports (default 17000). Only processes started here are ever
# stopped, by their pid files.
#
# Parts: munged (who is who), MariaDB and slurmdbd (so that sacct answers), slurmctld, and a slurmd for
# each of node1 to node4, which claim 8 CPUs each whatever the machine has. Partitions: `normal` (the
# default) and `urgent`, whose jobs preempt and requeue those of `normal`.
set -euo pipefail

readonly NODES="node1 node2 node3 node4"
readonly DEADLINE=90 # seconds until every part has to answer
readonly MARK="# mvat-devcluster"
readonly HOSTS=/etc/hosts
readonly OURS=.mvat-devcluster # a file in every state folder

self=${BASH_SOURCE[0]}
command=${1:-}
(($# == 0)) || shift
state=${MVAT_DEVCLUSTER:-${XDG_RUNTIME_DIR:-/tmp}/mvat-devcluster}
if (($#)) && [[ $1 != -- ]]; then
    state=$1
    shift
fi
[[ ${1:-} != -- ]] || shift
port=${MVAT_DEVCLUSTER_PORT:-17000}
user=$(id -un)
state=$(realpath -ms "$state") # a slash at the end would follow a link
# Daemons live in sbin, which is not on every user's path.
PATH=$PATH:/usr/sbin:/sbin
export SLURM_CONF=$state/slurm.conf

say() { printf 'devcluster: %s\n' "$*" >&2; }

# fail MESSAGE [LOG]: one line, the end of the log that explains it, exit code 2.
fail() {
    say "$1"
    if [[ -n ${2:-} && -s $2 ]]; then
        printf -- '--- the end of %s\n' "$2" >&2
        tail -n 15 "$2" >&2
    fi
    exit 2
}

# until_true SECONDS COMMAND...: try four times a second until it succeeds.
until_true() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || return 1
        sleep 0.25
    done
}

# pid NAME: the process id of a part that runs. The id in the file of a crashed daemon may belong to
# another process by now, so the process has to know of this folder too (slurmdbd by SLURM_CONF alone).
pid() {
    local id
    id=$(cat "$state/run/$1.pid" 2>/dev/null) && [[ $id =~ ^[0-9]+$ ]] || return 1
    cat "/proc/$id/cmdline" "/proc/$id/environ" 2>/dev/null | grep -qaF -- "$state" || return 1
    printf '%s\n' "$id"
}

# part NAME COMMAND...: start a daemon that puts itself into the background, unless it runs. It must not
# inherit our output (a caller that reads it would wait for ever) nor the lock.
part() {
    local name=$1
    shift
    pid "$name" >/dev/null && return
    rm -f "$state/run/$name.pid"
    "$@" </dev/null >>"$state/log/$name.out" 2>&1 9>&- ||
        fail "$name did not start: $*" "$(newest_log "$name")"
    until_true 15 pid "$name" || fail "$name ended right after its start" "$(newest_log "$name")"
    say "started $name"
}

# A daemon that fails before it opens its log writes to its output instead.
newest_log() {
    local log=$state/log/$1
    if [[ $log.out -nt $log.log ]]; then echo "$log.out"; else echo "$log.log"; fi
}

# What lies in the state folder is started, and removed by `down`: nobody else may have put it there, and
# nothing else may lie there. The file that says so is the first in a folder, so emptiness is asked first.
check_state() {
    [[ ! -L $state ]] || fail "$state is a symbolic link: left alone; name the folder itself"
    [[ -e $state ]] || return 0
    [[ -d $state && -O $state ]] || fail "$state is not a folder of $user: choose another with MVAT_DEVCLUSTER"
    [[ $(stat -c %a "$state") == *00 ]] || fail "$state is open to other users: left alone; chmod 700 it if you trust it"
    [[ -z $(ls -A "$state") || -f $state/$OURS ]] || fail "$state was not made by devcluster.sh: left alone"
}

port_is_free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# ------------------------------------------------------------------------------------------ packages

install_packages() {
    local tool missing=() packages=(slurm-wlm slurmdbd munge mariadb-server)
    for tool in slurmctld slurmd slurmdbd munged mariadbd mariadb-install-db sbatch sacct flock; do
        command -v "$tool" >/dev/null || missing+=("$tool")
    done
    ((${#missing[@]})) || return 0
    ((EUID == 0)) || fail "missing: ${missing[*]}; run: sudo apt-get install ${packages[*]}"
    command -v apt-get >/dev/null || fail "missing: ${missing[*]}; install Slurm with slurmdbd, munge and MariaDB"
    say "installing ${packages[*]} (missing: ${missing[*]})"
    local policy=/usr/sbin/policy-rc.d log
    log=$(mktemp)
    # The system's own munge and MariaDB services are not wanted: only ours, in their own folder.
    if [[ ! -e $policy ]]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
        # shellcheck disable=SC2064 # the path is known now
        trap "rm -f $policy" EXIT
    fi
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        "${packages[@]}"; } >"$log" 2>&1 9>&- || fail "apt-get install failed" "$log"
    rm -f "$log"
}

# ------------------------------------------------------------------------------------- configuration

write_configuration() {
    [[ -e $state/slurm.conf ]] && return
    local offset
    for offset in 1 2 3 4 10 11 12; do
        port_is_free $((port + offset)) ||
            fail "port $((port + offset)) is in use; set MVAT_DEVCLUSTER_PORT to another first port"
    done
    local password
    (umask 077 && head -c 1024 /dev/urandom >"$state/munge.key")
    password=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    (umask 077 && cat >"$state/mariadb.sql") <<END
CREATE DATABASE IF NOT EXISTS slurm_acct_db;
CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY '$password';
GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';
END
    (umask 077 && cat >"$state/slurmdbd.conf") <<END
AuthType=auth/munge
AuthInfo=$state/munge.socket
DbdHost=localhost
DbdPort=$((port + 11))
SlurmUser=$user
PidFile=$state/run/slurmdbd.pid
LogFile=$state/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((port + 12))
StorageUser=slurm
StoragePass=$password
StorageLoc=slurm_acct_db
END
    # cred_expire is also how long a requeued job waits before it starts again (120 s by default);
    # the scheduler's intervals are short, because nobody wants to wait for a test.
    cat >"$state/slurm.conf.new" <<END
ClusterName=mvat-devcluster
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$((port + 10))
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$state/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation=$state/slurmctld
SlurmdSpoolDir=$state/spool/%n
SlurmctldPidFile=$state/run/slurmctld.pid
SlurmdPidFile=$state/run/%n.pid
SlurmctldLogFile=$state/log/slurmctld.log
SlurmdLogFile=$state/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SlurmdTimeout=60
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=2
KillWait=10
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort=$((port + 11))
AccountingStoragePass=$state/munge.socket
JobAcctGatherType=jobacct_gather/linux
NodeName=node[1-4] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + 4))] CPUs=8 RealMemory=20000 State=UNKNOWN
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
END
    mv "$state/slurm.conf.new" "$state/slurm.conf" # last: it says that the configuration is whole
}

# Jobs find their first node by its name, so the names have to resolve.
add_host_names() {
    local node address added=()
    for node in $NODES; do
        address=$(getent ahostsv4 "$node" | awk 'NR == 1 { print $1 }') || true
        case $address in
        127.*) ;;
        "")
            if [[ -w $HOSTS ]]; then
                [[ -z $(tail -c 1 "$HOSTS") ]] || echo >>"$HOSTS"
                echo "127.0.0.1 $node $MARK" >>"$HOSTS"
                added+=("$node")
            else
                say "$node does not resolve and $HOSTS is not writable: jobs take the address from scontrol"
            fi
            ;;
        *) fail "$node resolves to $address, another machine: this cluster needs the name" ;;
        esac
    done
    ((${#added[@]} == 0)) || say "added ${added[*]} to $HOSTS"
}

# In place: in a container the file is a mount, which cannot be replaced.
remove_host_names() {
    local kept
    grep -qF "$MARK" "$HOSTS" && [[ -w $HOSTS ]] || return 0
    kept=$(grep -vF "$MARK" "$HOSTS") || true
    printf '%s\n' "$kept" >"$HOSTS"
}

# ------------------------------------------------------------------------------------------ database

database_answers() { mariadb-admin --no-defaults --socket="$state/mariadb.socket" ping; }

start_database() {
    pid mariadb >/dev/null && return
    local log=$state/log/mariadb.log
    if [[ ! -d $state/mariadb/mysql ]]; then
        rm -rf "$state/mariadb"
        mariadb-install-db --no-defaults --user="$user" --datadir="$state/mariadb" --skip-test-db \
            --auth-root-authentication-method=socket --auth-root-socket-user="$user" >"$log" 2>&1 9>&- ||
            fail "the database's folder could not be made" "$log"
    fi
    # Nothing here is worth a flush to disk: the whole folder goes with `down`.
    setsid mariadbd --no-defaults --user="$user" --datadir="$state/mariadb" --socket="$state/mariadb.socket" \
        --port=$((port + 12)) --bind-address=127.0.0.1 --pid-file="$state/run/mariadb.pid" --log-error="$log" \
        --init-file="$state/mariadb.sql" --skip-name-resolve --innodb-flush-log-at-trx-commit=0 \
        --innodb-lock-wait-timeout=900 </dev/null >>"$log" 2>&1 9>&- &
    until_true 60 database_answers || fail "MariaDB does not answer" "$log"
    say "started mariadb"
}

# ------------------------------------------------------------------------------------------ commands

accounting_answers() { timeout 10 sacctmgr -n -P show cluster format=cluster; }
cluster_is_known() { accounting_answers | grep -qx mvat-devcluster; }
controller_answers() { timeout 10 scontrol ping | grep -q 'is UP'; }
sacct_answers() { timeout 10 sacct -n; }

nodes_are_ready() {
    # A trailing mark (idle*) means that the controller has not heard from the node.
    (($(timeout 10 sinfo -h -N -p normal -o '%T' | grep -cE '^(idle|mixed|allocated|completing)$') == 4))
}

# A node that the controller gave up (its slurmd was killed) comes back on demand.
resume_nodes() {
    local node node_state
    for node in $NODES; do
        node_state=$(timeout 10 sinfo -h -n "$node" -p normal -o '%T')
        case $node_state in
        down* | drain*) scontrol update NodeName="$node" State=RESUME 2>/dev/null || true ;;
        esac
    done
}

up() {
    local began=$SECONDS node
    install_packages
    mkdir -p "$(dirname "$state")"
    mkdir -m 700 "$state" 2>/dev/null || [[ -d $state ]] || fail "$state cannot be made"
    check_state # again: somebody may have been faster
    touch "$state/$OURS"
    mkdir -p "$state"/{run,log,spool,slurmctld}
    exec 9>"$state/lock"
    flock -w "$DEADLINE" 9 || fail "another devcluster.sh works in $state"
    write_configuration
    add_host_names

    part munged munged --force --key-file="$state/munge.key" --socket="$state/munge.socket" \
        --pid-file="$state/run/munged.pid" --log-file="$state/log/munged.log" --seed-file="$state/munge.seed"
    start_database
    part slurmdbd slurmdbd
    until_true "$DEADLINE" accounting_answers || fail "slurmdbd does not answer" "$state/log/slurmdbd.log"
    cluster_is_known || sacctmgr -i add cluster mvat-devcluster >>"$state/log/slurmdbd.out" 2>&1 || cluster_is_known ||
        fail "the cluster could not be registered" "$state/log/slurmdbd.out"
    part slurmctld slurmctld -f "$SLURM_CONF"
    until_true "$DEADLINE" controller_answers || fail "slurmctld does not answer" "$state/log/slurmctld.log"
    for node in $NODES; do
        mkdir -p "$state/spool/$node"
        part "$node" slurmd -N "$node" -f "$SLURM_CONF"
    done
    if ! until_true 5 nodes_are_ready; then
        resume_nodes
        until_true "$DEADLINE" nodes_are_ready || {
            sinfo -N -l >&2 || true
            fail "not all four nodes are ready" "$state/log/slurmctld.log"
        }
    fi
    until_true "$DEADLINE" sacct_answers || fail "sacct does not answer" "$state/log/slurmdbd.log"
    say "four nodes are ready ($((SECONDS - began)) s); state in $state; use it with"
    echo "export SLURM_CONF=$SLURM_CONF"
}

status() {
    local name id ok=0
    [[ -d $state ]] || fail "no cluster in $state; start one with: slurm/devcluster.sh up"
    for name in munged mariadb slurmdbd slurmctld $NODES; do
        if id=$(pid "$name"); then say "$name runs (pid $id)"; else say "$name does not run" && ok=2; fi
    done
    ((ok == 0)) && { nodes_are_ready && sacct_answers >/dev/null || ok=2; }
    if pid slurmctld >/dev/null; then timeout 10 sinfo >&2 || ok=2; fi
    ((ok == 0)) || fail "not every part answers; mend with: slurm/devcluster.sh up"
    echo "export SLURM_CONF=$SLURM_CONF"
}

# stop NAME SECONDS: ask, wait, insist.
stop() {
    local id
    id=$(pid "$1") || return 0
    kill "$id" 2>/dev/null || true
    until_true "$2" gone "$id" || kill -KILL "$id" 2>/dev/null || true
    until_true 5 gone "$id" || fail "$1 (pid $id) does not end"
}

gone() { [[ ! -e /proc/$1 ]] || grep -q '^State:.*Z' "/proc/$1/status"; }

# Jobs whose slurmd died go on. Their processes carry this cluster's SLURM_CONF and a job id, or are the
# slurmstepd that watches over them.
job_processes() {
    local folder variables
    for folder in /proc/[0-9]*; do
        [[ $folder != "/proc/$$" ]] || continue
        variables=$(cat "$folder/environ" 2>/dev/null | tr '\0' '\n') || continue
        grep -qxF "SLURM_CONF=$SLURM_CONF" <<<"$variables" || continue
        if grep -q '^SLURM_JOB_ID=' <<<"$variables" || grep -qx slurmstepd "$folder/comm" 2>/dev/null; then
            echo "${folder#/proc/}"
        fi
    done
}

no_jobs() { [[ -z $(timeout 5 squeue -h) ]]; }

down() {
    local began=$SECONDS node id
    remove_host_names
    [[ -d $state ]] || { say "nothing in $state" && return; }
    exec 9>"$state/lock"
    flock -w "$DEADLINE" 9 || fail "another devcluster.sh works in $state"
    # Jobs first, by the cluster itself; what outlives a crashed slurmd afterwards.
    if pid slurmctld >/dev/null && controller_answers && ! no_jobs; then
        timeout 10 scancel --user="$user" || true
        until_true 5 no_jobs || timeout 10 scancel --signal=KILL --user="$user" || true
        until_true 5 no_jobs || true
    fi
    for node in $NODES; do stop "$node" 10; done
    stop slurmctld 15
    stop slurmdbd 15
    for id in $(job_processes); do kill -KILL "$id" 2>/dev/null || true; done
    stop mariadb 20
    stop munged 5
    rm -rf "$state"
    say "stopped, $state removed ($((SECONDS - began)) s)"
}

# The command's own exit code; whatever ends it, a cluster that was started for it goes with it.
run() {
    (($#)) || fail "run what? slurm/devcluster.sh run -- COMMAND..."
    pid slurmctld >/dev/null || trap '"$self" down "$state"' EXIT
    "$self" up "$state" >/dev/null
    "$@"
}

[[ $state =~ ^[A-Za-z0-9/._+-]+$ ]] ||
    fail "the state folder '$state' must be free of spaces and odd characters; choose another with MVAT_DEVCLUSTER"
((${#state} <= 80)) || fail "the state folder's path is too long for a socket: $state"
check_state
case $command in
up | status | down) "$command" ;;
run) run "$@" ;;
*) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$self" >&2 && exit 2 ;;
esac
