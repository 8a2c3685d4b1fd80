"""Where work runs: on Ray, or here.

A `Cluster` runs plain functions over plain jobs with a bounded number under way. `RayCluster` is the only place that starts Ray and the only one
that sees its exceptions; `InlineCluster` runs the same functions in this process, for tests and small jobs. Both give the same results, since
every unit of work is a pure function with deterministic output names.

Ray listens on the loopback address alone, without dashboard and telemetry. One process has at most one Ray: stages that follow each other share
it, and it ends with the process. With RAY_ADDRESS in the environment that cluster is used instead.
"""

import atexit
import contextlib
import logging
import os
import platform
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

from model.errors import ModelError, first_line
from workers.dispatch import Dispatch
from workers.errors import ClusterError, ExecutionError, GpuFailedError, WorkerError, WorkFailedError
from workers.execution import ExecutionSettings, cache_folder
from workers.scratch import owned_folder

__all__ = [
    "Cluster",
    "EncodingPlace",
    "InlineCluster",
    "RayCluster",
    "encodes_on_gpu",
    "encoding_cluster",
    "gpu_failure",
    "ray_runtime",
    "stream_tasks",
    "translate_ray_error",
]

Job = TypeVar("Job")
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")

_LOG = logging.getLogger(__name__)

_TEMP_DIR_PREFIX = "loupe-ray-"
_WATCHERS = "watchers"
_STACKS_WITHIN_S = 10.0
_ANSWERS_WITHIN_S = 1.0
"""An error of a process that is about to end: it is with its driver in milliseconds."""
_WATCH_INTERVAL_S = 15.0
"""Between looks whether a cluster on which nothing ends is still there."""
_MOST_PREPARE_THREADS = 16
_MAX_TEMP_DIR_CHARS = 40
"""Ray appends about 65 characters for its sockets, and a socket's path may have 107."""


@runtime_checkable
class Cluster(Protocol):
    """Runs functions over jobs."""

    def stream(self, work: Callable[[Job], Result], jobs: Iterable[Job], *, in_flight: int) -> Iterator[Result]:
        """Run `work` on every job, at most `in_flight` at once.

        Args:
            work: a pure function; may run twice for a job.
            jobs: small values; taken only as room becomes free.
            in_flight: bound on jobs under way.

        Returns:
            Results as they come, in any order.
        """

    def pipeline(
        self,
        prepare: Callable[[Job], Prepared],
        finisher: Callable[[], Callable[[Prepared], Result]],
        jobs: Iterable[Job],
        *,
        finishers: int,
        in_flight: int,
        prepare_cpus: int = 1,
    ) -> Iterator[Result]:
        """Run every job through `prepare` (anywhere) and then through one of a few long-lived finishers.

        Args:
            prepare: a pure function; may run twice for a job.
            finisher: makes a finisher, once per process that finishes; it is called from two threads at a time, so that one unit's output
                is written while the next is computed.
            jobs: small values.
            finishers: how many.
            in_flight: bound on jobs under way, over all finishers.
            prepare_cpus: that one call of `prepare` keeps busy.

        Returns:
            Results as they come, in any order.
        """


class InlineCluster:
    """Runs everything in this process, one after the other, in the order of the jobs."""

    def stream(self, work: Callable[[Job], Result], jobs: Iterable[Job], *, in_flight: int) -> Iterator[Result]:
        """As Cluster.stream."""
        assert in_flight >= 1
        for job in jobs:
            yield work(job)

    def pipeline(
        self,
        prepare: Callable[[Job], Prepared],
        finisher: Callable[[], Callable[[Prepared], Result]],
        jobs: Iterable[Job],
        *,
        finishers: int,
        in_flight: int,
        prepare_cpus: int = 1,
    ) -> Iterator[Result]:
        """As Cluster.pipeline."""
        assert min(finishers, in_flight, prepare_cpus) >= 1
        finish: Callable[[Prepared], Result] | None = None
        for job in jobs:
            prepared = prepare(job)
            finish = finish or finisher()
            yield finish(prepared)


