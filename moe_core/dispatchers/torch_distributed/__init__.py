"""Dispatchers on torch.distributed: gloo on CPUs, NCCL on GPUs."""
