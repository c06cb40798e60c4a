"""``nbdbackupctl map`` and ``nbdbackupctl unmap``."""

import argparse
import ipaddress
import logging
import shlex
import time
from pathlib import Path
from typing import Final

from nbdbackupd.app import named, signals
from nbdbackupd.app.arguments import (
    Arguments,
    add_point,
    add_sequence,
    add_source,
    chosen,
    names,
    size,
)
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import Registry
from nbdbackupd.errors import WARNED, FormatError, RepositoryError, UsageError
from nbdbackupd.ops.map import map as maps
from nbdbackupd.ops.map import mapped
from nbdbackupd.ops.map.map import Mapping, MapRequest, Serving
from nbdbackupd.plain import versioned
from nbdbackupd.units import human_size, local_time

MAP: Final = """\
Serve the disks of a restore point over NBD, read-only, without restoring them: each disk is ready
at once and is read by qemu-img, nbdcopy or QEMU. Ends on Ctrl-C or 'unmap'.
"""
UNMAP: Final = "End maps that 'map' has made, and tell when nothing of them is left."
POLL_SECONDS: Final = 0.2
DEFAULT_CACHE: Final = 64 << 20

log = logging.getLogger(__name__)


def register(verbs: Registry) -> None:
    """Add both verbs."""
    parser = verbs.add("map", MAP)
    add_source(parser, optional=True)
    parser.add_argument(
        "-d", "--disk", metavar="DISKS", type=names, default=(), help="only these disks (vda,vdb)"
    )
    _add_choice(parser)
    _add_place(parser)
    parser.add_argument(
        "--writable", action="store_true", help="take writes, too, and forget them at the end"
    )
    parser.add_argument(
        "--prove",
        action="store_true",
        help="prove each block before any part of it is given out, not only where it costs nothing",
    )
    parser.add_argument(
        "--cache",
        metavar="SIZE",
        type=size,
        default=DEFAULT_CACHE,
        help="memory for unpacked blocks of each disk (default: 64M)",
    )
    parser.add_argument(
        "--detach", action="store_true", help="return when all is ready; 'unmap' ends it"
    )
    parser.add_argument("--list", action="store_true", help="only list what is mapped")
    parser.set_defaults(run=run_map)
    parser = verbs.add("unmap", UNMAP)
    parser.add_argument(
        "what",
        metavar="WHAT",
        nargs="?",
        default="",
        help="id, socket, device or set of the map, or domain",
    )
    parser.add_argument("--all", action="store_true", help="all maps")
    parser.set_defaults(run=run_unmap)


def _add_choice(parser: argparse.ArgumentParser) -> None:
    add_sequence(add_point(parser))


def _add_place(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--socket",
        metavar="PATH",
        type=Path,
        help="Unix socket; a directory for several disks (default: below the runtime directory)",
    )
    where.add_argument(
        "--tcp",
        metavar="ADDRESS:PORT",
        type=endpoint,
        help="serve over TCP; each further disk takes the next port",
    )
    where.add_argument(
        "--device", metavar="DEVICE", type=Path, help="attach one disk to this /dev/nbdN"
    )
    parser.add_argument(
        "--tls-certificates",
        metavar="DIR",
        type=Path,
        help="with --tcp: demand TLS and a certificate of each client; directory with "
        "ca-cert.pem, server-cert.pem, server-key.pem",
    )
    parser.add_argument(
        "--tls-psk",
        metavar="FILE",
        type=Path,
        help="with --tcp: demand TLS and a key of each client; file of lines USER:HEXKEY",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="with --tcp: let everybody read who gets there, also all accounts of this host",
    )


def endpoint(text: str) -> tuple[str, int]:
    """``127.0.0.1:10809`` or ``[::1]:10809``, for argparse."""
    address, colon, port = text.rpartition(":")
    try:
        found = ipaddress.ip_address(address.removeprefix("[").removesuffix("]"))
        number = int(port) if port.isascii() and port.isdigit() else 0
    except ValueError:
        number = 0
    if not colon or not 0 < number < 1 << 16:
        raise argparse.ArgumentTypeError(
            f"not an address and a port: {text!r} (examples: 127.0.0.1:10809, [::1]:10809)"
        )
    return str(found), number


