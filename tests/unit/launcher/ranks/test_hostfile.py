"""Hostfiles are parsed as by the deepspeed command, and every rank is numbered once."""

import os
import re
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import LaunchError, MegabackError, NonFiniteError, RankLostError
from launcher.ranks.host_ranks import code_of
from launcher.ranks.hostfile import (
    Host,
    host_rank_names,
    passed_environment,
    read_hostfile,
    ssh_command,
)
from launcher.ranks.local import CONNECTION_LOST, verdict
from megaback.distributed.rendezvous import require_known
from tests.helpers.hostile_files import bounded

HOSTS = st.lists(
    st.builds(
        Host, st.from_regex(r"[a-z][a-z0-9.-]{0,10}[a-z0-9]", fullmatch=True), st.integers(1, 64)
    ),
    min_size=1,
    max_size=64,
    unique_by=lambda host: host.name,
)


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    return tmp_path / "hosts"


@given(hosts=HOSTS)
def test_a_hostfile_reads_back(hosts: list[Host], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("hosts") / "hosts"
    lines = [f"  {host.name}\t slots={host.slots}  # one\n" for host in hosts]
    path.write_text("# all of them\n\n" + "".join(lines))

    if sum(host.is_local for host in hosts) < 2:
        assert read_hostfile(path) == hosts


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no host"),
        ("# nobody\n", "names no host"),
        ("a slots=2\nb\n", r"line 2: 'b' is not like `node1 slots=8`"),
        ("a slots=0", "line 1: 'a slots=0' is not like"),
        ("a slots=2 max_slots=4", "is not like"),
        ("-oProxyCommand=reboot slots=1", "is not like"),
        ("a slots=10000", "is not like"),
        (f"a slots={'9' * 5000}", "is not like"),
        ("a slots=\u0665", "is not like"),
        ("a;reboot slots=1", "is not like"),
        ("$(reboot) slots=1", "is not like"),
        ("a slots=1\na slots=2", "line 2: a is listed twice"),
        ("#" * (2 << 20), "has more than 1,048,576 bytes"),
        ("localhost slots=1\n127.0.0.1 slots=1", r"line 2: 127\.0\.0\.1 is this machine, as is an"),
    ],
)
def test_an_invalid_hostfile_is_refused_with_its_line(text: str, says: str, hostfile: Path) -> None:
    hostfile.write_text(text)

    with pytest.raises(LaunchError, match=says):
        read_hostfile(hostfile)


def test_a_missing_hostfile_is_named(hostfile: Path) -> None:
    with pytest.raises(
        LaunchError, match=f"cannot read the hostfile {re.escape(str(hostfile))}: No"
    ):
        read_hostfile(hostfile)


