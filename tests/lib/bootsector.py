r"""A guest without an operating system that does something: 182 bytes in a boot sector.

It greets on its first serial port; then, 18 times a second, it counts, writes the count to a
sector of its first disk (BIOS call 13h, so that the write passes the disk device and its error
policy), and says ``W`` and the count in eight hexadecimal digits, or ``E`` if the write has failed.
Count N goes to sector 2048 + 8 (N mod 1024), 128 times as a little-endian number.

This is what GNU as makes of the following for 16 bits at 7c00h (AT&T syntax)::

    xorw %ax,%ax; movw %ax,%ds; movw %ax,%es; movw %ax,%ss; movw $0x7c00,%sp; cld
    movb %dl,drive; movw $msg,%si
    1: lodsb; testb %al,%al; jz main; call putc; jmp 1b
    main: incl count
    movl count,%eax; movw $0x8000,%di; movw $128,%cx; rep stosl
    movl count,%eax; andl $0x3ff,%eax; shll $3,%eax; addl $2048,%eax; movl %eax,lba
    movb $0x43,%ah; movb $0,%al; movb drive,%dl; movw $packet,%si; int $0x13
    movb $'W',%al; jnc 2f; movb $'E',%al; 2: call putc
    movl count,%ebx; movw $8,%cx
    3: roll $4,%ebx; movb %bl,%al; andb $15,%al; addb $'0',%al; cmpb $'9',%al; jbe 4f
    addb $39,%al; 4: call putc; loop 3b
    movb $10,%al; call putc; sti; hlt; jmp main
    putc: pushw %ax; movw $0x3fd,%dx; 5: inb %dx,%al; testb $0x20,%al; jz 5b
    popw %ax; movw $0x3f8,%dx; outb %al,%dx; ret
    .balign 4; packet: .byte 16,0; .word 1,0x8000,0; lba: .long 0,0
    count: .long 0; drive: .byte 0; msg: .asciz "tiny guest\r\n"
"""

import random
import re
from pathlib import Path

from tests.lab.command import run

CODE = bytes.fromhex(
    "31c08ed88ec08ed0bc007cfc8816a87cbea97cac84c07405e86800ebf666ff06a47c66a1a47cbf0080b9800066f3ab"
    "66a1a47c6625ff03000066c1e00366050008000066a39c7cb443b0008a16a87cbe947ccd13b0577302b045e8260066"
    "8b1ea47cb9080066c1c30488d8240f04303c3976020427e80b00e2ebb00ae80400fbf4eb9a50bafd03eca82074fb58"
    "baf803eec3669010000100008000000000000000000000000000000074696e792067756573740d0a00"
)
GREETING = "tiny guest"
SECTOR = 512
FIRST = 2048
PLACES = 1024
STEP = 8
END = (FIRST + PLACES * STEP) * SECTOR
SAID = re.compile(rb"W([0-9a-f]{8})\n")


def make_disk(path: Path, size: int, seed: int) -> Path:
    """Make a qcow2 image that boots the guest; behind its sectors lies random data."""
    raw = path.with_suffix(".raw.new")
    with raw.open("wb") as file:
        file.write(CODE.ljust(SECTOR - 2, b"\0") + b"\x55\xaa")
        file.seek(END)
        file.write(random.Random(seed).randbytes(2 << 20))
        file.truncate(size)
    try:
        run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path])
    finally:
        raw.unlink()
    return path


def said(console: Path) -> list[int]:
    """The counts that the guest has said so far; it must not have said that a write failed."""
    try:
        text = console.read_bytes().replace(b"\r", b"")
    except FileNotFoundError:
        return []
    assert b"\nE" not in text, text
    return [int(each, 16) for each in SAID.findall(text)]


def counts(raw: Path) -> list[int]:
    """The counts in the sectors of a raw image, in the order of the sectors; whole ones only."""
    found = []
    with raw.open("rb") as file:
        for place in range(PLACES):
            file.seek((FIRST + place * STEP) * SECTOR)
            sector = file.read(SECTOR)
            count = int.from_bytes(sector[:4], "little")
            assert sector == sector[:4] * (SECTOR // 4), f"sector {place} is torn"
            if count:
                assert count % PLACES == place
                found.append(count)
    return found
