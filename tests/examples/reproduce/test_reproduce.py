"""docs/reproduce.md: its commands run on small copies of the data, and its figures are compared as they should be."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fork_server
import pytest
from benchmark_files import CIFAR, RETRIEVAL, cifar, imagenet_folders, imagenet_v2, picture, write, write_pictures
from open_clip_stub import write_open_clip
from sample_results import sample_results

from examples.reproduce.compare import compare, main, read_published
from longclip_hf.evaluation.benchmarks import BENCHMARKS
from longclip_hf.results import METRICS, read_results, write_results
from longclip_hf.training.train import RECIPES, parse

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
# In the place of what the machine of a test has not: GPUs, a batch of 2048 rows, and the hours of two epochs.
SMALL = shlex.split(
    "--use_cpu --bf16 False --fp16 False --per_device_train_batch_size 8 --cache_chunk_size 0 --num_components 4 "
    "--heldout_rows 4 --max_steps 1 --dataloader_num_workers 0 --dataloader_persistent_workers False "
    "--dataloader_pin_memory False --disable_tqdm True --report_to none --save_strategy no"
)


@pytest.fixture(scope="module")
def place(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the project's scripts, the models under their ids, and small copies of all data."""
    folder = tmp_path_factory.mktemp("reproduce")
    for name in ("conversion", "training", "evaluation", "examples"):
        (folder / name).symlink_to(ROOT / name)
    for size in ("base-patch16", "large-patch14"):
        shutil.copytree(clip_folder, folder / "openai" / f"clip-vit-{size}")
    rows = []
    for number in range(16):
        image = f"{('coco/train2017', 'llava/llava_pretrain/images/00453', 'sam/images')[number % 3]}/{number}.jpg"
        write(folder / "ShareGPT4V" / "data" / image, picture(number))
        says = [{"from": "human", "value": "What is this?\n<image>"}]
        says.append({"from": "gpt", "value": f"A photo of thing {number}. It goes on, and on. There is more."})
        rows.append({"id": str(number), "image": image, "conversations": says})
    write(folder / "ShareGPT4V" / "share-captioner_coco_lcs_sam_1246k_1107.json", json.dumps(rows))
    downloads = folder / "downloads"
    for name in ("sharegpt4v-1k", "urban1k", "coco-5k", "flickr30k-31k", "docci", "dci"):
        RETRIEVAL[name](downloads)
    imagenet_folders(downloads)
    imagenet_v2(downloads)
    write_pictures(downloads / "imagenet-o", "n01491361/a.JPEG", "n01443537/b.JPEG")
    for name in CIFAR:
        cifar(name, downloads)
    write_open_clip(folder / "site", different=2)
    return folder


def run(command: list[str], place: Path) -> str:
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(place), str(place / "site")))}
    done = fork_server.run([sys.executable, *command], cwd=place, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_command_runs(place: Path) -> None:
    """In the order of the page, as one process without a GPU. What Slurm runs is another test's."""
    seen, printed = [], ""
    for command in COMMANDS:
        if command[0] == "sbatch":
            continue
        if command[:2] == ["accelerate", "launch"]:
            assert (ROOT / command[3]).is_file()
            command = ["python", *command[4:], *SMALL]
        elif command[1] == "evaluation/run.py":
            command = [*command, "--resamples", "100", "--no_effective_length", "--quiet"]
        seen.append(command[1] if command[1] != "-m" else command[2])
        printed = run(command[1:], place)
    assert seen.count("conversion/stretch.py") == 3 and seen.count("training/train.py") == 3
    assert seen[-2:] == ["evaluation/run.py", "examples.reproduce.compare"]
    # The last one printed our figures beside those of the paper, for every benchmark of the page.
    results = read_results(place / "evaluation-results" / "results.json")
    for info in results.benchmarks:
        assert f"## {info.name}\n" in printed
    assert printed.count("| **tuned-b16**, measured here |") == len(results.benchmarks) == 11


def test_what_slurm_runs(tmp_path: Path) -> None:
    """The batch file, with commands that say what they were given: training understands it."""
    for name, does in {
        "scontrol": "echo node1; echo node2",
        "srun": '"$@"',
        "accelerate": 'printf "%s\\n" "$@"',
    }.items():
        write(tmp_path / "bin" / name, f"#!/bin/bash\n{does}\n").chmod(0o755)
    (command,) = (command for command in COMMANDS if command[0] == "sbatch")
    exported = dict(part.split("=") for part in command[1].removeprefix("--export=ALL,").split(","))
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_PROCID": "1"}
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **exported, **slurm}
    said = subprocess.run(["bash", ROOT / command[2]], env=env, check=True, capture_output=True, text=True).stdout
    words = said.splitlines()
    launcher, training = words[: words.index("training/train.py")], words[words.index("training/train.py") + 1 :]
    given = dict(zip(launcher[2::2], launcher[3::2], strict=True))
    assert (
        given["--num_processes"] == "16" and given["--machine_rank"] == "1" and given["--main_process_ip"] == "node1"
    )
    settings = parse([*training, "--use_cpu", "--fp16", "False"])
    assert (settings.model.model, settings.training.output_dir) == ("long-clip-b16", "tuned-b16")
    assert settings.data.data == "ShareGPT4V/share-captioner_coco_lcs_sam_1246k_1107.json"
    assert settings.training.per_device_train_batch_size * 16 == 2048


def test_rows_of_tables_4_and_5_are_known() -> None:
    strategies = re.findall(r"^\| table .*\| ([\w-]+) \|$", PAGE, re.MULTILINE)
    assert len(strategies) == 7
    for strategy in strategies:
        parse(["--model", "m", "--data", "d", "--output_dir", "o", "--use_cpu", "--strategy", strategy])
    for recipe in re.findall(r"--recipe (\w+)", PAGE):
        assert (RECIPES / f"{recipe}.yaml").is_file()


def test_published_figures() -> None:
    published = read_published()
    assert {line.metric for line in published} <= set(METRICS)
    assert {line.backbone for line in published} == {"B/16", "L/14"}
    assert {line.benchmark for line in published} - set(BENCHMARKS) == {"urban-200"}
    assert all(0 < line.percent <= 100 and line.protocol for line in published)
    found = {(p.backbone, p.benchmark, p.model, p.metric, p.protocol): p.percent for p in published}
    assert len(found) == len(published)
    of_paper = {key[:4]: percent for key, percent in found.items()}
    # Three of the paper, by hand.
    assert of_paper["B/16", "imagenet", "Long-CLIP", "top1"] == 67.1
    assert of_paper["B/16", "coco-5k", "direct fine-tuning", "t2i_r1"] == 21.8
    assert of_paper["L/14", "flickr30k-31k", "Long-CLIP", "t2i_r10"] == 71.4


def test_ours_stand_beside_theirs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(sample_results(), tmp_path / "results.json")
    assert main([str(tmp_path / "results.json")]) == 0
    printed = capsys.readouterr().out
    urban = printed.split("## Urban1k\n")[1].split("\n## ")[0]
    assert "| **long-clip-vit-base-patch16**, measured here | **67.4** |" in urban
    assert "| DeBias-CLIP | 93.1 | 93.0 | 1,000 pairs |" in urban
    assert "Published and not measured here: " in printed and "ImageNet-V2" in printed
    one = replace(sample_results().benchmarks[0], name="my photos")
    text = compare(replace(sample_results(), benchmarks=[one], scores=[]), read_published())
    assert text.startswith("Not published, as far as published.csv knows: my photos.")


def test_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "results.json")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
