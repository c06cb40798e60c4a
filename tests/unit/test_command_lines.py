"""What a point may tell of QEMU's command line."""

import pytest

from nbdbackupd.ops.domain.qemu import sifted

JSON = '{"driver":"http","url":"http://u:p@h/a","password-secret":"s1","x":[{"password":"q"}]}'


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("secret,id=s0,data=a,,b=c,format=raw", "secret,id=s0,data=***,format=raw"),
        ('{"qom-type":"secret","id":"s","data":"z"}',
         '{"qom-type": "secret", "id": "s", "data": "***"}'),
        (JSON, '{"driver": "http", "url": "http://***@h/a", "password-secret": "s1", '
         '"x": [{"password": "***"}]}'),
        ("file=rbd:pool/i:id=x:key=AQ\\:Q==:conf=y,if=none",
         "file=rbd:pool/i:id=x:key=***:conf=y,if=none"),
        ("file=https://me:pw@host/x,file.cookie=a", "file=https://***@host/x,file.cookie=***"),
        ("port=1,password=x", "port=1,password=***"),
        ("name=opt/a,string=s", "name=opt/a,string=***"),
        ("{broken,password=x", "{broken,password=***"),
        ("virtio-blk-pci,drive=a,id=key", "virtio-blk-pci,drive=a,id=key"),
        ("file=/a=b/c:d,if=none,password-secret=s0", "file=/a=b/c:d,if=none,password-secret=s0"),
        ("nbd://host:10809/x", "nbd://host:10809/x"),
        ("value=x", "value=x"),
    ],
)  # fmt: skip
def test_secrets_are_left_out(word: str, told: str) -> None:
    assert sifted(["qemu", word]) == ["qemu", told]


def test_options_of_which_more_is_secret() -> None:
    assert sifted(["-smbios", "type=11,value=x"]) == ["-smbios", "type=11,value=***"]
