"""Kernels run in one of two worlds per process: interpreted on the CPU (TRITON_INTERPRET=1), or compiled."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = ["test_kernels_compiled.py", "test_kernels_gpu.py"] if INTERPRETED else ["test_kernels_interpreted.py"]
