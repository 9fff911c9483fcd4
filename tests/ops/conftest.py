"""Kernels run in one of two worlds per process: interpreted on the CPU (TRITON_INTERPRET=1), or compiled."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = ["test_*_compiled.py", "test_*_gpu.py"] if INTERPRETED else ["test_*_interpreted.py"]