def run_map(args: Arguments, context: Context) -> int:
    """Carry ``map`` out; ends with 0 when it is asked to end."""
    if args.list:
        return _list(context)
    if args.source is None and not args.sequence:
        raise UsageError("map takes a SOURCE, or --sequence FILES")

    request = _request(args, context)
    if request.tcp and request.insecure:
        log.info("%s can read the disks, as --insecure says", maps.readers(request.tcp[0]))
    with signals.listen() as cancel:
        if args.detach:
            up = maps.detach(request, cancelled=cancel.check)
            _show(up, context, is_detached=True)
            return WARNED if up.warnings else 0
        with maps.serving(request, cancelled=cancel.check) as up:
            _show(up, context, is_detached=False)
            damaged = _watch(up, cancel)
    if damaged:
        return FormatError.exit_code
    return WARNED if up.warnings else 0


def _request(args: Arguments, context: Context) -> MapRequest:
    source = None
    sequence = named.sequence_of(args.source, args.sequence, context)
    if args.source is not None and not sequence:
        source = named.set_of(args.source, context, chosen(args))
    return MapRequest(
        runtime_dir=context.host.runtime_dir,
        source=source,
        sequence=sequence,
        choice=chosen(args),
        disks=args.disk,
        socket=args.socket.absolute() if args.socket else None,
        tcp=args.tcp,
        certificates=args.tls_certificates.absolute() if args.tls_certificates else None,
        psk=args.tls_psk.absolute() if args.tls_psk else None,
        insecure=args.insecure,
        device=args.device,
        writable=args.writable,
        prove=args.prove,
        cache_bytes=args.cache,
    )


def _show(up: Serving, context: Context, *, is_detached: bool) -> None:
    for warning in up.warnings:
        log.warning("%s", warning)
    document = versioned(map=up.mapping.to_json(), warnings=up.warnings)
    context.show(document, render(up.mapping, is_detached=is_detached))
    # whoever reads us through a pipe waits for it
    print(end="", flush=True)


def _point(point: str, domain: str) -> str:
    whose = f" of {domain}" if domain else ""
    return f"point {point}{whose}" if point else ""


def render(mapping: Mapping, *, is_detached: bool) -> str:
    """What is served, and what to do with it, for people."""
    of = _point(mapping.point, mapping.domain) or mapping.source
    lines = [f"map {mapping.id}: {of}, as of {local_time(mapping.created)}"]
    for disk in mapping.disks:
        device = f"  {disk.device}" if disk.device else ""
        lines.append(f"  {disk.target:<6} {human_size(disk.size):>10}  {disk.uri}{device}")
    first = shlex.quote(mapping.disks[0].uri)
    lines += [f"try: qemu-img info {first}", f"     nbdcopy {first} disk.raw"]
    end = f"'nbdbackupctl unmap {mapping.id}'" + ("" if is_detached else " or Ctrl-C")
    return "\n".join([*lines, f"{end} ends it"])


def _watch(up: Serving, cancel: signals.Cancel) -> int:
    """Wait for the signal to end; how many damaged blocks were met."""
    while not cancel.signum:
        up.check()
        time.sleep(POLL_SECONDS)
    return up.check()


def _list(context: Context) -> int:
    found = mapped.known(context.host.runtime_dir)
    document = versioned(maps=[each.to_json() for each in found])
    lines = []
    for each in found:
        of = _point(each.point, each.domain)
        lines.append(f"{each.id}  {each.purpose}  {each.source}  {of}")
        lines += [f"  {disk.target:<6} {disk.uri}" for disk in each.disks]
    context.show(document, "\n".join(lines) or "nothing is mapped")
    return 0


def run_unmap(args: Arguments, context: Context) -> int:
    """Carry ``unmap`` out."""
    if bool(args.what) == args.all:
        raise UsageError("unmap takes either what to end, or --all; 'map --list' shows all maps")
    runtime_dir = context.host.runtime_dir
    found = mapped.known(runtime_dir)
    chosen = [each for each in found if args.all or _is_meant(each, args.what)]
    if not args.all and not chosen:
        raise RepositoryError(f"no map is, or serves, {args.what}: 'map --list' shows all")
    others = [each for each in chosen if each.purpose != "map"]
    if others and not args.all:
        keeper = others[0].keeper
        who = f"process {keeper}" if keeper else "'nbdbackupctl boot --list' shows how"
        raise UsageError(
            f"map {others[0].id} is of '{others[0].purpose}', which must end it: {who}"
        )
    ended = [each for each in chosen if each not in others]
    for each in ended:
        mapped.end(each, runtime_dir)
    document = versioned(ended=[each.id for each in ended])
    context.show(document, "\n".join(f"ended map {each.id}" for each in ended))
    return 0


def _is_meant(mapping: Mapping, what: str) -> bool:
    path = Path(what).absolute()
    places = [place for disk in mapping.disks for place in (disk.socket, disk.device)]
    uris = [disk.uri for disk in mapping.disks]
    return what in (mapping.id, mapping.domain, *uris) or path in (Path(mapping.source), *places)
