"""Running out of memory, in the words of every library that may say so."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the memory of the host or of a device does not suffice."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
