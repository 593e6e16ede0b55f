# An image for CUDA machines: torch of constraints.txt, DeepSpeed, flash-attn, megaback.
#
#   docker build --tag megaback .
#   docker run --rm --gpus all --shm-size 8g --volume "$PWD:/work" megaback doctor
#
# The CUDA of the base image is that of torch; its compiler builds flash-attn here, and DeepSpeed's
# optimizer for zero.offload at run time.
ARG BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04
FROM ${BASE}

# Devices that flash-attn is compiled for, and compilers at a time.
ARG FLASH_ATTN_CUDA_ARCHS="80;90"
ARG MAX_JOBS=4
ENV VENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    PYTHONNOUSERSITE=1 \
    PYTHONSAFEPATH=1
WORKDIR /opt/megaback

COPY container/install.sh container/
RUN container/install.sh system
COPY constraints.txt ./
COPY tests/flash/constraints.txt tests/flash/
RUN FLASH_ATTN_CUDA_ARCHS="$FLASH_ATTN_CUDA_ARCHS" MAX_JOBS="$MAX_JOBS" container/install.sh kernels

COPY setup.py pyproject.toml README.md LICENSE ./
COPY configs configs
COPY slurm slurm
COPY data_pipeline data_pipeline
COPY megaback megaback
COPY launcher launcher
COPY tools tools
RUN container/install.sh megaback

WORKDIR /work
ENTRYPOINT ["megaback"]
CMD ["--help"]
