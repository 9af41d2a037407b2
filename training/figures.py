"""The figures of a run: what is logged of its steps and counted of its rows, and retrieval on the held-out ones."""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from longclip_hf.evaluation.effective_length import effective_length
from longclip_hf.evaluation.retrieval import ranks_among, retrieval_ranks
from longclip_hf.rows import BAD_ROW_CAUSES, bad_rows_report
from longclip_hf.training.curves import draw_curves
from longclip_hf.training.encoding import Embeddings, lengths_of
from longclip_hf.training.losses import LossTerms
from longclip_hf.training.watch import Watch

Reduce = Callable[[torch.Tensor], torch.Tensor]  # the sum over processes: every one calls it for the same figures

# Above this share of the variance, coarse features are all but the fine ones. Said after so many logs in a row.
NEARLY_ALL, LOGS_IN_A_ROW = 0.95, 3


class Figures:
    """Running sums of the steps since the last log, on the device, and counts of the whole run.

    Args:
        reduce: adds a tensor up over the processes.
    """

    def __init__(self, reduce: Reduce) -> None:
        self.reduce = reduce
        self.watch = Watch()
        self.bad_rows = torch.zeros(len(BAD_ROW_CAUSES), dtype=torch.long)  # by cause, of all processes
        self.truncated = 0  # long captions cut at the model's length
        self.captions_seen = 0
        self.sums: dict[str, Any] = {}  # what the CPU knows stays there
        self._device = torch.device("cpu")
        self._nearly_all = 0  # logs in a row
        self.since = 0.0  # when the interval of the next log began

    def start(self) -> None:
        """The clock of the first interval."""
        self.since = time.perf_counter()

    def now(self) -> float:
        """The time, in seconds."""
        return time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Time within the interval that is not training's, such as an evaluation."""
        self.since += seconds

    def add(
        self,
        step: int,
        inputs: Mapping[str, Any],
        embeddings: Embeddings,
        terms: LossTerms,
        variance_kept: torch.Tensor | None,
    ) -> None:
        """Adds a step; nothing leaves the device before it is logged.

        Args:
            step: its number.
            inputs: the batch.
            embeddings, terms, variance_kept: what came of it.
        """
        tokens = lengths_of(inputs).sum()
        if embeddings.short is not None:
            tokens += lengths_of(inputs, "short_").sum()
        self._device = embeddings.image.device
        figures: dict[str, Any] = {
            "steps": 1.0,
            "images": float(len(embeddings.image)),
            "tokens": float(tokens),
            "not_finite": self.watch.add(embeddings, step),
            "loss_long": terms.long.detach(),
            "logit_scale": embeddings.logit_scale.detach().exp(),
        }
        if terms.short is not None:
            figures["loss_short"] = terms.short.detach()
        if terms.distillation is not None:
            figures["loss_distillation"] = terms.distillation.detach()
        if variance_kept is not None:
            figures["variance_kept"] = variance_kept.detach()
        figures |= {name: inputs[name].sum(0) for name in ("bad_rows", "truncated") if name in inputs}
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def drain(self) -> dict[str, float]:
        """The means over the steps since the last log and the speed, of all processes; begins the next interval.

        Raises:
            TrainingError: on every process, if features were not finite.
        """
        sums = self._over_processes()
        self.sums = {}
        now = time.perf_counter()
        elapsed, self.since = now - self.since, now
        (steps,), (images,), (tokens,) = map(sums.pop, ("steps", "images", "tokens"))
        self.bad_rows += torch.tensor(sums.pop("bad_rows", [0.0])).long()
        self.truncated += int(sums.pop("truncated", [0.0])[0])
        self.captions_seen += int(images)
        figures = {name: value / steps for name, (value,) in sums.items()}
        return figures | {"images_per_second": images / elapsed, "tokens_per_second": tokens / elapsed}

    def nearly_all_kept(self, logs: Mapping[str, float], components: int | float) -> str | None:
        """What is to be said, once, after some logs in a row in which the components kept nearly all."""
        kept = logs.get("variance_kept", 0.0)
        self._nearly_all = self._nearly_all + 1 if kept > NEARLY_ALL else 0
        if self._nearly_all != LOGS_IN_A_ROW:
            return None
        return (
            f"The primary components keep {100 * kept:.1f} % of the variance (variance_kept), so that coarse features "
            "are all but the fine ones: primary component matching does next to nothing. Use fewer components "
            f"(num_components is {components}) or a larger batch."
        )

    def counts(self) -> dict[str, Any]:
        """What `report` says, by all processes so far, those of the steps since the last log included.

        Raises:
            TrainingError: on every process, if features were not finite since then.
        """
        since = self._over_processes()
        bad_rows = self.bad_rows + torch.tensor(since.get("bad_rows", [0.0])).long()
        return {
            "bad_rows": bad_rows.tolist(),
            "truncated": self.truncated + int(since.get("truncated", [0.0])[0]),
            "captions_seen": self.captions_seen + int(since.get("images", [0.0])[0]),
        }

    def _over_processes(self) -> dict[str, list[float]]:
        """The sums, in one collective and one copy from the device."""
        if not self.sums:
            return {}
        values = [
            torch.as_tensor(value, dtype=torch.float32, device=self._device).flatten() for value in self.sums.values()
        ]
        found = iter(self.reduce(torch.cat(values)).tolist())
        sums = {name: list(islice(found, len(value))) for name, value in zip(self.sums, values, strict=True)}
        if sums.pop("not_finite") != [0.0]:
            self.watch.refuse()
        return sums

    def go_on_from(self, counts: Mapping[str, Any]) -> None:
        """Takes up the counts of a checkpoint."""
        self.bad_rows[: len(counts["bad_rows"])] = torch.tensor(counts["bad_rows"])
        self.truncated, self.captions_seen = counts["truncated"], counts["captions_seen"]

    def report(self, train_length: int | None = None) -> str:
        """What was trained on, skipped and cut, in words; `train_length` is where captions were cut, if said."""
        where = "the model's length" if train_length is None else f"{train_length} tokens (train_length)"
        return (
            f"{self.captions_seen} images with captions were trained on. {bad_rows_report(self.bad_rows.tolist())}. "
            f"Long captions cut at {where}: {self.truncated}."
        )


