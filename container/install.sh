#!/usr/bin/env bash
# The steps of Dockerfile and megaback.def, on Ubuntu with the CUDA toolkit of constraints.txt's torch.
#
#   install.sh system | kernels | megaback
#
# VENV is the environment to make. flash-attn is compiled: FLASH_ATTN_CUDA_ARCHS chooses the devices,
# and MAX_JOBS how many compilers run at a time, at about 4 GB each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
pip=("$VENV/bin/python" -m pip install --no-cache-dir --disable-pip-version-check
    -c constraints.txt -c tests/flash/constraints.txt)

case $1 in
system)
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        build-essential openssh-client pdsh python3 python3-dev python3-venv zstd
    rm -rf /var/lib/apt/lists/*
    python3 -m venv "$VENV"
    ;;
kernels) # before the code, which changes more often: this takes long
    "${pip[@]}" torch numpy einops ninja packaging psutil setuptools wheel
    FLASH_ATTENTION_FORCE_BUILD=TRUE "${pip[@]}" --no-build-isolation --no-deps flash-attn
    ;;
megaback)
    "${pip[@]}" --no-build-isolation '.[flash,gguf,html,plot,serve,tensorboard,transformers,wandb]'
    "$VENV/bin/python" -m pip check
    ;;
*)
    echo "install.sh: error: $1 is no step; give system, kernels or megaback" >&2
    exit 2
    ;;
esac
