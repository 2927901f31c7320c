"""Every error that mergefs raises on purpose.

One hierarchy, so that each outer layer needs one rule: the command line prints the sentence and exits with
``exit_status``; a mount logs the sentence and answers with ``errno``. A message is one sentence that names the
file, the key or the tensor, the value, and what to do about it.
"""

import errno as _errno


class MergefsError(Exception):
    """Base of all errors with a message meant for people."""

    exit_status: int = 1
    errno: int = _errno.EIO


class UsageError(MergefsError):
    """The command was called with arguments that do not fit together."""

    exit_status = 2


class RecipeError(MergefsError):
    """A recipe that cannot be understood, or that asks for something impossible."""


class MethodError(MergefsError):
    """A merge method that is not there, or that another package registers and that cannot be used."""


class CheckpointError(MergefsError):
    """A model directory or a safetensors file that is missing, damaged or inconsistent."""


class DownloadError(CheckpointError):
    """A model that the Hugging Face Hub does not have, or does not give."""


class UnsupportedCheckpointError(CheckpointError):
    """A sound checkpoint in a form that must not be merged as it is (quantised codes, pickles)."""


class SourceChangedError(CheckpointError):
    """A source file is no longer the one that the plan was made from."""

    errno = _errno.ESTALE


class SourceReadError(CheckpointError):
    """The operating system could not give bytes of a source file."""


class NonFiniteError(MergefsError):
    """A tensor holds NaN or infinity where finite numbers are needed."""


class BudgetError(MergefsError):
    """A budget that cannot be parsed or cannot be kept."""


class PlanError(MergefsError):
    """Inputs that do not fit each other or the method (shapes, missing tensors)."""


class CatalogError(MergefsError):
    """The catalog cannot be opened, read or written."""


class MountError(MergefsError):
    """A mount that cannot be made, or one that is broken."""


class MaterializeError(MergefsError):
    """A model directory that cannot be written."""


class VerificationError(MergefsError):
    """A materialized model that does not match its manifest or its sources."""


class LineageError(MergefsError):
    """Nothing tells what a model was made of, or it is not clear which one is meant."""


class EvaluationError(MergefsError):
    """A model that cannot be run, or a text that nothing can be measured on."""


class MissingDependencyError(MergefsError):
    """A library that this command needs and that is not installed."""


class OutputError(MergefsError):
    """A report that cannot be written where it was asked for."""
