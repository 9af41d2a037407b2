"""The errors that a user can mend: each message says what was found, where, and what to do.

All have one root, so that `except LongCLIPError` is enough. Commands print them on one line and exit with 2; other
exceptions are bugs, and keep their traceback.
"""

from pathlib import Path


class LongCLIPError(ValueError):
    """The root of every error of this project."""


class ConversionError(LongCLIPError):
    """A checkpoint, file or setting from which nothing can be made."""


class NotCLIPError(ConversionError):
    """A folder of another kind of model, which some commands read all the same.

    Args:
        folder: where it lies.
        model_type: as its config.json says.
        message: what it is.
    """

    def __init__(self, folder: Path, model_type: object, message: str) -> None:
        super().__init__(message)
        self.folder, self.model_type = folder, model_type


class ProofError(ConversionError):
    """What was written is not what was meant. It is a fault of the program or of the disk, and nothing is left."""


class FileError(LongCLIPError):
    """A file or folder that cannot be read or written, or leads out of where it belongs."""


class ImageError(LongCLIPError):
    """An image that cannot be used.

    Args:
        cause: `"missing"`, `"unreadable"`, `"oversized"` or `"refused"`, which counts of bad rows go by.
        message: which image, and why.
    """

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        """It comes out of dataloader workers, and pickle would call it with the message alone."""
        return type(self), (self.cause, str(self))


class ResultsError(LongCLIPError):
    """Results that are not as the schema says, named by file and field."""


class BenchmarkError(LongCLIPError):
    """Data that is not there, or is not as its benchmark publishes it."""


class EncodingError(LongCLIPError):
    """A checkpoint, text or image that cannot be encoded."""


class SearchError(LongCLIPError):
    """Embeddings or an index that cannot be made, added to or searched."""


class JSONListError(LongCLIPError):
    """A file that is no JSON list of objects, or a broken one: the message says where."""


class DataError(LongCLIPError):
    """Data that cannot be trained on."""


class TrainingError(LongCLIPError):
    """Settings under which something else would be trained than they say, or nothing."""


class CheckpointError(TrainingError):
    """A checkpoint of a run that cannot be gone on from, or not be written."""
