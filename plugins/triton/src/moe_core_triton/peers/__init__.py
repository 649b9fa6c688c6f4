"""The dispatcher `symm_mem`: kernels that write tokens and results straight into the memory of the other GPUs."""
