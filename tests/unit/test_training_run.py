"""Which failures of training workers are tried again, and what is said of the others. With real clusters: tests/e2e/test_training_under_ray.py."""

import signal

import pytest
import torch
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from model.errors import FrozenBlockChangedError
from tests.tiny_training import tiny_training_spec
from workers.errors import ClusterError, GpuFailedError, StaleCacheError, StoreUnavailableError, WorkFailedError
from workers.execution import ExecutionSettings, SilentProgress
from workers.training import run


@pytest.fixture
def job(tiny_language_model_folder):
    spec = tiny_training_spec(tiny_language_model_folder)

    def make(**changes):
        return run._StageJob(spec=spec, root="/nowhere", execution=ExecutionSettings(**changes), stage="align", threads=1)

    return make


def fitting(monkeypatch, *answers):
    """Let the tries of a stage end like this; gives the list of tries."""
    tries = []

    def fit_once(stage_job):
        tries.append(stage_job)
        answer = answers[len(tries) - 1]
        if answer is not None:
            raise answer

    monkeypatch.setattr(run, "_fit_once", fit_once)
    return tries


def test_lost_workers_are_replaced_as_often_as_allowed(monkeypatch, job):
    tries = fitting(monkeypatch, ClusterError("one"), ClusterError("two"), None)
    losses = []
    run._fit(job(max_failures=2), losses, SilentProgress())
    assert len(tries) == 3
    assert [str(loss) for loss in losses] == ["one", "two"]


def test_one_loss_too_many_is_an_error(monkeypatch, job):
    tries = fitting(monkeypatch, ClusterError("one"), ClusterError("two"))
    with pytest.raises(ClusterError, match="two"):
        run._fit(job(max_failures=1), [], SilentProgress())
    assert len(tries) == 2


@pytest.mark.parametrize(
    "error", [StaleCacheError("stale"), FrozenBlockChangedError("changed"), StoreUnavailableError("away"), WorkFailedError("a bug")]
)
def test_what_would_fail_again_is_not_tried_again(monkeypatch, job, error):
    """A store that is away is the flow's to try again, after a pause."""
    tries = fitting(monkeypatch, error)
    with pytest.raises(type(error)):
        run._fit(job(max_failures=2), [], SilentProgress())
    assert len(tries) == 1


def test_a_peer_s_death_may_look_like_a_bug_of_another_rank(monkeypatch, job):
    tries = fitting(monkeypatch, WorkFailedError("connection closed by peer"), None)
    run._fit(job(max_failures=2, train_workers=2), [], SilentProgress())
    assert len(tries) == 2


def test_whoever_is_interrupted_tries_no_more(monkeypatch, job):
    class Interrupted(SilentProgress):
        def advance(self, count=1, **facts):
            if tries:
                raise KeyboardInterrupt

    tries = fitting(monkeypatch, ClusterError("the controller was aborted"), None)
    with pytest.raises(KeyboardInterrupt):
        run._fit(job(max_failures=2), [], Interrupted())
    assert len(tries) == 1


def test_the_handler_of_ctrl_c_is_put_back(monkeypatch, job):
    """Ray Train's own does nothing once its run has ended: Ctrl-C between two stages of training was lost."""
    before = signal.getsignal(signal.SIGINT)

    def fit_once(stage_job):
        signal.signal(signal.SIGINT, lambda number, frame: None)

    monkeypatch.setattr(run, "_fit_once", fit_once)
    run._fit(job(), [], SilentProgress())
    assert signal.getsignal(signal.SIGINT) is before


def death():
    return WorkerHealthCheckFailedError("the worker died", RuntimeError("actor died"))


def test_our_own_error_is_told_before_deaths_and_deaths_before_foreign_errors():
    ours = StaleCacheError("stale")
    assert run._translated([death(), ours], "align") is ours
    told = run._translated([RuntimeError("connection closed by peer"), death()], "align")
    assert type(told) is ClusterError
    assert "lost its workers (actor died)" in str(told)
    told = run._translated([RuntimeError("a bug\nin two lines")], "sft")
    assert type(told) is WorkFailedError
    assert "stage sft failed with RuntimeError" in str(told)


def failing(monkeypatch, error):
    """Let a worker's stage end in this error."""

    def train_stage(*_arguments, **_settings):
        raise error

    monkeypatch.setattr(run, "train_stage", train_stage)


def test_a_worker_that_lost_its_gpu_says_so_and_is_replaced(monkeypatch, job):
    failing(monkeypatch, torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(GpuFailedError, match=r"^CUDA failed on .+: CUDA error: an illegal .+; it goes on from its last checkpoint$") as failed:
        run._train_worker({"job": job()})
    tries = fitting(monkeypatch, run._translated([failed.value], "align"), None)
    run._fit(job(max_failures=1, train_workers=1), [], SilentProgress())
    assert len(tries) == 2


def test_a_lack_of_the_gpu_s_memory_is_no_loss_of_it(monkeypatch, job):
    failing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    with pytest.raises(torch.OutOfMemoryError):
        run._train_worker({"job": job()})


def test_a_wrapped_error_of_ours_is_found():
    wrapped = RuntimeError("outer")
    wrapped.__cause__ = StaleCacheError("stale")
    assert isinstance(run._translated([wrapped], "align"), StaleCacheError)
