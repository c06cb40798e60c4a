"""The version of lz4."""


def version() -> str:
    """The versions of the Python binding and of the library in it.

    Raises ImportError if python3-lz4 is missing.
    """
    import lz4  # late: plain runs do without it

    return f"{lz4.__version__}, library {lz4.library_version_string()}"
