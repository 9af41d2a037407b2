"""What a run has found so far, and what earlier runs left in its output that it joins."""

import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from longclip_hf.command import complain, is_first_process, is_mendable, one_line
from longclip_hf.errors import ResultsError
from longclip_hf.evaluation.benchmarks import BENCHMARKS, Classification, Retrieval
from longclip_hf.evaluation.choice_data import Choices
from longclip_hf.evaluation.digests import Contents, image_contents
from longclip_hf.evaluation.encoding import Encoder
from longclip_hf.evaluation.findings import describe, evaluate, hardest_misses, with_texts
from longclip_hf.evaluation.joining import (
    benchmark_conflict,
    join,
    model_conflict,
    preparation_conflict,
    with_differences,
)
from longclip_hf.evaluation.query_store import FOLDER, QueryStore
from longclip_hf.evaluation.scores import Bootstrap
from longclip_hf.results import BenchmarkInfo, Failure, Model, Results, Score


class Collected:
    """What a run has found so far.

    Args:
        options: of the command line.
        command: the command line itself.
        earlier: what `--output` has of earlier runs.
        names: of the models, in their order.
        alone: one model and one benchmark, so that a failure leaves nothing to go on with.

    Raises:
        ResultsError: if texts are prepared in another way than those of `earlier`.
    """

    def __init__(self, options: Any, command: str, earlier: Results | None, names: Sequence[str], alone: bool) -> None:
        self.options, self.command, self.earlier, self.alone = options, command, earlier, alone
        self.names = names
        self.bootstrap = Bootstrap(options.resamples, options.seed)
        self.store = QueryStore(options.output / FOLDER)
        self.hardware = ""
        self.models: list[Model] = []
        self.infos: dict[str, BenchmarkInfo] = {}
        self.contents: dict[str, Contents] = {}  # by benchmark: its images are read once, not once for every model
        self.scores: list[Score] = []
        self.failures: list[Failure] = []
        if earlier is not None:
            self._refuse(preparation_conflict(earlier, self._own()))

    @contextmanager
    def failing(self, model: str, benchmark: str | None = None) -> Iterator[None]:
        """Says and keeps an error that the user can mend. Of several processes each may fail alone, and the others
        would wait for it in a collective: there an error ends the run."""
        try:
            yield
        except Exception as error:
            several = int(os.environ.get("WORLD_SIZE", "1")) > 1
            if self.alone or several or not is_mendable(error) or os.environ.get("LONGCLIP_TRACEBACK"):
                raise
            said = one_line(error)
            complain(f"{model}{f' on {benchmark}' if benchmark else ''}: {said}")
            self.failures.append(Failure(model, benchmark, said))

    def begin(self, encoder: Encoder, name: str) -> None:
        """A model is loaded.

        Raises:
            ResultsError: if an earlier run measured another one under its name.
        """
        model = Model(
            name, encoder.revision, encoder.fingerprint, encoder.model_class, encoder.positions, encoder.dtype
        )
        for known in self.earlier.models if self.earlier else ():
            if known.name == name:
                self._refuse(model_conflict(known, model))
        self.hardware = _hardware(encoder)
        self.models.append(model)

    def evaluate(
        self, encoder: Encoder, name: str, asked: str, benchmark: Retrieval | Classification | Choices
    ) -> None:
        """One model on one benchmark; what fails leaves nothing.

        Raises:
            ResultsError: if an earlier run measured another benchmark under its name.
        """
        began = time.perf_counter()
        if benchmark.name not in self.contents:
            self.contents[benchmark.name] = image_contents(benchmark.images)
        contents, lengths = self.contents[benchmark.name], not self.options.no_effective_length
        info = self.infos.get(benchmark.name) or describe(benchmark, BENCHMARKS.get(asked.lower()), contents)
        for known in self.earlier.benchmarks if self.earlier else ():
            if known.name == info.name:
                self._refuse(benchmark_conflict(known, info))
        found = evaluate(encoder, benchmark, contents.digests, self.bootstrap, lengths, self.options.sentences)
        seconds = time.perf_counter() - began
        if is_first_process():
            self.store.write(self.models[-1], info, self._prepared(), found.measured)
            if self.options.html:
                reference = self._reference()
                measured = None if reference.name == name else self.store.read(reference, info, self._prepared())
                right = None if measured is None else (reference.name, measured)
                misses = hardest_misses(name, encoder, benchmark, found, self.options.misses, right)
                self.store.write_misses(self.models[-1], info, self._prepared(), misses)
        self.infos.setdefault(info.name, with_texts(info, found))
        values, ties = dict(found.measured.values), found.measured.ties
        curve = found.effective_length
        self.scores.append(Score(name, benchmark.name, values, ties, found.truncated, seconds, curve))

    def results(self) -> Results:
        """All of it, joined to what there was."""
        own = self._own()
        joined = own if self.earlier is None else join([self.earlier, own])
        if {model.name for model in joined.models} <= set(self.names):  # a run of all of them: its order is theirs
            joined = replace(joined, models=sorted(joined.models, key=lambda model: self.names.index(model.name)))
        return with_differences(joined, self.store, self.bootstrap)

    def _reference(self) -> Model:
        """What the others are compared with."""
        earlier = self.earlier.models if self.earlier else []
        return self.models[0] if {model.name for model in earlier} <= set(self.names) else earlier[0]

    def _own(self) -> Results:
        from datetime import UTC, datetime

        return Results(
            datetime.now(UTC).isoformat(timespec="seconds"), self.command, _versions(), self.hardware,
            list(self.models), list(self.infos.values()), list(self.scores), [],
            clean_captions=self.options.clean_captions,
            neutralise_special_tokens=self.options.neutralise_special_tokens, failures=list(self.failures),
        )  # fmt: skip

    def _prepared(self) -> tuple[bool, bool]:
        return self.options.clean_captions, self.options.neutralise_special_tokens

    def _refuse(self, problem: str | None) -> None:
        if problem:
            raise ResultsError(
                f"{self.options.output / 'results.json'} and this run cannot stand together: {problem}. Name another "
                "--output, or replace what is there with --replace."
            )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("longclip-hf", "transformers", "torch")
    return {**{package: version(package) for package in packages}, "python": platform.python_version()}


def _hardware(encoder: Encoder) -> str:
    import torch

    name = f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"
    if encoder.device.type == "cuda":
        name = torch.cuda.get_device_name(encoder.device)
    elif encoder.device.type != "cpu":
        name = encoder.device.type
    count = encoder.processes.num_processes
    return name if count == 1 else f"{count} processes, each {name}"
