# The network between the nodes, in one place: train.sbatch and finetune.sbatch read this file.
# Uncomment what your cluster needs. What is set where you submit (export NAME=…) wins.

# Gradients, over NCCL: the interface that all nodes share (`ip -br addr` on a compute node).
# export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-ib0}
# Control messages of the ranks, over gloo: the same interface.
# export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-ib0}
# Which InfiniBand adapters to use.
# export NCCL_IB_HCA=${NCCL_IB_HCA:-mlx5}

# Say what is wrong; INFO tells which network was chosen, when training is slow across nodes.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# A collective that fails or takes longer than hardware.collective_timeout_s ends its rank. A rank
# that is lost is noticed before that, by the heartbeats and hardware.step_timeout_s.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
