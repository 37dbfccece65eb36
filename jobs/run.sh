# What the batch scripts share: starts a driver on the ranks of a job, hands signals on, and requeues what is not finished.
# shellcheck shell=bash
#
# Variables of the environment, as in `LAUNCHER=mpirun sbatch jobs/peaks.sbatch`; README.md says more:
#   LAUNCHER      srun (default) or mpirun
#   SRUN_MPI      plugin of srun: pmi2 (default; MPICH) or pmix (Open MPI)
#   MPIRUN        the mpirun with its options; by default the one beside PYTHON, or that of the PATH
#   PYTHON        .venv/bin/python if that is there (default), or python
#   CONTAINER     image in which Apptainer runs python
#   PROJECT       the project's folder; by default where sbatch was called
#   OUT           folder of the run; runs/JOB-NAME by default; every element of an array has a folder of its own in it
#   DRIVER        program and configuration file instead of those of the script
#   CONFIG
#   MAX_RESTARTS  restarts after which a job fails instead of being requeued once more; 100 by default

come_back=75            # EX_TEMPFAIL: how a driver ends that was asked to, behind a checkpoint
resume=(--resume auto) # a script sets it to () if its driver writes no checkpoints

say() {
  echo "[$(date '+%F %T')] job ${SLURM_JOB_ID:-?}: $*"
}

fail() {
  say "error: $1" >&2
  exit "${2:-1}"
}

# The words before the driver's: `command`, from LAUNCHER and the variables beside it.
choose_launcher() {
  local ranks=$1 python=${PYTHON:-} beside
  [ -n "$python" ] || [ -n "${CONTAINER:-}" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python
  python=${python:-python}
  case ${LAUNCHER:=srun} in
    srun) command=(srun --mpi="${SRUN_MPI:-pmi2}" --ntasks="$ranks" --kill-on-bad-exit=1) ;;
    mpirun)
      beside=$(dirname "$python")/mpirun
      [ -x "$beside" ] || beside=mpirun
      read -ra command <<< "${MPIRUN:-$beside}"
      command+=(-n "$ranks")
      ;;
    *) fail "LAUNCHER=$LAUNCHER must be srun or mpirun" 2 ;;
  esac
  command -v "${command[0]}" > /dev/null || fail "LAUNCHER=$LAUNCHER: there is no ${command[0]}; give MPIRUN or a PATH" 2
  command+=(bash jobs/rank.sh)
  [ -z "${CONTAINER:-}" ] || command+=(apptainer exec "$CONTAINER")
  command+=("$python")
}

# MPICH under pmi2 names its shared memory after the numbers of job and step. Ranks that were killed leave theirs on the
# node, and a requeued job, whose steps are numbered from 0 again, would fail on it. So each start takes a step of its own.
skip_steps() {
  local start
  [ "$LAUNCHER" = srun ] && [ "${SRUN_MPI:-pmi2}" = pmi2 ] || return 0
  for ((start = 0; start < restarts; start++)); do
    srun --mpi=none --nodes=1 --ntasks=1 true
  done
}

# Asks the ranks for a checkpoint, by the signal that every launcher hands on; again and again, since ranks that are still
# starting do not listen, and those that do are not disturbed.
ask() {
  while kill -s USR1 "$launched" 2> /dev/null; do sleep 5; done
}

# What a signal to the batch script does: the first one asks, a second SIGTERM ends the ranks at once.
hand_on() {
  asked=$((asked + 1)) signalled=1
  say "SIG$1"
  [ -n "$launched" ] || return
  if [ "$asked" = 1 ]; then
    ask &> /dev/null &
    asking=$!
  elif [ "$1" = TERM ]; then
    # To them these are the first and the second.
    kill -s TERM "$launched" && sleep 1 && kill -s TERM "$launched"
  fi 2> /dev/null
}

# Runs the words given and sets `status`. A signal interrupts `wait`, which then has not seen the end.
await() {
  launched='' asking='' asked=0 signalled=0 status=0
  trap 'hand_on USR1' USR1
  trap 'hand_on TERM' TERM
  "$@" &
  launched=$!
  [ "$asked" = 0 ] || kill -s USR1 "$launched"
  while :; do
    signalled=0
    wait "$launched"
    status=$?
    [ "$signalled" = 1 ] || break
  done
  trap '' USR1 TERM # what is left to do is done undisturbed
  [ -z "$asking" ] || kill "$asking" 2> /dev/null
}

# How often this job has been restarted: `restarts`. Bash runs what it finds in a number to calculate with, so it has to be one.
count_restarts() {
  restarts=${SLURM_RESTART_COUNT:-0}
  case $restarts in
    *[!0-9]* | ??????*) fail "SLURM_RESTART_COUNT=$restarts is no number of restarts; unset it" 2 ;;
  esac
  restarts=$((10#$restarts))
}

# Puts this job back into the queue, unless somebody has ended it: then it is to stay as it is.
requeue() {
  local state
  [ "$restarts" -lt "${MAX_RESTARTS:-100}" ] \
    || fail "interrupted after $restarts restarts, MAX_RESTARTS=${MAX_RESTARTS:-100}; is the time limit too short?"
  state=$(squeue --noheader --states=all --jobs="$SLURM_JOB_ID" --format=%T)
  if [ "$state" != RUNNING ]; then
    say "interrupted in the state ${state:-unknown}: not requeued from here; the same sbatch command goes on"
  elif scontrol requeue "$SLURM_JOB_ID"; then
    say "interrupted: requeued"
  else
    say "interrupted, and SLURM does not requeue it: the same sbatch command goes on"
  fi
  exit "$come_back"
}

# run DRIVER CONFIG RANKS [OPTION...]: the whole job; ends the batch script.
run() {
  local driver=${DRIVER:-$1} config=${CONFIG:-$2} ranks=$3 out
  shift 3
  count_restarts
  out=${OUT:-runs/${SLURM_JOB_NAME:-job}}${SLURM_ARRAY_TASK_ID:+/$SLURM_ARRAY_TASK_ID}
  [ -r "$driver" ] || fail "DRIVER=$driver is not a file in $PWD; submit from the project's folder" 2
  [ -r "$config" ] || fail "CONFIG=$config is not a file in $PWD; submit from the project's folder" 2
  [ "$ranks" -le "${SLURM_NTASKS:-$ranks}" ] || fail "$ranks ranks, but --ntasks=$SLURM_NTASKS; give --ntasks=$ranks" 2
  choose_launcher "$ranks"
  # One thread a rank: ranks that share cores otherwise fight for them.
  export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
  say "start $((restarts + 1)), $ranks rank(s) by $LAUNCHER on ${SLURM_JOB_NODELIST:-?}, into $out"
  skip_steps
  await "${command[@]}" "$driver" --config "$config" --out "$out" "${resume[@]}" "$@"
  case $status in
    0) say finished ;;
    "$come_back") requeue ;;
    # A launcher that had not come so far as to listen dies of SIGUSR1: nothing is lost, and nothing else sends it.
    138 | 10) [ ${#resume[@]} = 0 ] || requeue ;;
  esac
  [ "$status" = 0 ] || fail "failed, status $status" "$status"
  exit 0
}
