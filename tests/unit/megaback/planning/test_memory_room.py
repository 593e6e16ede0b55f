"""Memory check before a run starts, and the limits of control groups."""

from pathlib import Path

import psutil
import pytest

from data_pipeline.errors import NotEnoughMemoryError
from megaback.config import Config
from megaback.planning.data_facts import RunFacts
from megaback.planning.devices import Device
from megaback.planning.host_memory import cgroup_limits, host_memory_bytes
from megaback.planning.memory_room import AvailableMemory, certain_bytes, require_memory
from megaback.planning.plan import memory_of
from megaback.planning.run_settings import Cluster
from tests.helpers.run_config import run_config

VOCAB_SIZE = 8_888
LARGE = {"num_layers": 24, "width": 2048, "num_heads": 16}


def config_of(tmp_path: Path, **sections: object) -> Config:
    batch = {"context_tokens": 1024, "global_batch_rows": 32, "micro_batch_rows": 8}
    return run_config(
        tmp_path / "run", **{"model": LARGE, "batch": batch, "zero": {"stage": 1}, **sections}
    )


def rooms(device: str, gigabytes: float, hosts: tuple[int, ...]) -> list[AvailableMemory]:
    """Available memory of ranks: `hosts` is the number of ranks on each host."""
    return [
        AvailableMemory(f"n{host}", device, int(gigabytes * 1e9))
        for host, ranks in enumerate(hosts)
        for _ in range(ranks)
    ]


def needed(config: Config, device: str, ranks: int) -> float:
    facts = RunFacts(
        vocab_size=VOCAB_SIZE, attended_tokens=0.0, total_tokens=None, shard_bytes=None, notes=()
    )
    cluster = Cluster(
        1,
        ranks,
        Device(
            name=device,
            memory_bytes=0.0,
            bf16_flops=None,
            fp32_flops=None,
            link_bytes=0.0,
            network_bytes=0.0,
        ),
    )
    return certain_bytes(
        memory_of(config, facts, cluster).parts, config.training.may_compile_on(device == "cpu")
    )


@pytest.mark.parametrize("device", ["cpu", "NVIDIA H100 80GB HBM3"])
@pytest.mark.parametrize("hosts", [(1,), (2,), (2, 2), (3, 1)])
def test_a_run_that_fits_is_accepted_and_a_larger_one_refused(
    device: str, hosts: tuple[int, ...], tmp_path: Path
) -> None:
    config = config_of(tmp_path)
    crowded = max(hosts) if device == "cpu" else 1  # a host's memory is shared
    gigabytes = needed(config, device, sum(hosts)) * crowded / 1e9

    require_memory(config, VOCAB_SIZE, rooms(device, gigabytes * 1.001, hosts))
    with pytest.raises(NotEnoughMemoryError) as caught:
        require_memory(config, VOCAB_SIZE, rooms(device, gigabytes * 0.999, hosts))
    assert f"for each of {sum(hosts)} processes" in str(caught.value)
    assert device in str(caught.value)
    assert "--nodes" not in str(caught.value)  # not an option of this command


def test_the_suggested_smallest_change_fits(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    there = rooms("cpu", 38, (1,))

    with pytest.raises(NotEnoughMemoryError, match=r"change that fits is batch.micro_batch_rows=4"):
        require_memory(config, VOCAB_SIZE, there)

    batch = config.batch.model_copy(update={"micro_batch_rows": 4})
    require_memory(config.model_copy(update={"batch": batch}), VOCAB_SIZE, there)


def test_the_memory_check_can_be_disabled(tmp_path: Path) -> None:
    config = config_of(tmp_path, hardware={"memory_check": False})  # as YAML reads `off`

    require_memory(config, VOCAB_SIZE, rooms("cpu", 0.001, (1,)))


def test_the_lower_bound_excludes_activations_of_compiled_code(tmp_path: Path) -> None:
    plain = config_of(tmp_path)
    training = plain.training.model_copy(update={"compile": "on"})
    compiled = plain.model_copy(update={"training": training})

    assert needed(compiled, "cpu", 1) < needed(plain, "cpu", 1)


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


CASES: dict[str, tuple[str, dict[str, str], list[int]]] = {
    "version 2": (
        "0::/job/step\n",
        {"job/step/memory.max": "max\n", "job/memory.max": "4096\n"},
        [4096],
    ),
    "version 1": (
        "5:cpu,cpuacct:/x\n4:memory:/slurm/job\n",
        {
            "memory/slurm/job/memory.limit_in_bytes": "8192\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
        [8192, 9223372036854771712],
    ),
    "a container": ("0::/outside/of/it\n", {"memory.max": "2048\n"}, [2048]),
    "none": ("0::/\n", {}, []),
}


@pytest.mark.parametrize(("listing", "files", "limits"), CASES.values(), ids=CASES)
def test_limits_of_containers_and_jobs_are_found(
    listing: str, files: dict[str, str], limits: list[int], tmp_path: Path
) -> None:
    (tmp_path / "cgroup").write_text(listing)
    mounted = write(tmp_path / "mounted", files)

    assert cgroup_limits(tmp_path / "cgroup", mounted) == limits


def test_a_machine_without_control_groups_has_no_limits(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path / "absent", tmp_path) == []
    assert 0 < host_memory_bytes() <= psutil.virtual_memory().total


def test_a_node_holds_all_state_of_hierarchical_sharding(tmp_path: Path) -> None:
    flat = config_of(tmp_path)
    by_node = config_of(tmp_path, zero={"stage": 1, "hierarchical": True})
    there = 1.07 * needed(flat, "cpu", 8) * 4 / 1e9  # the memory of a host is shared by its ranks

    require_memory(flat, VOCAB_SIZE, rooms("cpu", there, (4, 4)))
    with pytest.raises(NotEnoughMemoryError, match=r"fits is zero\.hierarchical=false"):
        require_memory(by_node, VOCAB_SIZE, rooms("cpu", there, (4, 4)))
