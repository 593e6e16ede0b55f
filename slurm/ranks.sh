# Sourced by train.sbatch and finetune.sbatch: starts the ranks, passes signals on to them, and
# requeues the job if useful. Settings of your cluster are in those files and in network.sh.

# Traps only set variables: longer ones could lose a signal.
limit_is_near=
to_pass_on=
trap 'limit_is_near=yes to_pass_on=yes' USR1
trap 'to_pass_on=yes' TERM

MEGABACK_ENV=${MEGABACK_ENV:-$PWD/.venv}
if [[ ! -x $MEGABACK_ENV/bin/python ]]; then
    echo "slurm: error: there is no $MEGABACK_ENV/bin/python; submit from the folder with .venv, or" \
        "export MEGABACK_ENV=FOLDER, the environment in which megaback is installed" >&2
    exit 13
fi
export PATH="$MEGABACK_ENV/bin:$PATH"
if ! command -v srun >/dev/null; then
    echo "slurm: error: srun is not on the PATH of this job (a container without Slurm's programs?);" \
        "submit the sbatch file itself, and let srun start the container" >&2
    exit 13
fi
if [[ ${MEGABACK_CONTAINER:-} ]] && ! command -v apptainer >/dev/null; then
    echo "slurm: error: MEGABACK_CONTAINER is set, but apptainer is not on the PATH of this job;" \
        "load its module before you submit, or unset MEGABACK_CONTAINER" >&2
    exit 13
fi
source "${BASH_SOURCE[0]%/*}/network.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export PYTHONSAFEPATH=1 # the folder's modules do not hide installed ones (Python 3.11 and later)
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning}

free_port() { # random, so that it cannot be guessed; below Linux's ephemeral ports
    local port
    while
        port=$((10000 + $(od -An -N4 -tu4 /dev/urandom) % 20000))
        (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null # in use
    do :; done
    echo "$port"
}
# The rendezvous of the ranks is on this node, the first one.
export MASTER_PORT=${MASTER_PORT:-$(free_port)}

# With MEGABACK_CONTAINER, only the ranks run in it: the steps before and after call Slurm.
run_ranks() { # run_ranks CONFIG [KEY=VALUE ...]; %a in CONFIG is the index of an array's element
    if [[ ${SLURM_ARRAY_TASK_ID:-} ]] && (($#)); then
        set -- "${1//%a/$SLURM_ARRAY_TASK_ID}" "${@:2}"
    fi
    python -m megaback slurm-job begin ${begin_options:-} "$@" # refuses an invalid run
    local code=0 step

    # Each rank reads its rank and the address of the first from srun's variables.
    # If a rank is lost and the others hang, they are killed after --wait seconds: longer than Slurm
    # takes to notice a dead node (about 1.3 times its SlurmdTimeout, by default 300 s), so that the
    # job still exists to be requeued. --kill-on-bad-exit=1 would not leave the others time to
    # report which rank was lost. exit.json has the end of the run, whatever srun returns.
    if [[ ! $to_pass_on ]]; then
        srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --cpu-bind=cores \
            --kill-on-bad-exit=0 --wait="${MEGABACK_WAIT_S:-600}" \
            ${MEGABACK_CONTAINER:+apptainer exec --nv "$MEGABACK_CONTAINER"} \
            python -m megaback.train "$@" &
        step=$!
        while true; do
            code=0
            [[ $to_pass_on ]] || wait "$step" || code=$?
            [[ $to_pass_on ]] || break # else a signal interrupted the wait
            to_pass_on=
            kill -USR1 "$step" 2>/dev/null || true # srun sends it to every rank
            # A full disk of the log must not end this script.
            echo "slurm: passing a signal on to the ranks, which save and stop" || true
        done
    else
        code=$((128 + 10)) # SIGUSR1, before the ranks started
    fi

    # The ranks also check the clock, and stop a minute before the end that newer Slurms announce.
    if ((${SLURM_JOB_END_TIME:-0} && ${SLURM_JOB_END_TIME:-0} - $(date +%s) < 90)); then
        limit_is_near=yes
    fi
    # Without USR1 the job is canceled (scancel), or requeued by Slurm itself (preemption).
    python -m megaback slurm-job end --step-code "$code" ${limit_is_near:+--limit-is-near} "$@"
}