@given(hosts=HOSTS)
def test_every_rank_is_numbered_once_in_the_order_of_the_hosts(hosts: list[Host]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", "12345")
        names = host_rank_names(hosts)

    flat = [one for of_host in names for one in of_host]
    assert [one["RANK"] for one in flat] == [str(rank) for rank in range(len(flat))]
    assert {one["WORLD_SIZE"] for one in flat} == {str(sum(host.slots for host in hosts))}
    assert {(one["MASTER_ADDR"], one["MASTER_PORT"]) for one in flat} == {("127.0.0.1", "12345")}
    for host, of_host in zip(hosts, names, strict=True):
        assert [one["LOCAL_RANK"] for one in of_host] == [str(n) for n in range(host.slots)]
        assert {(one["LOCAL_SIZE"], one["MEGABACK_HOST"]) for one in of_host} == {
            (str(host.slots), host.name)
        }


def test_ranks_meet_at_the_first_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    own = socket.gethostname()

    def address(*names: str) -> str:
        return host_rank_names([Host(name, 1) for name in names])[0][0]["MASTER_ADDR"]

    assert address("localhost") == "127.0.0.1"
    assert address("me@127.0.0.2", "localhost") == "127.0.0.2"
    assert address("localhost", "127.0.0.2") == own
    with pytest.raises(LaunchError, match=r"no-such-host\.invalid of the first host is not known"):
        address("no-such-host.invalid", "localhost")
    for name in ("a..b", "a" * 64):  # names that cannot be resolved
        with pytest.raises(LaunchError, match=r"of the first host is not known"):
            address(name, "localhost")
        with pytest.raises(LaunchError, match="set MASTER_ADDR"):
            require_known(name)


def test_ssh_is_the_users_command_without_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGABACK_SSH", "ssh -F 'a file'")

    assert ssh_command()[:3] == ["ssh", "-F", "a file"]
    assert "BatchMode=yes" in ssh_command()


@pytest.mark.parametrize("text", ["", "no-such-ssh -x", "ssh 'open"])
def test_an_invalid_ssh_command_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGABACK_SSH", text)

    with pytest.raises(LaunchError, match="MEGABACK_SSH"):
        ssh_command()


def test_only_settings_of_libraries_are_passed_on() -> None:
    passed = {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4", "WANDB_API_KEY": "x", "PYTHONPATH": "p"}
    passed |= {"PYTORCH_ALLOC_CONF": "x", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "FI_PROVIDER": "efa"}
    passed |= {"FSSPEC_SFTP_PASSWORD": "x", "MEGABACK_SECRET_SAS": "x", "NETRC": "file"}
    own = {"PATH": "/bin", "HOME": "/root", "SSH_AUTH_SOCK": "s", "CUDA_VISIBLE_DEVICES": "3"}

    assert passed_environment(passed | own) == passed


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([], 0),
        ([0, 0], 0),
        ([0, 1, 0], 1),
        ([-9, RankLostError.exit_code], RankLostError.exit_code),
        ([1, NonFiniteError.exit_code, 51], NonFiniteError.exit_code),
        ([-9, 1], 137),
        ([0, -15], 143),
    ],
)
def test_the_ranks_of_a_host_have_one_code(codes: list[int], expected: int) -> None:
    assert code_of(codes) == expected


@pytest.mark.parametrize(
    ("codes", "error", "says"),
    [
        ([0, -9], RankLostError, r"the ranks on b were killed by SIGKILL .*memory: see dmesg\)"),
        ([1, -9], LaunchError, r"the ranks on a ended with code 1 .*at the same paths there\)"),
        ([0, CONNECTION_LOST], LaunchError, "ssh could not connect to b, or lost the connection"),
    ],
)
def test_the_host_of_ranks_that_died_without_a_reason_is_named(
    codes: list[int], error: type[MegabackError], says: str
) -> None:
    with pytest.raises(error, match=says):
        verdict(codes, [], None, ["a", "b"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("n1 slots=1025", "1 to 1024 slots"),
        ("n1 slots=" + "9" * 5000, "1 to 1024 slots"),
        ("n" * 100_000 + " slots=?", "is not like"),
        ("".join(f"n{number} slots=1024\n" for number in range(65)), "more than 65,536 slots"),
        ("#" * (2 << 20), "more than 1,048,576 bytes"),
        ("".join(f"n{number} slots=1\n" for number in range(60_000)) + "n1 slots=1", "twice"),
    ],
    ids=["slots", "digits", "a name", "all slots", "bytes", "many"],
)
def test_a_hostfile_of_any_size_is_refused_at_once(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with bounded(), pytest.raises(LaunchError, match=said) as error:
        read_hostfile(path)
    assert len(str(error.value)) < 500


def test_a_hostfile_may_be_a_pipe_of_bounded_size() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"n1 slots=2\n")
    os.close(writer)
    assert read_hostfile(Path(f"/dev/fd/{reader}")) == [Host("n1", 2)]
    os.close(reader)
    with bounded(), pytest.raises(LaunchError):
        read_hostfile(Path("/dev/zero"))
