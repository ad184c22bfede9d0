import hashlib

import pytest

from infermesh.errors import MeshError, Reason
from services.chassis.keys import Keys, load_keys
from services.chassis.settings import InstanceSettings, bind_fault


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(
        "version: 1\nkeys:\n"
        f"  - {{sha256: {digest('s3cret')}, tenant: acme, class: core, models: [chat]}}\n"
        f"  - {{sha256: {digest('boss')}, tenant: ops, role: operator}}\n"
    )
    return load_keys(path)


def test_a_key_names_its_tenant(keys):
    key = keys.who("Bearer s3cret")
    assert (key.tenant, key.klass, key.models, key.role) == ("acme", "core", ("chat",), "client")


@pytest.mark.parametrize("value", [None, "", "Bearer", "Bearer  ", "Basic s3cret", "Bearer wrong", "s3cret"])
def test_no_known_key_no_entry(keys, value):
    with pytest.raises(MeshError) as caught:
        keys.who(value)
    assert caught.value.reason is Reason.UNAUTHENTICATED
    assert "s3cret" not in str(caught.value)


def test_only_operators_change_the_mesh(keys):
    keys.operator("Bearer boss")
    with pytest.raises(MeshError) as caught:
        keys.operator("Bearer s3cret")
    assert caught.value.reason is Reason.PERMISSION_DENIED


def test_an_open_process_asks_nobody():
    assert Keys().who(None) is None
    Keys().operator(None)


def test_a_key_stands_there_once(tmp_path):
    path = tmp_path / "keys.yaml"
    key = digest("a")
    path.write_text(f"version: 1\nkeys:\n  - {{sha256: {key}, tenant: a}}\n  - {{sha256: {key}, tenant: b}}\n")
    with pytest.raises(ValueError, match=r"keys\.1 is the same key as keys\.0"):
        load_keys(path)
    path.write_text("version: 1\nkeys:\n  - {sha256: short, tenant: a}\n")
    with pytest.raises(ValueError, match=r"keys\.0\.sha256: ") as caught:
        load_keys(path)
    assert "at least 1 item" not in str(caught.value)  # there is one, and it is wrong
    path.write_bytes(b"version: \xff")
    with pytest.raises(ValueError, match=r"keys\.yaml: not YAML"):
        load_keys(path)


def test_every_fault_of_the_file_is_told_at_once(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text("version: 1\nkeys:\n  - {sha256: abc, tenant: a}\n  - {sha256: def, tenant: b, colour: red}\n")
    with pytest.raises(ValueError) as caught:
        load_keys(path)
    text = str(caught.value)
    assert "keys.0.sha256" in text
    assert "keys.1.sha256" in text
    assert "keys.1.colour" in text


@pytest.mark.parametrize(
    ("host", "keys", "insecure", "allowed"),
    [
        ("127.0.0.1", False, False, True),
        ("localhost", False, False, True),
        ("::1", False, False, True),
        ("0.0.0.0", False, False, False),
        ("10.0.0.4", False, False, False),
        ("0.0.0.0", True, False, True),
        ("0.0.0.0", False, True, True),
    ],
)
def test_an_open_bind_needs_keys_or_a_word(host, keys, insecure, allowed):
    assert (bind_fault(host, keys=keys, insecure=insecure) == "") is allowed


def test_settings_tell_every_fault():
    with pytest.raises(ValueError) as caught:
        InstanceSettings(kind="llm", model="m", listen="0.0.0.0:1", context=(5, 5), advertise="h:0")
    text = str(caught.value)
    assert "--insecure" in text
    assert "context" in text
    assert "advertise" in text
