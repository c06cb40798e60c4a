# The part of nbdkit's module for Python plugins that is used here (nbdkit-python-plugin(3)).

THREAD_MODEL_PARALLEL: int
EXTENT_HOLE: int
EXTENT_ZERO: int
FLAG_REQ_ONE: int
CACHE_NONE: int

def set_error(err: int, /) -> None: ...
def debug(msg: str, /) -> None: ...
