"""What must hold of every batch, watched without waiting for the device."""

import torch
from torch import nn

from longclip_hf.errors import TrainingError
from longclip_hf.training.encoding import Embeddings, check_eot
from longclip_hf.training.gathering import all_gather_with_grad, check_equal_rows

_COLUMNS = ("image", "long caption", "short caption")


class Watch:
    """Equal numbers of rows, an EOT in every caption, features that are finite.

    The first batch of a loader is looked at, which a GPU is waited for. After it the number of rows is compared on the
    CPU, captions have their EOT from `CaptionCollator`, and which features were not finite first is kept on the device
    until somebody asks: when a step is logged, and before a checkpoint is written.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """A new loader."""
        self.rows: int | None = None
        self.trusted = False
        self._bad: torch.Tensor | None = None  # (rows, 2 or 3), of the first batch that had any
        self._first: torch.Tensor | None = None  # its step

    def before(self, input_ids: torch.Tensor, collator_gives_eot: bool, *models: nn.Module | None) -> None:
        """Called with every batch before it is encoded.

        Args:
            input_ids: of this process's batch.
            collator_gives_eot: whether texts without EOT cannot occur, if there was none in the first batch.
            *models: those that will encode it.

        Raises:
            TrainingError: if this process brings another number of rows than before.
            ValueError: on every process, if they bring different ones in the first batch.
        """
        rows = len(input_ids)
        if self.rows is None:
            check_equal_rows(rows, input_ids.device)
        elif rows != self.rows:
            raise TrainingError(
                f"A batch has {rows} rows, and those before it had {self.rows}. Every process must bring equally "
                "many, so the data and the collator must give as many as they were asked for."
            )
        trusted = collator_gives_eot and self.rows is not None
        if trusted != self.trusted:
            for model in models:
                if model is not None:
                    check_eot(model, not trusted)
        self.rows, self.trusted = rows, trusted

    def add(self, embeddings: Embeddings, step: int) -> torch.Tensor:
        """Looks at the features of a step; returns how many rows of this process were not finite, a scalar."""
        parts = [part.detach() for part in (embeddings.image, embeddings.long, embeddings.short) if part is not None]
        bad = torch.stack([~part.isfinite().all(dim=1) for part in parts], dim=1)
        first = torch.full((), step, device=bad.device)
        if self._bad is not None and self._first is not None:
            earlier = self._bad.any()
            bad, first = torch.where(earlier, self._bad, bad), torch.where(earlier, self._first, first)
        self._bad, self._first = bad, first
        return bad.any(dim=1).sum()

    def refuse(self) -> None:
        """To be called by every process, after rows of one of them were not finite.

        Raises:
            TrainingError: naming the rows and the step.
        """
        assert self._bad is not None and self._first is not None
        steps = torch.where(self._bad.any(dim=1), self._first, torch.iinfo(torch.long).max)
        steps, bad = all_gather_with_grad(steps), all_gather_with_grad(self._bad.float())
        first = int(steps.min())
        bad = bad * (steps == first)[:, None]  # at the next step every row is: the weights were NaN by then
        named = "; ".join(
            f"{_COLUMNS[column]} rows {rows[:8]}"
            for column in range(bad.shape[1])
            if (rows := bad[:, column].nonzero().flatten().tolist())
        )
        raise TrainingError(
            f"Features of the global batch of {len(bad)} at step {first + 1} hold NaN or Inf: {named}. Look at these "
            "samples, at the learning rate and, in float16, at the loss scale. Training ended before anything was "
            "saved after it."
        )
