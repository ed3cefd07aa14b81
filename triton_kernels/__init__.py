"""Triton implementations of the passes, installed as ``samkern.triton_kernels``. None yet: GPU tensors take the reference."""
