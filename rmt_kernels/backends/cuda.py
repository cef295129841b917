"""C++ kernels for CPU tensors (csrc/cpu)."""


def unavailable(device):
    return "the C++ extension is not built"


def lacks(name, args):
    return None
