"""How an error is told."""

from nbdbackupd.errors import DomainError


def test_fields_are_told_once() -> None:
    assert str(DomainError("no domain vm1", domain="vm1", reason="gone")) == (
        "no domain vm1 (reason=gone)"
    )
    assert str(DomainError("no domain vm12", domain="vm1")) == "no domain vm12 (domain=vm1)"
    assert str(DomainError("no domain vm1", domain="vm1")) == "no domain vm1"
    assert str(DomainError("it failed", offset=0)) == "it failed (offset=0)"
