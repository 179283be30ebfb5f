"""One commit, whatever goes wrong on the way: the real client against the loopback Hub."""

import pytest

PUSH = """
from cortexicon.model_cards.push import PublishError, push_folder
try:
    found = list(push_folder(folder, repository, private=private))
except PublishError as error:
    found = str(error)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nA card.\n")
    (tmp_path / "part" / "x.safetensors").write_bytes(bytes(range(256)) * 4000)
    return tmp_path


def push(client, folder, repository, private=False):
    return client.run(PUSH, folder=str(folder), repository=repository, private=private)


def files(folder):
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in found.items()}


def remote(hub, name):
    held = hub.repository(name).head.files
    return {path: content for path, content in held.items() if path != ".gitattributes"}


def test_the_remote_becomes_the_folder_in_one_commit_and_stays(client, hub, folder):
    url, revision, changed = push(client, folder, "user/plain")
    assert (url, changed) == (f"{hub.url}/user/plain", True)
    assert hub.repository("user/plain").head.sha == revision
    assert remote(hub, "user/plain") == files(folder)
    assert len(hub.repository("user/plain").commits) == 2  # the Hub's own and ours

    assert push(client, folder, "user/plain") == [url, revision, False]
    (folder / "part" / "x.safetensors").unlink()
    (folder / "new.json").write_text("{}")
    assert push(client, folder, "user/plain")[2]
    assert remote(hub, "user/plain") == files(folder)
    assert len(hub.repository("user/plain").commits) == 3


def test_a_private_repository_is_private(client, hub, folder):
    push(client, folder, "user/hidden", private=True)
    assert hub.repository("user/hidden").private


@pytest.mark.parametrize(
    "values",
    [
        {"pattern": "POST .*/commit/", "status": 503, "times": 2},
        {"pattern": "POST .*/commit/", "status": 429},
        {"pattern": "PUT /lfs", "status": 500},
        {"pattern": "POST .*info/lfs/objects/batch", "status": 429},
        {"pattern": "POST .*/commit/", "drop_after": 50},
        {"pattern": "POST .*/commit/", "drop_after": 0, "late": True},
        {"pattern": "POST .*/commit/", "status": 412},
        {"pattern": "PUT /lfs", "drop_after": 1000},
        {"pattern": "POST .*preupload", "delay": 1.0},
    ],
    ids=[
        "busy",
        "too many",
        "storage fails",
        "storage is busy",
        "dropped",
        "answer lost",
        "somebody else",
        "in a file",
        "slow",
    ],
)
def test_what_fails_in_passing_is_done_again_once(client, hub, folder, fault, values):
    push(client, folder, "user/faulty")
    (folder / "part" / "x.safetensors").write_bytes(str(values).encode() * 100)
    before = len(hub.repository("user/faulty").commits)
    hub.faults.append(fault(**values))
    push(client, folder, "user/faulty")
    assert hub.faults[0].times == 0
    assert remote(hub, "user/faulty") == files(folder)
    assert len(hub.repository("user/faulty").commits) == before + 1


def test_a_hub_that_stays_away_changes_nothing_and_says_so(client, hub, folder, fault):
    push(client, folder, "user/away")
    held = remote(hub, "user/away")
    (folder / "new.json").write_text("{}")
    hub.faults.append(fault("POST .*/commit/", status=503, times=99))
    message = push(client, folder, "user/away")
    assert "503" in message
    assert "Nothing was changed there" in message
    assert remote(hub, "user/away") == held


@pytest.mark.parametrize("where", ["POST .*preupload", "PUT /lfs", "POST .*/commit/"])
def test_a_token_revoked_on_the_way_changes_nothing(client, hub, folder, fault, where):
    push(client, folder, "user/revoked")
    held = remote(hub, "user/revoked")
    (folder / "part" / "x.safetensors").write_bytes(where.encode() * 100)
    hub.faults.append(fault(where, status=401, times=99))
    message = push(client, folder, "user/revoked")
    assert "hf auth login" in message
    assert remote(hub, "user/revoked") == held
    hub.faults.clear()
    push(client, folder, "user/revoked")
    assert remote(hub, "user/revoked") == files(folder)


def test_a_bad_token_ends_in_one_line_that_does_not_hold_it(client, hub, folder):
    client.run("import os\nos.environ['HF_TOKEN'] = 'hf_nobody0123456789abcdef'")
    try:
        message = push(client, folder, "user/refused")
    finally:
        client.run("import os\nos.environ['HF_TOKEN'] = 'hf_loopback'")
    assert "hf auth login" in message
    assert "hf_nobody" not in message
    assert ("model", "user/refused") not in hub.repositories


def test_offline_mode_is_named(client, folder):
    client.run("import huggingface_hub.constants as c\nc.HF_HUB_OFFLINE = True")
    try:
        message = push(client, folder, "user/offline")
    finally:
        client.run("import huggingface_hub.constants as c\nc.HF_HUB_OFFLINE = False")
    assert "offline mode is on" in message
    assert "--dry-run" in message
