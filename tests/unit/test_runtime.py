"""What a driver leaves behind of Ray: nothing of its own, what a user chose, and nothing on the terminal. With a real Ray: tests/contract."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest
import torch

from workers import runtime, scratch
from workers.devices import choose_device
from workers.errors import ClusterError, ExecutionError, GpuFailedError, StaleCacheError
from workers.execution import ExecutionSettings


@pytest.fixture(autouse=True)
def _no_gpus_counted_before(monkeypatch):
    monkeypatch.setattr(runtime.RayCluster, "_served", 0)


@pytest.mark.parametrize("keep", [True, False])
def test_only_folders_of_our_own_are_removed(tmp_path, keep):
    folder = tmp_path / "ray"
    folder.mkdir()
    (folder / "log").write_text("text")
    runtime._stop_ray(folder, keep=keep)
    assert folder.exists() == keep


def test_native_code_is_silenced_and_heard_again(capfd):
    os.write(2, b"before ")
    with runtime._stderr_silenced():
        os.write(2, b"during ")
    os.write(2, b"after")
    assert capfd.readouterr().err == "before after"


def test_silence_where_there_is_no_standard_error():
    program = "import os\nos.close(2)\nfrom workers.runtime import _stderr_silenced\nwith _stderr_silenced():\n    print('worked')"
    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout == "worked\n"


def test_a_folder_that_the_user_chose_is_used_and_one_of_our_own_says_whose_it_is(tmp_path, monkeypatch):
    assert runtime._temp_dir(ExecutionSettings(ray_temp_dir=str(tmp_path / "a" / "b"))) == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()
    monkeypatch.setattr(runtime.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(runtime, "_MAX_TEMP_DIR_CHARS", 1000)
    own = runtime._temp_dir(ExecutionSettings())
    assert own.parent == tmp_path
    assert (own / scratch._OWNER_FILE).read_text() == f"{scratch._process_space()} {os.getpid()}"


@pytest.mark.parametrize(
    ("error", "address", "stopped"),
    [
        (ClusterError("a node was lost"), None, True),  # nothing comes back to a local Ray whose node is gone: who tries again gets a new one
        (ClusterError("a node was lost"), "auto", False),  # somebody else's cluster mends itself
        (StaleCacheError("another encoder"), None, False),
    ],
)
def test_a_local_ray_that_was_lost_is_stopped_and_nothing_else(monkeypatch, error, address, stopped):
    import ray

    shutdowns = []
    monkeypatch.setattr(runtime, "_start_ray", lambda execution: None)
    monkeypatch.setattr(ray, "shutdown", lambda: shutdowns.append(1))
    if address is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(type(error)), runtime.ray_runtime(ExecutionSettings()):
        raise error
    assert bool(shutdowns) == stopped


@pytest.mark.parametrize(
    ("device", "gpus", "address", "expected"),
    [("cpu", 8, None, False), ("cuda", 0, None, True), ("auto", 0, None, False), ("auto", 2, None, True), ("auto", 8, "there:6379", False)],
)
def test_where_encoders_will_compute_is_known_before_they_start(monkeypatch, device, gpus, address, expected):
    monkeypatch.setattr(runtime, "_has_gpu", lambda: gpus > 0)
    if address is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:  # a cluster of somebody else's says what it has, whatever this machine has
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr(runtime, "_start_ray", lambda execution: None)
        monkeypatch.setattr(runtime.RayCluster, "device", lambda self, num_processes, setting: "cpu")
    assert runtime.encodes_on_gpu(ExecutionSettings(device=device)) is expected


@pytest.mark.parametrize(("hidden", "expected"), [(None, True), ("0", True), ("", False), ("-1", False)])
def test_gpus_that_the_environment_hides_are_none(monkeypatch, hidden, expected):
    monkeypatch.setattr("pathlib.Path.glob", lambda path, pattern: iter(["/dev/nvidia0"]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert runtime._has_gpu() is expected


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [("auto", 0, "cpu"), ("auto", 2, "cuda"), ("auto", 8, "cuda"), ("cpu", 1, "cpu"), ("auto", 1, None), ("cuda", 0, None)],
)
def test_processes_do_not_all_go_to_cpus_for_want_of_one_gpu(monkeypatch, device, gpus, expected):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0, **({"GPU": float(gpus)} if gpus else {})})
    cluster = runtime.RayCluster(ExecutionSettings(device=device))
    if expected is None:
        told = rf"device is {device}, but the cluster has {gpus} GPUs for 2 processes; lower encoder_actors or use device=cpu"
        with pytest.raises(ExecutionError, match=told):
            cluster.device(2, "encoder_actors")
    else:
        assert cluster.device(2, "encoder_actors") == expected


def test_a_cluster_that_lost_gpus_goes_on_with_those_that_are_left(monkeypatch, caplog):
    found = {"GPU": 2.0}
    monkeypatch.setattr("ray.cluster_resources", lambda: found)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4.0}}])
    cluster = runtime.RayCluster(ExecutionSettings(encoder_actors=8))
    for _ in range(2):  # at first there must be one for each of them: who asks for eight is not given two
        with pytest.raises(ExecutionError, match="the cluster has 2 GPUs for 8 processes"):
            cluster.encoders(8)
    found["GPU"] = 8.0
    assert cluster.encoders(8) == ("cuda", 8)
    assert caplog.text == ""
    found["GPU"] = 7.0
    assert cluster.encoders(8) == ("cuda", 7)
    assert "the cluster has lost GPUs: 7 processes encode instead of 8" in caplog.text
    assert cluster.encoders(7) == ("cuda", 7)
    with pytest.raises(ExecutionError, match="the cluster has 7 GPUs for 9 processes"):
        cluster.encoders(9)
    with pytest.raises(ExecutionError, match="the cluster has 7 GPUs for 8 processes; lower train_workers"):  # its workers wait for each other
        cluster.device(8, "train_workers")
    del found["GPU"]
    with pytest.raises(ClusterError, match="the cluster has lost its last GPU") as lost:  # not on CPUs without a word, for days
        cluster.encoders(8)
    assert lost.value.retryable
    assert runtime.RayCluster(ExecutionSettings(device="cpu")).encoders(8) == ("cpu", 8)


def test_a_stage_is_told_how_many_encoders_a_cluster_has_left(monkeypatch):
    @contextlib.contextmanager
    def started(execution):
        yield runtime.RayCluster(execution)

    monkeypatch.setattr(runtime, "ray_runtime", started)
    monkeypatch.setattr(runtime.RayCluster, "_served", 8)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 7.0})
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 14.0}}])
    with runtime.encoding_cluster(ExecutionSettings(encoder_actors=8), None) as place:
        assert (place.execution.device, place.execution.encoder_actors) == ("cuda", 7)
    monkeypatch.setenv("RAY_ADDRESS", "there:6379")
    assert runtime.encodes_on_gpu(ExecutionSettings(encoder_actors=8))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), True),
        (torch.AcceleratorError("said otherwise"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_which_errors_leave_a_process_without_its_gpu(error, expected):
    assert isinstance(runtime.gpu_failure(error, "finished units are kept"), GpuFailedError) is expected


def test_errors_of_cuda_are_known_without_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    assert runtime.gpu_failure(RuntimeError("shapes differ"), "finished units are kept") is None
    assert "torch" not in sys.modules


def test_a_gpu_that_torch_cannot_use_is_no_reason_to_ask_for_auto(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ExecutionError, match=r"torch sees no GPU here \(.*\); use device=cpu$"):
        choose_device("cuda")


def test_a_unit_fills_batches_where_gpus_encode_and_is_as_told_where_somebody_says():
    assert [ExecutionSettings().unit_bytes(on_gpu=on_gpu) for on_gpu in (False, True)] == [64 * 2**20, 2 * 2**30]
    assert [ExecutionSettings(feature_unit_bytes=7).unit_bytes(on_gpu=on_gpu) for on_gpu in (False, True)] == [7, 7]


def test_views_of_all_units_under_way_fit_between_processes():
    settings = ExecutionSettings(encoder_actors=2)
    for on_gpu in (False, True):
        assert settings.unit_pixel_bytes(on_gpu=on_gpu) * (settings.encoded_units_in_flight + 2) <= settings.object_store(on_gpu=on_gpu)
    assert ExecutionSettings(object_store_bytes=10**8).unit_pixel_bytes(on_gpu=True) == 10**8 // 4


@pytest.mark.parametrize(
    ("nodes", "processes", "expected"),
    [([8], 1, 8), ([8], 2, 4), ([8], 20, 1), ([16] * 4, 1, 16), ([16] * 4, 8, 8), ([0, 16, 8], 2, 8), ([0], 1, 1)],
)
def test_threads_are_counted_by_the_node_that_an_encoder_is_on(monkeypatch, nodes, processes, expected):
    found = [{"Alive": True, "Resources": {"CPU": float(count)} if count else {}} for count in nodes]
    monkeypatch.setattr("ray.nodes", lambda: [*found, {"Alive": False, "Resources": {"CPU": 1.0}}])
    assert runtime.RayCluster(ExecutionSettings()).node_cpus(processes) == expected


@pytest.mark.parametrize(
    ("device", "cpus", "encoders", "threads", "reserved"),
    [("cuda", 16, 1, 8, 8), ("cuda", 96, 1, 16, 16), ("cuda", 2, 1, 1, 1), ("cpu", 16, 1, 16, 1), ("cpu", 16, 4, 4, 1), ("cpu", 1, 1, 1, 1)],
)
def test_images_are_decoded_on_the_cores_that_an_encoder_leaves_or_on_all_that_it_shares(monkeypatch, device, cpus, encoders, threads, reserved):
    @contextlib.contextmanager
    def started(execution):
        yield runtime.RayCluster(execution)

    monkeypatch.setattr(runtime, "ray_runtime", started)
    monkeypatch.setattr(runtime.RayCluster, "device", lambda cluster, num_processes, setting: device)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": cpus}}])
    with runtime.encoding_cluster(ExecutionSettings(encoder_actors=encoders), None) as place:
        assert (place.prepare_threads, place.prepare_cpus) == (threads, reserved)
        assert (place.encoder_threads, place.execution.device) == (cpus // encoders, device)


@pytest.mark.parametrize("own", [signal.SIG_DFL, lambda number, frame: None])
def test_sigterm_stays_with_whoever_has_it_while_ray_starts(own, monkeypatch):
    def of_rays(number, frame):
        pytest.fail("Ray's")

    before = signal.signal(signal.SIGTERM, own)
    set_by = []
    try:
        with runtime._sigterm_kept():
            signal.signal(signal.SIGTERM, of_rays)
            monkeypatch.setattr(signal, "signal", lambda number, handler: set_by.append((number, handler)))
        # Set in any case: that puts Python's native handler in the place of Ray's.
        assert set_by == [(signal.SIGTERM, of_rays if own is signal.SIG_DFL else own)]
    finally:
        monkeypatch.undo()
        signal.signal(signal.SIGTERM, before)