class _Finisher:
    """The actor that holds one finisher."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._finish = make()
        self._is_ending = False

    def finish(self, prepared: Any) -> Any:
        """Run one prepared job. After an error of CUDA's nothing more can be computed in a process: it says so, and ends."""
        if self._is_ending:
            threading.Event().wait()  # for the end: Ray then gives the job to the process that follows
        try:
            return self._finish(prepared)
        except RuntimeError as error:
            failure = gpu_failure(error, "finished units are kept")
            if failure is None:
                raise
            self._is_ending = True
            traceback.print_exc()
            end = threading.Timer(_ANSWERS_WITHIN_S, os._exit, (1,))
            end.daemon = True
            end.start()
            raise failure from error

    def stacks(self) -> str:
        """Where every thread of this process is."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        frames = sys._current_frames()  # noqa: SLF001 - the documented way to see other threads
        parts = [f"thread {names.get(number, number)}\n{''.join(traceback.format_stack(frame))}" for number, frame in frames.items()]
        return f"process {os.getpid()} on {platform.node()}\n" + "\n".join(parts)


def gpu_failure(error: RuntimeError, what_is_kept: str) -> GpuFailedError | None:
    """What to raise in place of an error after which CUDA computes nothing more in this process.

    Args:
        error: that was caught.
        what_is_kept: of the work, in words, for whoever reads it.

    Returns:
        None for every other error, a lack of memory among them: that passes.
    """
    torch = sys.modules.get("torch")  # not there, it raised nothing
    if not isinstance(error, getattr(torch, "AcceleratorError", ())) and not str(error).startswith("CUDA error"):
        return None
    from model.encoder_execution import is_out_of_memory

    if is_out_of_memory(error):
        return None
    return GpuFailedError(
        f"CUDA failed on {platform.node()} in process {os.getpid()}: {first_line(error)}. If it goes on, look at that machine's GPUs "
        f"(nvidia-smi, dmesg) or leave it out; {what_is_kept}"
    )


class RayCluster:
    """Runs functions as Ray tasks and actors. Ray must be running: see `ray_runtime`.

    Args:
        execution: settings of the run.
    """

    _served: ClassVar[int] = 0
    """The most processes of one kind that had a GPU each since this process began."""

    def __init__(self, execution: ExecutionSettings) -> None:
        self._execution = execution

    @property
    def num_cpus(self) -> int:
        """CPUs that tasks may use, at least 1."""
        import ray

        resources: Callable[[], dict[str, float]] = ray.cluster_resources
        return max(1, int(resources().get("CPU", 1)))

    @property
    def _num_gpus(self) -> int:
        import ray

        resources: Callable[[], dict[str, float]] = ray.cluster_resources
        return int(resources().get("GPU", 0))

    def node_cpus(self, num_processes: int) -> int:
        """CPUs of a node for each of some processes that are spread over all nodes, at least 1; by the smallest node.

        Args:
            num_processes: how many.
        """
        import ray

        nodes: Callable[[], list[dict[str, Any]]] = ray.nodes
        cpus = [int(node["Resources"].get("CPU", 0)) for node in nodes() if node["Alive"]]
        working = [count for count in cpus if count > 0] or [1]
        return max(1, min(working) // -(-num_processes // len(working)))

    def device(self, num_processes: int, setting: str) -> Literal["cpu", "cuda"]:
        """Where processes that want a GPU each will compute. Decided here for all of them: Ray does not hide GPUs from those that reserved none.

        Args:
            num_processes: how many.
            setting: the execution setting that says how many.

        Returns:
            cuda when there is a GPU for each of them; cpu when the settings ask for it, or do not ask and there is none.

        Raises:
            ExecutionError: there are not enough GPUs, and the settings ask for them, or there are some. All on CPUs would then take days where
                somebody waits for hours.
        """
        num_gpus = self._num_gpus
        device = self._execution.device
        if device == "cpu" or (device == "auto" and num_gpus == 0):
            return "cpu"
        if num_gpus < num_processes:
            raise ExecutionError(
                f"device is {device}, but the cluster has {num_gpus} GPUs for {num_processes} processes; lower {setting} or use device=cpu"
            )
        RayCluster._served = max(RayCluster._served, num_processes)
        return "cuda"

    def encoders(self, wanted: int) -> tuple[Literal["cpu", "cuda"], int]:
        """Where processes that encode will compute, and how many there can be.

        A cluster may lose machines while a run goes on. What it had for all processes once, and has for some now, is enough to go on with: with
        fewer of them the run takes longer and gives the same.

        Args:
            wanted: how many the settings ask for.

        Returns:
            As `device`, and at most `wanted`.

        Raises:
            ExecutionError: as `device`, where there were never enough GPUs.
            ClusterError: the last GPU was lost.
        """
        if self._execution.device == "cpu" or RayCluster._served < wanted:
            return self.device(wanted, "encoder_actors"), wanted
        num_gpus = self._num_gpus
        if num_gpus == 0:
            raise ClusterError("the cluster has lost its last GPU; run again when it has one, finished units are kept")
        if num_gpus < wanted:
            _LOG.warning("the cluster has lost GPUs: %d processes encode instead of %d", num_gpus, wanted)
        return "cuda", min(wanted, num_gpus)

    def stream(self, work: Callable[[Job], Result], jobs: Iterable[Job], *, in_flight: int) -> Iterator[Result]:
        """As Cluster.stream."""
        import ray

        # A dead worker process is retried by Ray; a function that raises is not, since its answer would be the same.
        remote: Any = ray.remote
        task = remote(num_cpus=1, max_retries=self._execution.max_failures)(work)
        yield from self._drain(self._dispatch(lambda _, job: task.remote(job), 1), jobs, in_flight)

    def pipeline(
        self,
        prepare: Callable[[Job], Prepared],
        finisher: Callable[[], Callable[[Prepared], Result]],
        jobs: Iterable[Job],
        *,
        finishers: int,
        in_flight: int,
        prepare_cpus: int = 1,
    ) -> Iterator[Result]:
        """As Cluster.pipeline."""
        import ray

        remote: Any = ray.remote
        device, finishers = self.encoders(finishers)
        # No CPU is reserved for finishers: on a machine with one CPU, preparing tasks could never run beside a reserving actor.
        actor = remote(
            num_cpus=0,
            num_gpus=1 if device == "cuda" else 0,
            max_restarts=-1,  # what counts is how often a unit was tried: on spot machines every process dies some day
            max_task_retries=self._execution.max_failures,
            max_concurrency=2,
            scheduling_strategy="SPREAD",  # reserving no CPU, they would all fit on one node
            concurrency_groups={_WATCHERS: 1},  # a thread that can say where the others are
        )(_Finisher)
        actors = [actor.remote(finisher) for _ in range(finishers)]
        task = remote(num_cpus=prepare_cpus, max_retries=self._execution.max_failures)(prepare)
        # The actor takes the prepared views straight from the object store; they never come here.
        dispatch = self._dispatch(lambda place, prepared: actors[place].finish.remote(prepared), finishers)
        try:
            yield from self._drain(dispatch, map(task.remote, jobs), in_flight, actors)
            for place in dispatch.owing:  # its unit is done by another; stuck it would keep its GPU, and without one wait on
                ray.kill(actors[place])
        finally:
            # An actor without handles ends by itself, after the units that it still has. Killed with units under way it would have them reported as
            # failed and tried again, line after line on the terminal of whoever pressed Ctrl-C.
            actors.clear()

    def _dispatch(self, give: Callable[[int, Any], Any], num_places: int) -> Dispatch:
        return Dispatch(give, num_places, max_failures=self._execution.max_failures, latest_s=self._execution.stall_after_s / 2)

    def _drain(self, dispatch: Dispatch, work: Iterable[Any], in_flight: int, actors: Sequence[Any] = ()) -> Iterator[Any]:
        import ray

        assert in_flight >= 1
        waiting = iter(work)
        exhausted = False
        last_s = time.monotonic()
        # Work that is under way when something fails or the caller goes away (Ctrl-C) is left to end: units may run twice, and all of it goes with
        # the driver. Cancelling it can abort the driver: Ray 2.60 fails an assertion when a reply meets a cancellation, 3 times in 12 under load.
        while dispatch or not exhausted:
            while not exhausted and len(dispatch) < in_flight:
                try:
                    unit = next(waiting)
                except StopIteration:
                    exhausted = True
                else:
                    dispatch.begin(unit)
            if not dispatch:
                break
            ready, _ = ray.wait(dispatch.references, num_returns=1, timeout=min(_WATCH_INTERVAL_S, self._execution.stall_after_s))
            if not ready:
                _check_alive()
                if time.monotonic() - last_s > self._execution.stall_after_s:
                    try:
                        raise _stalled(time.monotonic() - last_s, len(dispatch), actors)
                    finally:
                        for actor in actors:  # stuck in a call it would never end by itself, and on a cluster of somebody else's keep its GPU
                            ray.kill(actor)
                if exhausted:  # and no answer waits here for whoever reads the results
                    dispatch.repeat_overdue()
            last_s = time.monotonic() if ready else last_s
            for reference in ready:
                try:
                    with _ray_errors_translated():
                        result = ray.get(reference)
                except ClusterError as error:
                    # Ray has tried a lost unit often enough in one process. Whose fault it was, another process tells.
                    again: Literal["nowhere", "elsewhere", "anywhere"] = "nowhere"
                    if isinstance(error, GpuFailedError):
                        again = "anywhere"
                    elif isinstance(error.__cause__, ray.exceptions.RayActorError):
                        again = "elsewhere"
                    if not error.retryable or not dispatch.fail(reference, again):
                        raise
                    _LOG.warning("a unit was lost and is under way again: %s", error)
                else:
                    dispatch.finish(reference)
                    yield result


@contextlib.contextmanager
def ray_runtime(execution: ExecutionSettings) -> Iterator[RayCluster]:
    """A running Ray. Started on first use, shared by everything in this process, stopped when the process ends.

    Args:
        execution: `num_cpus` and `ray_temp_dir` count at the first use only.

    Yields:
        The cluster to run work on.

    Raises:
        ClusterError: Ray does not start.
    """
    _start_ray(execution)
    try:
        with _ray_errors_translated():
            yield RayCluster(execution)
    except ClusterError as error:
        if error.retryable and "RAY_ADDRESS" not in os.environ:
            # What was lost may be Ray itself: its node does not come back, and work given to it would wait for ever. Who tries again gets a new one.
            import ray

            ray.shutdown()
        raise


def stream_tasks(work: Callable[[Job], Result], jobs: Iterable[Job], execution: ExecutionSettings, cluster: Cluster | None) -> Iterator[Result]:
    """Run `work` on every job, on the cluster that is given or on every CPU of Ray's.

    Args:
        work: a pure function; may run twice for a job.
        jobs: small values.
        execution: images_in_flight_units and Ray's settings count.
        cluster: where jobs run; None starts Ray.

    Yields:
        Results as they come, in any order.

    Raises:
        ClusterError: Ray does not start.
    """
    if cluster is not None:
        yield from cluster.stream(work, jobs, in_flight=execution.images_in_flight_units)
        return
    with ray_runtime(execution) as ray_cluster:
        yield from ray_cluster.stream(work, jobs, in_flight=execution.images_in_flight_units * ray_cluster.num_cpus)


@dataclass(frozen=True, kw_only=True)
class EncodingPlace:
    """Where units are encoded, and with what."""

    cluster: Cluster
    execution: ExecutionSettings
    """With the device and the number of encoders made concrete where Ray knows them."""
    encoder_threads: int | None
    """Torch threads of each encoder; None leaves torch's own choice."""
    prepare_threads: int
    """Of each task that decodes."""
    prepare_cpus: int
    """That such a task reserves."""


