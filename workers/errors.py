"""What can go wrong in the worker package.

WorkerError
|-- StorageError             the store refused or lost something
|   |-- ObjectNotFoundError    nothing lies at this path
|   |-- AccessDeniedError      this object or folder may not be read or written
|   |-- CredentialsError       credentials are missing, expired or wrong: nothing can be read or written
|   |-- CertificateError       the store's certificate is signed by nobody who is trusted
|   |-- StoreFullError         the disk or the quota is full
|   |-- StoreUnavailableError  the store did not answer, or asks for patience  (retryable)
|-- TableError               a Delta table is damaged or refused a commit
|-- ClusterError             Ray did not start, or lost the work beyond its own retries  (retryable)
|   |-- GpuFailedError         a GPU or its driver failed under a unit of work  (retryable)
|   |-- WorkFailedError        code that ran on the cluster raised an error of its own
|-- ExecutionError           an execution setting asks for what this machine or cluster does not have
|-- SpecChangedError         work on record was done under another spec
|-- RecordError              a record in the store cannot be read back as its type
|-- SourceError              a dataset source is missing, damaged or not what the recipe says
|-- ErrorBudgetError         more inputs were quarantined than the budget allows
|-- IncompleteError          expected != committed + quarantined
|-- CalibrationError         maps cannot be measured, or what is stored of them is worse than was measured
|-- DiskSpaceError           the planned work does not fit the free space
|-- StaleCacheError          cached features are not what the encoder gives
|-- MissingFeaturesError     the cache does not hold an image, or holds it damaged
|-- LanguageModelPrepareError  a language model cannot be fetched or converted
|-- TrainingError            training cannot start, resume or go on
|-- EvaluationError          evaluation cannot run on what there is
|-- ExportingError           an export cannot be written from what there is

`retryable` tells a flow whether trying again, with nothing changed, can help.
"""

from collections.abc import Sequence
from typing import ClassVar

from model.views import Branch

__all__ = [
    "AccessDeniedError",
    "CalibrationError",
    "CertificateError",
    "ClusterError",
    "CredentialsError",
    "DiskSpaceError",
    "ErrorBudgetError",
    "EvaluationError",
    "ExecutionError",
    "ExportingError",
    "GpuFailedError",
    "IncompleteError",
    "LanguageModelPrepareError",
    "MissingFeaturesError",
    "ObjectNotFoundError",
    "RecordError",
    "SourceError",
    "SpecChangedError",
    "StaleCacheError",
    "StorageError",
    "StoreFullError",
    "StoreUnavailableError",
    "TableError",
    "TrainingError",
    "WorkFailedError",
    "WorkerError",
]


class WorkerError(Exception):
    """Base of every error that the worker package raises on purpose."""

    retryable: ClassVar[bool] = False
    """Whether trying again, with nothing changed, can help."""


class StorageError(WorkerError):
    """The store refused or lost something; the message names the root and the path."""


class ObjectNotFoundError(StorageError):
    """Nothing lies at this path."""


class AccessDeniedError(StorageError):
    """This object or folder may not be read or written."""


class CredentialsError(StorageError):
    """Credentials are missing, expired or wrong. It says nothing about the object that was asked for."""


class CertificateError(StorageError):
    """The store's certificate is signed by nobody who is trusted. It says nothing about the object that was asked for."""


class StoreFullError(StorageError):
    """The disk or the quota is full."""


class StoreUnavailableError(StorageError):
    """The store did not answer in time, or asks for patience."""

    retryable: ClassVar[bool] = True


class TableError(WorkerError):
    """A Delta table is damaged, has another schema, or refused a commit."""


class ClusterError(WorkerError):
    """Ray did not start, or lost the work beyond its own retries."""

    retryable: ClassVar[bool] = True


class GpuFailedError(ClusterError):
    """A GPU or its driver failed under a unit of work, in a process that cannot compute on it any more; the message names machine and error."""


class WorkFailedError(ClusterError):
    """Code that ran on the cluster raised an error that is none of ours; the message holds its first line."""

    retryable: ClassVar[bool] = False


class ExecutionError(WorkerError):
    """An execution setting asks for what this machine or cluster does not have."""


class SpecChangedError(WorkerError):
    """Work on record was done under another spec.

    Args:
        message: for people.
        differences: one line per field that differs; kept as an attribute.
    """

    differences: tuple[str, ...]

    def __init__(self, message: str, differences: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.differences = tuple(differences)

    def __reduce__(self) -> tuple[type["SpecChangedError"], tuple[str, tuple[str, ...]]]:
        return (SpecChangedError, (str(self), self.differences))


class RecordError(WorkerError):
    """A record in the store cannot be read back as the type it should have."""


class SourceError(WorkerError):
    """A dataset source is missing, damaged, or not what the recipe says it is."""


class ErrorBudgetError(WorkerError):
    """More inputs of a source were quarantined than the budget allows; going on would hide a systematic fault."""


class IncompleteError(WorkerError):
    """A stage's books do not balance: expected is not committed plus quarantined."""


class CalibrationError(WorkerError):
    """Maps cannot be measured for int8, or what is stored of them is worse than what was measured; the message says what can be done."""


class DiskSpaceError(WorkerError):
    """What is planned does not fit the free space of the store."""


class StaleCacheError(WorkerError):
    """Cached features are not what the encoder gives now. Training on them would be wrong without a sign of it."""


class MissingFeaturesError(WorkerError):
    """The cache does not hold an image's features, or holds them damaged, and the policy is to fail.

    Args:
        message: what was expected and found.
        image_sha256: whose features, where it is a single image's.
        branch: of the features, where they are of one: the files of the other may be whole.
    """

    def __init__(self, message: str, image_sha256: str | None = None, branch: Branch | None = None) -> None:
        super().__init__(message)
        self.image_sha256 = image_sha256
        self.branch = branch


class LanguageModelPrepareError(WorkerError):
    """A language model cannot be fetched or converted."""


class TrainingError(WorkerError):
    """Training cannot start, resume or go on."""


class EvaluationError(WorkerError):
    """Evaluation cannot run on what there is."""


class ExportingError(WorkerError):
    """An export cannot be written from what there is."""
