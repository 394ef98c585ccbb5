"""Runs lowered training programs: loads a .pte through ExecuTorch's runtime, trains, journals, replays, evaluates.

    session = runtime_driver.Session("model.pte")
    session.fit(batches, steps=500, lr=1e-3, eps=1e-2, seed=0, journal="run.jsonl")
    session.save_adapter("adapter/")

torch serves as a container of tensors only: no autograd, no torch model, no compiler.
"""

from runtime_driver.backend_library import load_backend_library
from runtime_driver.batches import Batch, Batches, BatchSource
from runtime_driver.callbacks import Callback
from runtime_driver.errors import (
    AdapterDivergedError,
    AdapterError,
    AllRefusedError,
    BackendLibraryError,
    BatchError,
    DataExhaustedError,
    DriverError,
    DriverWarning,
    ExecutionError,
    FleetError,
    HyperparameterError,
    InternalStateError,
    JournalCorruptError,
    JournalError,
    JournalLockedError,
    JournalMismatchError,
    LabelError,
    MissingMethodError,
    NonFiniteAdapterError,
    NonFiniteError,
    NonFiniteLossError,
    NoProjectedGradientsError,
    NotReplayableError,
    ProgramFileError,
    RecomputedError,
    RefusedWarning,
    SidecarMismatchError,
    SnapshotWarning,
    UnprovenWarning,
    WeightsFileError,
    WorkerLostError,
    WorkerMismatchError,
)
from runtime_driver.format.seeds import step_seed
from runtime_driver.journal import JournalContents, read_journal
from runtime_driver.memory import peak_rss_bytes, rss_bytes
from runtime_driver.results import Evaluation, EvaluationRecord, FitResult, FitStart, StepOutput, StepRecord
from runtime_driver.schedule import Constant, LinearDecay
from runtime_driver.session import Session

__all__ = [
    "AdapterDivergedError",
    "AdapterError",
    "AllRefusedError",
    "BackendLibraryError",
    "Batch",
    "BatchError",
    "BatchSource",
    "Batches",
    "Callback",
    "Constant",
    "DataExhaustedError",
    "DriverError",
    "DriverWarning",
    "Evaluation",
    "EvaluationRecord",
    "ExecutionError",
    "FitResult",
    "FitStart",
    "FleetError",
    "HyperparameterError",
    "InternalStateError",
    "JournalContents",
    "JournalCorruptError",
    "JournalError",
    "JournalLockedError",
    "JournalMismatchError",
    "LabelError",
    "LinearDecay",
    "MissingMethodError",
    "NoProjectedGradientsError",
    "NonFiniteAdapterError",
    "NonFiniteError",
    "NonFiniteLossError",
    "NotReplayableError",
    "ProgramFileError",
    "RecomputedError",
    "RefusedWarning",
    "Session",
    "SidecarMismatchError",
    "SnapshotWarning",
    "StepOutput",
    "StepRecord",
    "UnprovenWarning",
    "WeightsFileError",
    "WorkerLostError",
    "WorkerMismatchError",
    "load_backend_library",
    "peak_rss_bytes",
    "read_journal",
    "rss_bytes",
    "step_seed",
]
