"""Small Triton kernels. Each file is a tutorial: what it computes, what that costs, kernel, launcher, check."""


def run_as_program(check, benchmark):
    """`python -m kernels.<name>`: check(device) against the plain version, then on a GPU the timing table."""
    import torch
    import triton

    if torch.cuda.is_available():
        check("cuda")
        benchmark()
    elif triton.knobs.runtime.interpret:
        check("cpu")
    else:
        raise SystemExit("no GPU: with TRITON_INTERPRET=1 the check runs on a CPU")
