"""How much memory there is to use."""


def available_memory() -> int:
    """Bytes of host memory that could be used now."""
    with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123 - not a path but the kernel's answer
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 4 * 1024**3
