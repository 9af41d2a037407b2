"""Benchmarks by name, and of any source of images with captions.

`load_benchmark` gives images and captions (`Retrieval`), or images and classes (`Classification`). Nothing is decoded
here, and nothing is left out without being counted in `notes`. docs/benchmarks.md is the table of `BENCHMARKS`.
"""

import difflib
from dataclasses import replace
from functools import partial
from pathlib import Path

from longclip_hf.errors import BenchmarkError
from longclip_hf.evaluation import imagenet, readers
from longclip_hf.evaluation.benchmark import TEMPLATES_80, Benchmark
from longclip_hf.evaluation.choice_data import Choices, read_choices
from longclip_hf.evaluation.data import Classification, ImageFile, LeftOut, Retrieval, without_unreadable
from longclip_hf.evaluation.sources import Columns, read_source

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "Choices",
    "Classification",
    "Columns",
    "ImageFile",
    "LeftOut",
    "Retrieval",
    "load_benchmark",
]


def load_benchmark(
    source: str,
    data: Path | None = None,
    columns: Columns | None = None,
    *,
    class_names: Path | None = None,
    templates: Path | None = None,
    left_out: LeftOut | None = None,
) -> Retrieval | Classification | Choices:
    """A benchmark by its name, a retrieval benchmark made of any source of images with captions, or choices.

    Args:
        source: one of `BENCHMARKS`; or a folder, a file or a Hub id that `longclip_hf.sources.open_source` reads. A
            JSON file of rows with the columns of Winoground, SugarCrepe or ARO: see
            `longclip_hf.evaluation.choice_data.read_choices`.
        data: the folder that a named benchmark's downloads were unpacked in; for a source with paths of images,
            where relative ones begin (by default, beside the file).
        columns: of a source, where they are not obvious.
        class_names: a file with lines of `class<TAB>name`, for a classification with other names than its own.
        templates: a file with one template in a line, for one with other templates.
        left_out: `LeftOut(skip=True)` takes rows that cannot be read, of which unreadable images are found by decoding
            all; without it they are errors, unreadable images at encoding.

    Raises:
        BenchmarkError: for a name that nobody knows, a missing file, a column that is not there, or data that does not
            fit together.
        ValueError: for class names or templates that do not fit.
        ImportError: if `datasets` or open_clip_torch is needed and not installed.
    """
    benchmark = BENCHMARKS.get(source.lower())
    if benchmark is None:
        if class_names or templates:
            raise BenchmarkError(f"{source} is a source for retrieval: class names and templates mean nothing to it.")
        if not Path(source).expanduser().exists() and "/" not in source:
            near = difflib.get_close_matches(source.lower(), BENCHMARKS, 1)
            raise BenchmarkError(
                f"There is no benchmark and no file {source!r}"
                + (f"; {near[0]!r} is the nearest name" if near else "")
                + f". Benchmarks: {', '.join(BENCHMARKS)}."
            )
        where = columns or Columns()
        if replace(where, image_root=None, image_access="root") == Columns():  # nobody asked for other columns
            choices = read_choices(source, where.image_root or data, where.image_access)
            if choices is not None:
                return choices
        left_out = left_out or LeftOut()
        found = read_source(source, data, where, left_out)
        return without_unreadable(found, left_out) if left_out.skip else found
    if columns is not None:
        raise BenchmarkError(f"{benchmark.title} has no columns to choose: leave them out.")
    if data is None:
        raise BenchmarkError(f"{benchmark.title} needs --data. {benchmark.remedy}")
    left_out = left_out or LeftOut()
    loaded = benchmark.load(data, class_names=class_names, templates=templates, left_out=left_out)
    return without_unreadable(loaded, left_out) if left_out.skip else loaded


