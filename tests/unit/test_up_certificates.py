"""Which certificates `up` gives to whom: the fleet file's, or the options', and what is wrong with them at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trustme

from infermesh.cli import BAD_USAGE, Failure
from infermesh.cli.up import certificates
from tests.kit.rendering import fleet_of


def folder_of(path: Path) -> dict[str, Any]:
    path.mkdir()
    authority = trustme.CA()
    made = authority.issue_cert("mesh.internal")
    made.cert_chain_pems[0].write_to_path(path / "tls.crt")
    made.private_key_pem.write_to_path(path / "tls.key")
    authority.cert_pem.write_to_path(path / "ca.crt")
    return {"name": "mesh.internal", "folder": str(path)}


def test_the_file_says_and_options_win(tmp_path: Path) -> None:
    door, inside, other = (folder_of(tmp_path / name) for name in ("door", "inside", "other"))
    fleet = fleet_of(tls={"gateway": door, "instances": inside})
    own, files = certificates(fleet, None, None)
    assert own and (own.cert, own.key, own.name) == (
        f"{door['folder']}/tls.crt",
        f"{door['folder']}/tls.key",
        "mesh.internal",
    )
    assert files and (files.ca, files.name) == (f"{inside['folder']}/ca.crt", "mesh.internal")
    option = Path(other["folder"])
    won, _ = certificates(fleet, option / "tls.crt", option / "tls.key")
    assert won and (won.cert, won.key, won.name) == (f"{option}/tls.crt", f"{option}/tls.key", ""), "for its address"
    assert certificates(fleet_of(), None, None) == (None, None)


@pytest.mark.parametrize(("missing", "why"), [("tls.key", "No such file"), ("ca.crt", "No such file")])
def test_what_cannot_be_used_is_told_before_anything_starts(tmp_path: Path, missing: str, why: str) -> None:
    inside = folder_of(tmp_path / "inside")
    (tmp_path / "inside" / missing).unlink()
    with pytest.raises(Failure, match=why) as told:
        certificates(fleet_of(tls={"instances": inside}), None, None)
    assert told.value.code == BAD_USAGE and missing in str(told.value)
