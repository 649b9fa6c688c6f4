"""The Triton kernels, one concern a file. Frames in here count as kernel code."""