# The table

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="urban1k",
            kind="retrieval",
            title="Urban1k",
            images=1000,
            texts=1000,
            licence="CC BY-NC 4.0 (dataset card)",
            home="https://huggingface.co/datasets/BeichenZhang/Urban1k",
            layout="Urban1k/image/*.jpg, Urban1k/caption/*.txt",
            caption_rule="The first line of the text file with the image's stem.",
            read=readers.urban1k,
        ),
        Benchmark(
            name="sharegpt4v-1k",
            kind="retrieval",
            title="ShareGPT4V-1k",
            images=1000,
            texts=1000,
            licence="CC BY-NC 4.0 (captions); the images have their sources' own",
            home="https://huggingface.co/datasets/Lin-Chen/ShareGPT4V",
            layout=(
                "share-captioner_coco_lcs_sam_1246k_1107.json, and the images that its first 1000 rows name, such as "
                "sam/images/*.jpg"
            ),
            caption_rule=(
                "The second turn of each of the first 1000 rows, with spaces for line breaks: the rows held out from "
                "training."
            ),
            read=readers.sharegpt4v_1k,
        ),
        Benchmark(
            name="coco-5k",
            kind="retrieval",
            title="COCO 2017 5k",
            images=5000,
            texts=25000,
            licence="CC BY 4.0 (annotations); Flickr's terms (images)",
            home="https://cocodataset.org/#download",
            layout="annotations/captions_val2017.json, val2017/*.jpg",
            caption_rule="The first 5 captions of each image in the file's order; images by ascending id.",
            read=readers.coco_5k,
        ),
        Benchmark(
            name="flickr30k-1k",
            kind="retrieval",
            title="Flickr30k 1k",
            images=1000,
            texts=5000,
            licence="research and education only; Flickr's terms (images)",
            home=(
                "https://cs.stanford.edu/people/karpathy/deepimagesent/ (split), "
                "https://shannon.cs.illinois.edu/DenotationGraph/ (images)"
            ),
            layout="dataset_flickr30k.json, flickr30k-images/*.jpg",
            caption_rule="All raw sentences of the images of Karpathy's test split.",
            read=readers.flickr30k_1k,
        ),
        Benchmark(
            name="flickr30k-31k",
            kind="retrieval",
            title="Flickr30k 31k",
            images=31783,
            texts=158915,
            licence="research and education only; Flickr's terms (images)",
            home="https://shannon.cs.illinois.edu/DenotationGraph/",
            layout="results_20130124.token, flickr30k-images/*.jpg",
            caption_rule="All captions of all images, as in the Long-CLIP paper: not the 1k split.",
            read=readers.flickr30k_31k,
        ),
        Benchmark(
            name="docci",
            kind="retrieval",
            title="DOCCI",
            images=5000,
            texts=5000,
            licence="CC BY 4.0",
            home="https://google.github.io/docci/#downloads",
            layout="docci_descriptions.jsonlines, images/*.jpg",
            caption_rule="The description of each image of the test split.",
            read=readers.docci,
        ),
        Benchmark(
            name="dci",
            kind="retrieval",
            title="DCI",
            images=7805,
            texts=7805,
            licence="CC BY-NC 4.0 (captions); SA-1B's licence (images)",
            home="https://github.com/facebookresearch/DCI",
            layout=(
                "densely_captioned_images/splits.json, densely_captioned_images/annotations/*.json, "
                "densely_captioned_images/photos/*.jpg"
            ),
            caption_rule=(
                "The short caption, a line break and the extra caption, for the images of all three splits; without "
                "the captions of masks."
            ),
            read=readers.dci,
        ),
        Benchmark(
            name="iiw-400",
            kind="retrieval",
            title="IIW-400",
            images=400,
            texts=400,
            licence="CC BY 4.0",
            home=(
                "https://github.com/google/imageinwords (captions), https://google.github.io/docci/#downloads (images)"
            ),
            layout="imageinwords/datasets/IIW-400/data.jsonl, images_aar/*.jpg",
            caption_rule="The human description (IIW) of each image.",
            read=readers.iiw_400,
        ),
        Benchmark(
            name="iiw-612",
            kind="retrieval",
            title="IIW",
            images=612,
            texts=612,
            licence="CC BY 4.0; SA-1B's licence (112 images)",
            home=(
                "https://github.com/google/imageinwords (captions), https://google.github.io/docci/#downloads and "
                "https://github.com/facebookresearch/DCI (images)"
            ),
            layout=(
                "imageinwords/datasets/{IIW-400,DCI_Test,DOCCI_Test}/data.jsonl, images_aar/*.jpg, "
                "densely_captioned_images/photos/*.jpg, images/*.jpg"
            ),
            caption_rule="The human description (IIW) of each image of IIW-400, DCI-Test and DOCCI-Test.",
            read=readers.iiw_612,
        ),
        Benchmark(
            name="imagenet",
            kind="classification",
            title="ImageNet",
            images=50000,
            texts=1000,
            licence="research and education only",
            home="https://www.kaggle.com/competitions/imagenet-object-localization-challenge/data",
            layout="val/WNID/*.JPEG, or as on Kaggle LOC_val_solution.csv, ILSVRC/Data/CLS-LOC/val/*.JPEG",
            caption_rule=f"open_clip's name of each of the 1000 classes {TEMPLATES_80}.",
            read=readers.imagenet,
            names=imagenet.class_names,
            name_words="open_clip's name of each of the 1000 classes",
        ),
        Benchmark(
            name="imagenet-v2",
            kind="classification",
            title="ImageNet-V2",
            images=10000,
            texts=1000,
            licence="none stated; Flickr's terms (images)",
            home="https://huggingface.co/datasets/vaishaal/ImageNetV2",
            layout="imagenetv2-matched-frequency-format-val/0 ... 999/*.jpeg",
            caption_rule=(
                f"open_clip's name of each of the 1000 classes {TEMPLATES_80}; the folder's number is the class."
            ),
            read=readers.imagenet_v2,
            names=imagenet.class_names,
            name_words="open_clip's name of each of the 1000 classes",
        ),
        Benchmark(
            name="imagenet-o",
            kind="classification",
            title="ImageNet-O",
            images=2000,
            texts=200,
            licence="none stated",
            home="https://github.com/hendrycks/natural-adv-examples",
            layout="imagenet-o/WNID/*.JPEG",
            caption_rule=(
                f"open_clip's name of each of its 200 classes {TEMPLATES_80}: a choice among 200, as in "
                "CLIP_benchmark."
            ),
            read=readers.imagenet_o,
            names=imagenet.class_names,
            name_words="open_clip's name of each of its 200 classes",
        ),
        Benchmark(
            name="cifar10",
            kind="classification",
            title="CIFAR-10",
            images=10000,
            texts=10,
            licence="none stated",
            home="https://www.cs.toronto.edu/~kriz/cifar.html (binary version)",
            layout="cifar-10-batches-bin/test_batch.bin, cifar-10-batches-bin/batches.meta.txt",
            caption_rule=f"The name of each class {TEMPLATES_80}, as in Long-CLIP's own evaluation.",
            read=partial(
                readers.cifar, "cifar-10-batches-bin", "cifar-10-batches-py", "test_batch.bin", "batches.meta.txt", 1
            ),
        ),
        Benchmark(
            name="cifar100",
            kind="classification",
            title="CIFAR-100",
            images=10000,
            texts=100,
            licence="none stated",
            home="https://www.cs.toronto.edu/~kriz/cifar.html (binary version)",
            layout="cifar-100-binary/test.bin, cifar-100-binary/fine_label_names.txt",
            caption_rule=(
                f"The name of each fine class, with spaces for underscores, {TEMPLATES_80}, as in Long-CLIP's own "
                "evaluation."
            ),
            read=partial(readers.cifar, "cifar-100-binary", "cifar-100-python", "test.bin", "fine_label_names.txt", 2),
            name_words="The name of each fine class, with spaces for underscores",
        ),
        Benchmark(
            name="imagefolder",
            kind="classification",
            title="Image folder",
            images=None,
            texts=None,
            licence="your own",
            home="your own",
            layout="CLASS/*.jpg or other images",
            caption_rule="The name of each folder, with spaces for underscores, in `a photo of a {}.`",
            read=readers.class_folders,
            templates=lambda: ["a photo of a {}."],
            name_words="The name of each folder, with spaces for underscores",
            template_words="in `a photo of a {}.`",
        ),
    )
}
