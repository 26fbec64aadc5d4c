"""The compiler flags of the tests: they compile far more than they compute, so nothing is optimised."""


def flags(jaxlib: str) -> str:
    """XLA_FLAGS for quick compiles on CPUs with a version of jaxlib, such as '0.10.2'."""
    quick = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    if jaxlib.startswith("0.10."):  # later versions do not know the flag, and end the process
        quick.append("--xla_cpu_use_fusion_emitters=false")  # the older emitters compile a network in half the time
    return " ".join(quick)
