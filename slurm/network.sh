# Settings of the network between nodes, sourced by train.sbatch and finetune.sbatch. Uncomment what
# your cluster needs. Variables that you export before you submit take precedence.

# Gradients, over NCCL: the interface that all nodes share (`ip -br addr` on a compute node).
# export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-ib0}
# Control messages of the ranks, over gloo: the same interface.
# export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-ib0}
# Which InfiniBand adapters to use.
# export NCCL_IB_HCA=${NCCL_IB_HCA:-mlx5}

# WARN prints errors; INFO prints the chosen network, if training is slow across nodes.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