@contextlib.contextmanager
def encoding_cluster(execution: ExecutionSettings, cluster: Cluster | None) -> Iterator[EncodingPlace]:
    """What units are encoded on: the cluster that is given, or Ray.

    Args:
        execution: of the run.
        cluster: where units run; None starts Ray.

    Yields:
        The place.

    Raises:
        ClusterError: Ray does not start.
    """
    if cluster is not None:
        yield EncodingPlace(cluster=cluster, execution=execution, encoder_threads=execution.encoder_threads, prepare_threads=1, prepare_cpus=1)
        return
    with ray_runtime(execution) as ray_cluster:
        device, encoder_actors = ray_cluster.encoders(execution.encoder_actors)
        execution = replace(execution, device=device, encoder_actors=encoder_actors)
        own = ray_cluster.node_cpus(execution.encoder_actors)
        on_gpu = execution.device == "cuda"
        # Of the units in flight one is encoded. A GPU takes a second for what a core decodes in ten. The threads of an encoder on CPUs wait for each
        # other, so that decoding on one of its cores stops them all: on all at once it is over sooner. 8400 views of the demo's dataset on two cores
        # took 94 and 106 s with one thread, 80 and 89 s with two, in turns.
        threads = max(1, min(_MOST_PREPARE_THREADS, own // execution.images_in_flight_units if on_gpu else own))
        yield EncodingPlace(
            cluster=ray_cluster,
            execution=execution,
            encoder_threads=execution.encoder_threads or own,
            prepare_threads=threads,
            # Encoders on CPUs reserve none, and use all: a task that asked for all could wait for ever on a cluster where another one has one.
            prepare_cpus=threads if on_gpu else 1,
        )


def ray_is_running() -> bool:
    """Whether this process has Ray at hand already. Does not load it, which takes a second."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def encodes_on_gpu(execution: ExecutionSettings) -> bool:
    """Whether encoders will have GPUs: a cluster of somebody else's is asked, this machine is looked at without a library that takes seconds to load.

    Args:
        execution: of the run.

    Raises:
        ClusterError: the cluster cannot be reached.
    """
    if execution.device != "auto":
        return execution.device == "cuda"
    if "RAY_ADDRESS" in os.environ:
        with ray_runtime(execution) as cluster:
            return cluster.encoders(execution.encoder_actors)[0] == "cuda"
    return _has_gpu()


_NO_DEVICES = ("", "-1", "NoDevFiles")


def _has_gpu() -> bool:
    """Devices of CUDA's driver, unless the environment hides them; a container without GPUs has none of them."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in _NO_DEVICES and any(Path("/dev").glob("nvidia[0-9]*"))


def _start_ray(execution: ExecutionSettings) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # errors of work that nobody waits for any more
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # Every CPU is given to tasks here; Ray's warning about overriding that on accelerator machines is for its next release.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    if address is None and os.environ.get("RAY_AUTH_MODE") != "disabled":
        # A token for this process and its children only; by default Ray would keep one in the user's home. Imported before, Ray has read the mode
        # already: unset it asks for a token when it starts, and set it has one by now.
        is_imported = "ray" in sys.modules
        if not is_imported or "RAY_AUTH_MODE" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        if not is_imported:
            os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": False}
    try:
        with warnings.catch_warnings(), _sigterm_kept():
            warnings.simplefilter("ignore")
            if address is not None:
                ray.init(address=address, **quiet)
                return
            temp_dir = _temp_dir(execution)
            _init_local(
                address="local",
                num_cpus=execution.num_cpus,
                include_dashboard=False,
                object_store_memory=execution.object_store(on_gpu=_has_gpu()),
                _temp_dir=str(temp_dir),
                _node_ip_address="127.0.0.1",
                **quiet,
            )
    except Exception as error:  # Ray raises a bare Exception when a node does not come up in time
        raise ClusterError(
            f"Ray did not start ({type(error).__name__}: {first_line(error)}). Expected room for its sockets and logs in "
            f"{execution.ray_temp_dir or tempfile.gettempdir()} and free loopback ports; set ray_temp_dir to a short, writable folder."
        ) from error
    atexit.register(_stop_ray, temp_dir, keep=execution.ray_temp_dir is not None)


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Leave SIGTERM to whom it belongs while Ray starts.

    Ray puts two handlers of its own in place: Python's, which ends the process with the signal's number as its status, and below that one of native
    code, which prints where the process is and aborts it now and then (in 1 of 2 runs that cached), whoever's handler Python calls afterwards.
    """
    if threading.current_thread() is not threading.main_thread():  # Ray leaves the signal alone there, and so must we
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # To set a handler puts Python's native one in the place of Ray's. Where there was none Ray's own stays: by SystemExit work ends in order.
        signal.signal(signal.SIGTERM, before if callable(before) else signal.getsignal(signal.SIGTERM))


def _check_alive() -> None:
    """Notice a cluster without nodes: Ray lets work on it wait for ever."""
    import ray

    nodes: Callable[[], list[dict[str, Any]]] = ray.nodes
    if not any(node["Alive"] for node in nodes()):
        raise ClusterError("Ray's last node is gone; run again, finished units are kept")


def _stalled(seconds: float, num_running: int, actors: Sequence[Any]) -> ClusterError:
    """What is known of a run on which nothing ends, written where it outlives the run."""
    import ray

    told = [f"{num_running} units under way, none ended for {seconds:.0f} s"]
    told += [f"{kind}: {getattr(ray, kind)()}" for kind in ("cluster_resources", "available_resources")]
    for number, actor in enumerate(actors):
        try:
            told.append(f"finisher {number}\n{ray.get(actor.stacks.options(concurrency_group=_WATCHERS).remote(), timeout=_STACKS_WITHIN_S)}")
        except ray.exceptions.RayError as error:
            told.append(f"finisher {number} does not say where it is: {first_line(error)}")
    text = "\n\n".join(told) + "\n"
    try:
        path = cache_folder() / "stalls" / f"{int(time.time())}-{os.getpid()}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        where = f"stands in {path}"
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        print(text, file=sys.stderr, flush=True)
        where = f"was printed, since no file can be written ({first_line(error)}; set LOUPE_CACHE to a folder of yours)"
    return ClusterError(
        f"work on the cluster is stuck: {told[0]}. Where its processes were {where}. Run again, finished units are kept; if a unit may take "
        "longer than that, raise stall_after_s."
    )


def _init_local(**options: Any) -> None:
    """Start a local Ray; once more when it did not come up in time, since Ray waits for 30 s and a machine under load may need longer."""
    import ray

    try:
        ray.init(**options)
    except Exception as error:
        if "timed out" not in str(error):
            raise
        ray.shutdown()
        ray.init(**options)


def _stop_ray(temp_dir: Path, *, keep: bool) -> None:
    import ray

    # Everything has been said by now. Work that goes with Ray (Ctrl-C while caching: 1 time in 6) would be reported as failed by Ray's own threads,
    # straight to the terminal.
    with _stderr_silenced():
        ray.shutdown()
    if not keep:
        shutil.rmtree(temp_dir, ignore_errors=True)


@contextlib.contextmanager
def _stderr_silenced() -> Iterator[None]:
    """Lead the file descriptor of standard error nowhere for a while: native code does not write to sys.stderr."""
    try:
        kept = os.dup(2)
    except OSError:  # closed
        yield
        return
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _temp_dir(execution: ExecutionSettings) -> Path:
    if execution.ray_temp_dir is not None:
        folder = Path(execution.ray_temp_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) > _MAX_TEMP_DIR_CHARS - 15 and os.access("/tmp", os.W_OK):  # noqa: S108 - the one folder that is sure to be short
        parent = Path("/tmp")  # noqa: S108
    return owned_folder(_TEMP_DIR_PREFIX, parent)


def translate_ray_error(error: BaseException) -> Exception:
    """One of ours for anything that Ray raises: the error that our own code raised on the cluster, or a ClusterError.

    Args:
        error: what ray.get, ray.wait or a Ray call raised.

    Returns:
        A WorkerError or ModelError.
    """
    import ray

    if isinstance(error, (WorkerError, ModelError)) and not isinstance(error, ray.exceptions.RayError):
        return error
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        if isinstance(cause, (WorkerError, ModelError)):
            return cause
        return WorkFailedError(f"work on the cluster failed with {type(cause).__name__}: {first_line(cause)}")
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return ClusterError(
            "the machine ran out of memory and a worker was ended; lower images_in_flight_units or encode_batch_views, then run again"
        )
    lines = str(error).strip().splitlines() or [""]
    return ClusterError(f"Ray lost work beyond its retries ({type(error).__name__}: {lines[0]}); run again, finished units are kept")


@contextlib.contextmanager
def _ray_errors_translated() -> Iterator[None]:
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        raise translate_ray_error(error) from error
