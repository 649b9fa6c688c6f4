"""Parts of the GPU benchmarks: `python benchmarks/gpu_experts.py`, `gpu_routing.py` and `plot_gpu.py`."""
