"""qemu-img as typed calls, against the real one."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbackupd.errors import FormatError, NbdbackupError, ProcessError
from nbdbackupd.qemu import image
from nbdbackupd.qemu.image import BitmapInfo, CreateOptions, ImageInfo

pytestmark = pytest.mark.component

MIB = 1 << 20


def qemu_img(*argv: object) -> None:
    subprocess.run(["qemu-img", *map(str, argv)], check=True, stdout=subprocess.DEVNULL)


def test_all_that_qcow2_tells(tmp_path: Path) -> None:
    path = tmp_path / "a,b c.qcow2"
    options = CreateOptions(
        format="qcow2", cluster_size=128 << 10, compat="1.1", extended_l2=True, refcount_bits=32,
        lazy_refcounts=True, compression_type="zstd",
    )  # fmt: skip
    image.create(path, 1000001 * 512, options)
    qemu_img("bitmap", "--add", "-g", 65536, path, "cp.1")
    found = image.info(path)
    assert found == ImageInfo(
        filename=str(path), format="qcow2", virtual_size=1000001 * 512,
        actual_size=found.actual_size, cluster_size=128 << 10, compat="1.1", extended_l2=True,
        refcount_bits=32, lazy_refcounts=True, compression_type="zstd",
        bitmaps=(BitmapInfo("cp.1", 65536, frozenset({"auto"})),),
    )  # fmt: skip
    assert found.can_hold_bitmaps
    assert CreateOptions.like(found) == options


def test_version_2_can_hold_no_bitmaps(tmp_path: Path) -> None:
    path = tmp_path / "old.qcow2"
    image.create(path, MIB, CreateOptions(format="qcow2", compat="0.10"))
    found = image.info(path)
    assert not found.can_hold_bitmaps
    image.create(path, MIB, CreateOptions.like(found))
    assert image.info(path) == found


def test_chain_and_data_file(tmp_path: Path) -> None:
    data = tmp_path / "data.raw"
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", base, "1M")
    qemu_img("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", top)
    chain = image.info_chain(top)
    assert [each.filename for each in chain] == [str(top), str(base)]
    assert chain[0].backing == "base.qcow2"
    assert chain[0].backing_format == "qcow2"
    assert chain[1].data_file == str(data)
    assert chain[1].data_file_raw
    assert image.info(top) == chain[0]
    assert image.parse_chain(image.info_json(top, chain=True)) == chain


def test_encrypted(tmp_path: Path) -> None:
    path = tmp_path / "e.qcow2"
    # not luks: to tune that, qemu-img measures the processor, and fails where clocks are coarse
    qemu_img(
        "create", "-f", "qcow2", "--object", "secret,id=s,data=abc",
        "-o", "encrypt.format=aes,encrypt.key-secret=s", path, "1M",
    )  # fmt: skip
    assert image.info(path).encrypted
    assert not image.info(path).corrupt


def test_raw_content_does_not_choose_the_format(tmp_path: Path) -> None:
    """A guest that writes a qcow2 header into its raw disk gains nothing by it."""
    path = tmp_path / "guest.raw"
    image.create(path, MIB, CreateOptions(format="qcow2"))
    sectors = -(-path.stat().st_size // 512)
    assert image.info(path).format == "qcow2"
    assert image.info(path, format="raw").format == "raw"
    assert image.info(path, format="raw").virtual_size == sectors * 512


def test_image_in_use(tmp_path: Path) -> None:
    path = tmp_path / "used.qcow2"
    image.create(path, MIB, CreateOptions(format="qcow2"))
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write(b"write 0 4k\n")
        holder.stdin.flush()
        assert b"wrote" in holder.stdout.readline()
        refused = subprocess.run(["qemu-img", "info", path], capture_output=True, check=False)
        assert refused.returncode != 0, "the image is not locked: the test proves nothing"
        assert image.info(path).virtual_size == MIB
        holder.stdin.close()


def test_errors_are_typed(tmp_path: Path) -> None:
    with pytest.raises(ProcessError, match="No such file"):
        image.info(tmp_path / "nosuch")
    with pytest.raises(ProcessError):
        image.create(tmp_path / "x", MIB, CreateOptions(format="qcow2", cluster_size=1000))
    with pytest.raises(FormatError, match="can't be used"):
        image.create(
            tmp_path / "x", MIB, CreateOptions(format="qcow2", compat="1.1,backing_file=/etc/x")
        )
    assert not (tmp_path / "x").exists()


def test_preallocation(tmp_path: Path) -> None:
    path = tmp_path / "p.qcow2"
    plain = CreateOptions(format="qcow2")
    image.create(path, 4 * MIB, replace(plain, preallocation="falloc"))
    assert path.stat().st_blocks * 512 >= 4 * MIB


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "format",
                        "virtual-size",
                        "format-specific",
                        "data",
                        "bitmaps",
                        "name",
                        "flags",
                        "cluster-size",
                        "encrypted",
                        "backing-filename",
                    ]
                ),
                inner,
            )
        ),
    )
)
def test_hostile_json(document: object) -> None:
    """What comes from a set may be anything: a value or a FormatError, nothing else."""
    try:
        assert image.parse_chain(json.dumps(document))
    except NbdbackupError as err:
        assert isinstance(err, FormatError)  # noqa: PT017
