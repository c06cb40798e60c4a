"""Typed calls of ``qemu-img``: what an image is, making a new one, changing one.

The JSON is QEMU's ``ImageInfo`` (QAPI schema ``block-core.json``). It is also read back from backup
sets, so nothing in it is trusted: a wrong type is a FormatError that names the key.
"""

import errno
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from nbdbackupd import documents, proc
from nbdbackupd.errors import FormatError, NoSpaceError, ProcessError
from nbdbackupd.where import HERE, Where

INFO_SECONDS: Final = 60.0
LOCKED: Final = ('" lock', "Is another process using the image")
"""How QEMU's programs say that another one has the image open."""

CHECK_SECONDS: Final = 3600.0
CREATE_SECONDS: Final = 3600.0
"""Preallocating writes on file systems without fallocate; that may take its time."""

CHANGE_SECONDS: Final = 600.0
QCOW2: Final = "qcow2"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BitmapInfo:
    """A bitmap stored in an image; ``granularity`` in bytes.

    ``in-use`` among the flags is normal while a guest runs; off, the bitmap is inconsistent.
    """

    name: str
    granularity: int
    flags: frozenset[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageInfo:
    """One image. Sizes in bytes; what the format does not have is empty, 0 or False."""

    filename: str
    format: str
    virtual_size: int
    actual_size: int = 0
    cluster_size: int = 0
    compat: str = ""
    extended_l2: bool = False
    refcount_bits: int = 0
    lazy_refcounts: bool = False
    compression_type: str = ""
    data_file: str = ""
    data_file_raw: bool = False
    encrypted: bool = False
    corrupt: bool = False
    dirty: bool = False
    backing: str = ""
    backing_format: str = ""
    bitmaps: tuple[BitmapInfo, ...] = ()

    @property
    def can_hold_bitmaps(self) -> bool:
        """Whether QEMU can store persistent bitmaps in the image: qcow2 of version 3."""
        return self.format == "qcow2" and self.compat not in ("", "0.10")

    @classmethod
    def from_dict(cls, document: object) -> "ImageInfo":
        """Read one image of qemu-img's JSON. Raises FormatError."""
        if not isinstance(document, dict):
            raise FormatError("qemu-img info: no JSON object")
        specific = _get(document, "format-specific", dict, {})
        data: dict[str, Any] = _get(specific, "data", dict, {})
        return cls(
            filename=_get(document, "filename", str, ""),
            format=_get(document, "format", str),
            virtual_size=_get(document, "virtual-size", int),
            actual_size=_get(document, "actual-size", int, 0),
            cluster_size=_get(document, "cluster-size", int, 0),
            compat=_get(data, "compat", str, ""),
            extended_l2=_get(data, "extended-l2", bool, False),
            refcount_bits=_get(data, "refcount-bits", int, 0),
            lazy_refcounts=_get(data, "lazy-refcounts", bool, False),
            compression_type=_get(data, "compression-type", str, ""),
            data_file=_get(data, "data-file", str, ""),
            data_file_raw=_get(data, "data-file-raw", bool, False),
            encrypted=_get(document, "encrypted", bool, False),
            corrupt=_get(data, "corrupt", bool, False),
            dirty=_get(document, "dirty-flag", bool, False),
            backing=_get(document, "backing-filename", str, ""),
            backing_format=_get(document, "backing-filename-format", str, ""),
            bitmaps=tuple(_bitmap(each) for each in _get(data, "bitmaps", list, [])),
        )


def parse_chain(text: str | bytes) -> tuple[ImageInfo, ...]:
    """The images of ``qemu-img info --output json``, top first; with or without its backing chain.

    Raises FormatError.
    """
    try:
        document = documents.parse_json(text)
    except ValueError as err:
        raise FormatError(f"qemu-img info: not JSON: {err}") from err
    images = document if isinstance(document, list) else [document]
    if not images:
        raise FormatError("qemu-img info: no image")
    return tuple(ImageInfo.from_dict(each) for each in images)


def info_json(path: Path, *, format: str = "", chain: bool = False, where: Where = HERE) -> str:
    """What qemu-img of a host says about an image there, as JSON text, also beside a guest.

    ``format`` keeps qemu-img from guessing: the content of a raw image must not choose.

    Raises ProcessError.
    """
    argv = ["qemu-img", "info", "--output", "json", "--force-share"]
    if format:
        argv += ["-f", format]
    if chain:
        argv.append("--backing-chain")
    return where.output([*argv, "--", os.fspath(path.absolute())], timeout=INFO_SECONDS)


def why_locked(path: Path, *, format: str) -> ProcessError | None:
    """What keeps a reader away from an image: a QEMU that has it open for writing, on any host.

    Other failures are not of interest here: None.
    """
    argv = ["qemu-img", "info", "--output", "json", "-f", format, "--", os.fspath(path)]
    try:
        proc.output(argv, timeout=INFO_SECONDS)
    except ProcessError as err:
        return err if any(words in err.message for words in LOCKED) else None
    return None


def as_object(text: str) -> str:
    """The JSON of a chain as one object: the top image, what lies below as ``backing-chain``.

    virtnbdrestore looks for the top image's options there and knows no list.
    """
    images = documents.parse_json(text)
    if not isinstance(images, list):
        return text
    return json.dumps({**images[0], "backing-chain": images[1:]}, indent=4)


def info(path: Path, *, format: str = "") -> ImageInfo:
    """One image. Raises ProcessError, FormatError."""
    return parse_chain(info_json(path, format=format))[0]


def info_chain(path: Path, *, format: str = "") -> tuple[ImageInfo, ...]:
    """The image and all below it, top first. Raises ProcessError, FormatError."""
    return parse_chain(info_json(path, format=format, chain=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class CreateOptions:
    """How to make an image; 0, empty and False leave a choice to qemu-img.

    ``preallocation`` is one of qemu-img's words (``metadata``, ``falloc``, ``full``). ``data_file``
    is the path of a file of ours that the guest's bytes go to, as they are if ``data_file_raw``.
    """

    format: str
    cluster_size: int = 0
    compat: str = ""
    extended_l2: bool = False
    refcount_bits: int = 0
    lazy_refcounts: bool = False
    compression_type: str = ""
    preallocation: str = ""
    data_file: str = ""
    data_file_raw: bool = False

    @classmethod
    def like(cls, original: ImageInfo, *, preallocation: str = "") -> "CreateOptions":
        """Those of a qcow2 image, without its backing file, data file, bitmaps or encryption."""
        old = original.compat == "0.10"
        return cls(
            format=original.format,
            cluster_size=original.cluster_size,
            compat=original.compat,
            extended_l2=original.extended_l2,
            # a version 2 image has these as they are and refuses to be told
            refcount_bits=0 if old else original.refcount_bits,
            lazy_refcounts=original.lazy_refcounts,
            compression_type="" if old else original.compression_type,
            preallocation=preallocation,
        )

    def arguments(self) -> list[str]:
        """The value of ``-o``, one option each. Raises FormatError for one that can't be."""
        wanted: dict[str, object] = {
            "cluster_size": self.cluster_size,
            "compat": self.compat,
            "extended_l2": "on" if self.extended_l2 else "",
            "refcount_bits": self.refcount_bits,
            "lazy_refcounts": "on" if self.lazy_refcounts else "",
            "compression_type": self.compression_type,
            "preallocation": self.preallocation,
        }
        for value in wanted.values():
            if "," in str(value):  # it may come from a backup set: it must not smuggle in others
                raise FormatError(f"image option {value!r} can't be used")
        wanted["data_file"] = escaped(self.data_file)
        wanted["data_file_raw"] = "on" if self.data_file_raw else ""
        return [f"{name}={value}" for name, value in wanted.items() if value]


def create(path: Path, size: int, options: CreateOptions, *, backing: Path | None = None) -> None:
    """Make an image of ``size`` bytes; overwrites a file of that name.

    It reads as zeroes or, a qcow2 image, as ``backing``, another one in its directory, which need
    not be there yet. Raises NoSpaceError or ProcessError, FormatError for options that can't be.
    """
    below = () if backing is None else ("-u", "-F", QCOW2, "-b", _beside(backing))
    _create(path, size, options, *below)


@contextmanager
def nameless(directory: Path, size: int) -> Iterator[int]:
    """A plain qcow2 image of ``size`` bytes whose file has no name; its descriptor.

    It is gone with the last one who has it open; what it takes, with the context: a QEMU whose
    guest is paused keeps descriptors that it was told to close (7.2). Raises OSError, ProcessError.
    """
    with tempfile.TemporaryFile(dir=directory) as file:
        number = file.fileno()
        argv = ["qemu-img", "create", "-q", "-f", QCOW2, f"/dev/fd/{number}", str(size)]
        proc.output(argv, timeout=CREATE_SECONDS, pass_fds=[number])
        try:
            yield number
        finally:
            os.ftruncate(number, 0)


def create_on_server(path: Path, size: int, *, socket: Path) -> None:
    """Make a qcow2 image of ``size`` bytes on the raw export of a Unix socket's NBD server.

    The server need not be there yet. Raises NoSpaceError, ProcessError.
    """
    # a URI would have to quote the path
    server = {"type": "unix", "path": os.fspath(socket)}
    node = {"driver": "raw", "file": {"driver": "nbd", "server": server}}
    options = CreateOptions(format=QCOW2)
    _create(path, size, options, "-u", "-F", "raw", "-b", f"json:{json.dumps(node)}")


def _create(path: Path, size: int, options: CreateOptions, *more: str) -> None:
    argv = ["qemu-img", "create", "-q", "-f", options.format, *more]
    for option in options.arguments():
        argv += ["-o", option]
    try:
        proc.output([*argv, "--", os.fspath(path.absolute()), str(size)], timeout=CREATE_SECONDS)
    except ProcessError as err:
        if os.strerror(errno.ENOSPC) in err.message:
            raise NoSpaceError(f"no space for image {path}: {err.message}") from err
        raise


def _beside(backing: Path) -> str:
    """A name relative to the overlay; a colon in it must not look like a protocol."""
    return f"./{backing.name}" if ":" in backing.name else backing.name


def name_backing(path: Path, backing: Path) -> None:
    """Change the name of an overlay's backing file, which may not be there yet, and nothing else.

    Raises ProcessError.
    """
    argv = ["qemu-img", "rebase", "-q", "-u", "-f", QCOW2, "-F", QCOW2, "-b", _beside(backing)]
    proc.output([*argv, "--", os.fspath(path.absolute())], timeout=CHANGE_SECONDS)


def take_snapshot(path: Path, name: str) -> None:
    """Take an internal snapshot of an image that nobody has open. Raises ProcessError."""
    # it takes no -f, and must not guess
    filename = escaped(os.fspath(path.absolute()))
    options = f"driver={QCOW2},file.driver=file,file.filename={filename}"
    argv = ["qemu-img", "snapshot", "-q", "-c", name, "--image-opts", options]
    proc.output(argv, timeout=CHANGE_SECONDS)


def resize(path: Path, size: int, *, shrink: bool) -> None:
    """Change an image's virtual size, in bytes; what it gains reads as zeroes.

    Raises ProcessError.
    """
    argv = ["qemu-img", "resize", "-q", "-f", QCOW2, *(["--shrink"] if shrink else [])]
    proc.output([*argv, "--", os.fspath(path.absolute()), str(size)], timeout=CHANGE_SECONDS)


def name_data_file(path: Path, name: str) -> None:
    """Have a qcow2 image with a data file name that file otherwise; the file is not looked at.

    Raises ProcessError.
    """
    argv = ["qemu-img", "amend", "-q", "-f", QCOW2, "-o", f"data_file={escaped(name)}"]
    proc.output([*argv, "--", os.fspath(path.absolute())], timeout=INFO_SECONDS)


def escaped(value: str) -> str:
    """A comma is doubled in QEMU's options."""
    return value.replace(",", ",,")


def check(path: Path, *, format: str) -> None:
    """Prove that an image's metadata is sound: no cluster used twice, none lost.

    Raises ProcessError.
    """
    argv = ["qemu-img", "check", "-q", "-f", format, "--", os.fspath(path.absolute())]
    proc.output(argv, timeout=CHECK_SECONDS)


def _bitmap(document: object) -> BitmapInfo:
    if not isinstance(document, dict):
        raise FormatError("qemu-img info: bitmap is no JSON object")
    flags = _get(document, "flags", list, [])
    return BitmapInfo(
        name=_get(document, "name", str),
        granularity=_get(document, "granularity", int),
        flags=frozenset(str(flag) for flag in flags),
    )


def _get(document: Mapping[str, Any], key: str, kind: type[T], default: T | None = None) -> T:
    value = document.get(key, default)
    if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or value < 0)):  # type: ignore[operator]
        raise FormatError(f"qemu-img info: {key!r} is missing or no {kind.__name__}")
    return value
