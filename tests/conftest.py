import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # two workers share two cores
    os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: the kernels then run on a CPU
