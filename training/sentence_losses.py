"""The losses as loss modules of sentence-transformers, for its `SentenceTransformerTrainer`.

    from longclip_hf import PrimaryComponentLoss
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer

    model = SentenceTransformer("long-clip")
    loss = PrimaryComponentLoss(model)
    SentenceTransformerTrainer(model, args, train_dataset, loss=loss).train()

The columns of the data set are, in this order, the image, the long and the short caption. The library's trainer knows
neither the kept rows of a stretched table nor captions in groups by length: `LongCLIPTrainer` does.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from longclip_hf.errors import TrainingError
from longclip_hf.training import losses
from longclip_hf.training.components import primary_components, second_moments
from longclip_hf.training.gathering import Gathered, all_reduce_with_grad, rank

Features = Iterable[Mapping[str, torch.Tensor]]


class _ColumnLoss(nn.Module):
    """What the modules share: columns to features, and the contrastive term with everybody's negatives."""

    columns: tuple[str, ...] = ("an image", "a long caption", "a short caption")

    def __init__(
        self, model: Any, scale: float = 100.0, label_smoothing: float = 0.0, gather_across_devices: bool = True
    ) -> None:
        super().__init__()
        self.model = model
        self.scale, self.label_smoothing = scale, label_smoothing
        self.gather_across_devices = gather_across_devices

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as the library writes them into a model card."""
        settings = (name for name in vars(self) if name != "training" and not name.startswith("_"))
        return {name: getattr(self, name) for name in settings}

    def forward(self, sentence_features: Features, labels: torch.Tensor | None = None) -> torch.Tensor:
        """The loss of a batch.

        Raises:
            TrainingError: for another number of columns.
        """
        batch = list(sentence_features)
        if len(batch) != len(self.columns):
            raise TrainingError(
                f"{type(self).__name__} takes {len(self.columns)} columns, {', '.join(self.columns)}, and the data "
                f"set has {len(batch)}."
            )
        features = [self.model(dict(column))["sentence_embedding"].float() for column in batch]
        return self.loss_of(features, batch)

    def loss_of(self, features: list[torch.Tensor], batch: list[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        """Of the columns' features, not normalised."""
        raise NotImplementedError

    def contrast_of(self, gathered: Gathered) -> losses.Contrast:
        """The contrastive term, which gathers no tensor twice."""

        def contrast(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
            everyone: tuple[Any, ...] = ()
            if self.gather_across_devices:
                everyone = gathered[image_embeds], gathered[text_embeds], rank() * len(image_embeds)
            return losses.contrastive_loss(image_embeds, text_embeds, self.scale, self.label_smoothing, *everyone)

        return contrast


class PrimaryComponentLoss(_ColumnLoss):
    """Primary component matching: images meet the long captions, their coarse features the short ones.

    References:
        Long-CLIP (arXiv 2403.15378), section 3.3. See `longclip_hf.primary_component_loss`.

    Args:
        model: a `SentenceTransformer` of a CLIP.
        num_components: primary components kept: a count, or within (0, 1) a share of the variance.
        components_scope: `"local"`, each process's images define the components, or `"global"`, all of them.
        short_weight: weight of the short captions' term.
        scale: factor of the cosines.
        label_smoothing: share of the target that is spread over all candidates.
        gather_across_devices: use the captions and images of all processes as negatives.

    Example:
        >>> loss = PrimaryComponentLoss(model, num_components=32)
    """

    def __init__(
        self,
        model: Any,
        num_components: int | float = 32,
        components_scope: str = "local",
        short_weight: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        if components_scope not in ("local", "global"):
            raise TrainingError(f"components_scope must be local or global, got {components_scope!r}.")
        self.num_components, self.components_scope, self.short_weight = num_components, components_scope, short_weight

    def coarse(self, embeds: torch.Tensor) -> torch.Tensor:
        """Their primary components."""
        moments = all_reduce_with_grad(second_moments(embeds)) if self.components_scope == "global" else None
        return primary_components(embeds, self.num_components, moments).features

    def loss_of(self, features: list[torch.Tensor], batch: list[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        image, long, short = (F.normalize(part, dim=-1) for part in features)
        contrast = self.contrast_of(Gathered())
        return losses.primary_component_loss(contrast, image, self.coarse(image), long, short, self.short_weight).loss


class HiMoLoss(PrimaryComponentLoss):
    """Images meet the long captions, and once more their primary components; there are no short captions.

    References:
        HiMo-CLIP (AAAI 2026). See `longclip_hf.primary_component_loss`.

    Args:
        model: as in `PrimaryComponentLoss`, and so are all the others.
    """

    columns = ("an image", "a long caption")

    def loss_of(self, features: list[torch.Tensor], batch: list[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        image, long = (F.normalize(part, dim=-1) for part in features)
        contrast = self.contrast_of(Gathered())
        return losses.primary_component_loss(contrast, image, image, long, self.coarse(long), self.short_weight).loss


class UndistinguishedLoss(_ColumnLoss):
    """The same image features meet both captions; see `longclip_hf.undistinguished_loss`.

    Args:
        model: as in `PrimaryComponentLoss`, and so are all the others.
    """

    def __init__(self, model: Any, short_weight: float = 1.0, **options: Any) -> None:
        super().__init__(model, **options)
        self.short_weight = short_weight

    def loss_of(self, features: list[torch.Tensor], batch: list[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        image, long, short = (F.normalize(part, dim=-1) for part in features)
        return losses.undistinguished_loss(self.contrast_of(Gathered()), image, long, short, self.short_weight).loss


class BoundedLoss(UndistinguishedLoss):
    """Short captions may not move far from where the model has them now; see `longclip_hf.bounded_loss`.

    Args:
        model: as in `PrimaryComponentLoss`, and so are all the others. A frozen copy of it is kept.
    """

    def __init__(self, model: Any, short_weight: float = 1.0, **options: Any) -> None:
        super().__init__(model, short_weight, **options)
        self.original = copy.deepcopy(model).eval().requires_grad_(False)

    def loss_of(self, features: list[torch.Tensor], batch: list[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        image, long = (F.normalize(part, dim=-1) for part in features[:2])
        with torch.no_grad():
            original = self.original.eval()(dict(batch[2]))["sentence_embedding"].float()
        contrast = self.contrast_of(Gathered())
        return losses.bounded_loss(contrast, image, long, features[2], original, self.short_weight).loss


class LongOnlyLoss(_ColumnLoss):
    """Images meet the long captions; see `longclip_hf.long_only_loss`.

    Args:
        model: as in `PrimaryComponentLoss`, and so are all the others.
    """

    columns = ("an image", "a long caption")

    def loss_of(self, features: list[torch.Tensor], batch: list[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        image, long = (F.normalize(part, dim=-1) for part in features)
        return losses.long_only_loss(self.contrast_of(Gathered()), image, long).loss