def curves(history: list[dict[str, float]], file: Path) -> str:
    """Draws what was logged to `file`; returns what is to be said about it, if anything."""
    try:
        draw_curves(history, file)
    except ImportError:
        return f' No {file.name}: it needs matplotlib, pip install "longclip-hf[train]".'
    return ""


def retrieval_metrics(prediction: Any, cuts: Sequence[int] = ()) -> dict[str, float]:
    """Recall among all held-out rows, both ways, with the long and with the short captions, as shares of 1.

    `mean_t2i_r1` is the mean of both kinds' text-to-image recall at 1: one number to choose a checkpoint by. With
    `cuts`, where the last of the predictions was cut, text-to-image recall at 1 of the long captions at each of these
    lengths, and `effective_length` in tokens, if there is one: see `longclip_hf.evaluation.effective_length`.
    """
    parts = [torch.as_tensor(part) for part in prediction.predictions]
    cut = parts.pop().unbind(1) if cuts else ()
    image, long, *short = parts
    metrics: dict[str, float] = {}
    for name, text in (("long", long), *(("short", part) for part in short)):
        for direction, ranks in retrieval_ranks(image, text, torch.arange(len(image))).items():
            metrics |= {f"{name}_{direction}_r{k}": ranks.recall(k) for k in (1, 5, 10)}
    means = [value for name, value in metrics.items() if name.endswith("_t2i_r1")]
    metrics["mean_t2i_r1"] = sum(means) / len(means)
    if cuts:
        rows = torch.arange(len(image))
        hits = torch.stack([ranks_among(text, image, rows).hits(1) for text in cut])
        metrics |= {f"long_t2i_r1_at_{cut}": float(hit.double().mean()) for cut, hit in zip(cuts, hits, strict=True)}
        effective = effective_length(hits, cuts).effective
        if effective is not None:
            metrics["effective_length"] = effective.value
    return metrics
