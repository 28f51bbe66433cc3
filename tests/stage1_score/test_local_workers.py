"""How a machine is shared out among workers. Their lives and deaths are in tests/integration/test_workers.py."""

import os

import pytest
import torch

from shared.config import Config
from stage1_score.engine import DeviceLost
from stage1_score.local_workers import devices_of_workers, visible_gpus
from stage1_score.worker import ShardWorker, Task


def test_each_gpu_gets_a_worker():
    assert devices_of_workers(3, ["0", "2", "5"], 1) == [{"CUDA_VISIBLE_DEVICES": name} for name in ("0", "2", "5")]
    assert devices_of_workers(2, ["GPU-a", "GPU-b", "GPU-c"], 1) == [
        {"CUDA_VISIBLE_DEVICES": "GPU-a"}, {"CUDA_VISIBLE_DEVICES": "GPU-b"},
    ]  # fmt: skip


def test_groups_of_gpus_are_whole():
    found = devices_of_workers(4, ["0", "1", "2", "3", "4"], 2)
    assert found == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert devices_of_workers(1, ["0"], 2) == []


def test_workers_on_a_cpu_share_its_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    found = devices_of_workers(2, [], 1)
    assert [worker["OMP_NUM_THREADS"] for worker in found] == ["2", "2"]
    assert [worker["VLLM_CPU_OMP_THREADS_BIND"] for worker in found] == ["0,2", "1,3"]
    assert [worker["OMP_NUM_THREADS"] for worker in devices_of_workers(8, [], 1)] == ["1"] * 8


@pytest.mark.parametrize(
    ("named", "count", "expected"),
    [(None, 2, ["0", "1"]), ("3, 5", 2, ["3", "5"]), ("0,1,-1,2", 2, ["0", "1"]), ("", 0, []),
     ("GPU-4f2a,GPU-99", 2, ["GPU-4f2a", "GPU-99"])],
)  # fmt: skip
def test_visible_gpus_are_those_that_cuda_sees(
    monkeypatch: pytest.MonkeyPatch, named: str | None, count: int, expected: list[str]
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == expected


def test_a_worker_whose_gpu_is_gone_does_not_score_on_the_cpu(manifest_with):
    config = Config.model_validate({"score": {"device": "cuda"}})
    with pytest.raises(DeviceLost, match="sees no CUDA device"):
        ShardWorker(Task(config, manifest_with()), "0")
