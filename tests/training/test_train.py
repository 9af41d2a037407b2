"""`training/train.py`: its command line, its recipes, its errors, several processes, and runs that are killed."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import fork_server
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, CLIPModel, TrainingArguments

from longclip_hf.command import one_line
from longclip_hf.training.arguments import LongCLIPTrainingArguments
from longclip_hf.training.settings import DataArguments, MethodSettings, ModelArguments
from longclip_hf.training.train import RECIPES, SHOWN, main, parse, recipe_names
from modeling_longclip import LongCLIPModel

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "training" / "train.py"


def words(line: str) -> list[str]:
    return line.split()


# What every run here is told: tiny batches on the CPU, and silence.
QUIET = words(
    "--use_cpu --dataloader_pin_memory False --report_to none --disable_tqdm True --num_components 4 "
    "--heldout_rows 4 --learning_rate 1e-3 --warmup_steps 2"
)


def png(number: int) -> bytes:
    rng = random.Random(number)
    image = Image.new("RGB", (40, 32), tuple(rng.randrange(256) for _ in range(3)))
    image.paste(tuple(rng.randrange(256) for _ in range(3)), (rng.randrange(20), rng.randrange(16), 40, 32))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def caption(number: int, length: int | None = None) -> str:
    rng = random.Random(1000 + number)
    known = words("dog beach red bicycle wall door window street taxi tree house roof sky rain woman coat man cat")
    long = " ".join(rng.choice(known) for _ in range(length or rng.randrange(5, 60)))
    return f"A {rng.choice(known)} and a {rng.choice(known)}. {long}."


def write_photos(folder: Path, captions: Sequence[str | list[str]]) -> Path:
    folder.mkdir()
    lines = []
    for number, text in enumerate(captions):
        (folder / f"{number:03}.png").write_bytes(png(number))
        lines.append(json.dumps({"file_name": f"{number:03}.png", "caption": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """44 pictures with captions beside them. Read only."""
    return write_photos(tmp_path_factory.mktemp("data") / "photos", [caption(number) for number in range(44)])


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in three shards. Read only."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(shard * 15, shard * 15 + 15):
                for extension, content in (("png", png(number)), ("txt", caption(number).encode())):
                    member = tarfile.TarInfo(f"{number:04}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """No network, one thread, and a cache of this session for `datasets`."""
    return {**os.environ, **fork_server.variables(), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


@pytest.fixture
def command(environment: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*given: Any) -> subprocess.CompletedProcess[str]:
        return fork_server.run([sys.executable, str(SCRIPT), *map(str, given)], cwd=tmp_path, env=environment)

    return run


def table(photos: Path) -> list[str]:
    return ["--data", str(photos), "--data_format", "imagefolder"]


def stream(shards: Path) -> list[str]:
    return f"--data {shards}/*.tar --data_format webdataset --image_column png --long_column txt".split()


# The command line


def refused(capfd: pytest.CaptureFixture[str], *given: str) -> str:
    """What is said after `error: `, the only line."""
    try:
        code = main(list(given))
    except SystemExit as stop:
        code = stop.code
    said = capfd.readouterr()
    assert code == 2, said.err
    lines = [line for line in said.err.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "Traceback" not in said.err, said.err
    return lines[0].removeprefix("error: ")


def test_settings_are_the_dataclasses() -> None:
    settings = parse(["--model", "m", "--data", "d", "--strategy", "bounded", "--num_components", "0.9", "--use_cpu"])
    assert (settings.model.model, settings.data.data) == ("m", "d")
    assert settings.training.strategy == "bounded" and settings.training.components == 0.9
    for part, given in ((ModelArguments, settings.model), (DataArguments, settings.data)):
        assert type(given) is part
        for field in fields(part):
            if field.name not in ("model", "data"):
                assert getattr(given, field.name) == field.default, field.name
    assert type(settings.training) is LongCLIPTrainingArguments


def test_the_command_line_wins_over_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "model: from-recipe\ndata: d\nlearning_rate: 1e-4\nnum_train_epochs: 7\nuse_cpu: true\nshort_column:\n"
        "label_names: [a, b]\nlr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1.0e-7}\n"
        "streaming: false\n"
    )
    for named in (["--recipe", str(recipe)], [f"--recipe={recipe}"]):
        settings = parse(["--model", "mine", *named, "--learning_rate", "5e-4"])
        training = settings.training
        assert settings.model.model == "mine" and settings.data.short_column is None and not settings.data.streaming
        assert (training.learning_rate, training.num_train_epochs, training.use_cpu) == (5e-4, 7, True)
        assert training.lr_scheduler_kwargs == {"min_lr": 1e-7} and training.label_names == ["a", "b"]


def test_bad_settings_are_one_line_and_exit_code_2(
    tmp_path: Path, photos: Path, clip_folder: Path, longclip_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(longclip_folder), *table(photos), *QUIET, "--output_dir", str(tmp_path / "out")]
    recipe = tmp_path / "r.yaml"

    def with_recipe(text: str) -> str:
        recipe.write_text(text)
        return refused(capfd, *given, "--recipe", str(recipe))

    assert "'learning_rat'; 'learning_rate' is the nearest" in with_recipe("learning_rat: 1e-4")
    assert "there is no setting 'zzz'." in with_recipe("zzz: 1")
    assert "is not YAML" in with_recipe("a: [")
    assert "found a list" in with_recipe("- a")
    assert "invalid float value: 'fast'" in with_recipe("learning_rate: fast")
    for text in ("[" * 5000, "seed: " + "[" * 5000 + "]" * 5000, "seed: {a: {b: {c: {d: 1}}}}", "seed: &a [*a]"):
        assert re.search("is not YAML|seed must be a number, a text", with_recipe(text)), text[:40]
    assert "invalid float value" in with_recipe("learning_rate: {a: 1}")
    assert "is not YAML" in with_recipe("seed: 2001-13-45") and "invalid int value" in with_recipe("max_steps: 1.5")
    assert "is not YAML" in with_recipe("\x00")
    assert "laptop, paper, released" in refused(capfd, *given, "--recipe", "nope")
    assert "required: --data" in refused(capfd, "--model", "m")
    assert "unrecognized arguments: --nonsense" in refused(capfd, *given, "--nonsense", "3")
    assert "unrecognized arguments: --learning" in refused(capfd, *given, "--learning", "3")  # no abbreviations
    assert "sharegpt4v" in refused(capfd, *given, "--data_format", "sharegpt4v")
    assert "must be at least 0" in refused(capfd, *given, "--heldout_rows", "-1")
    assert "sometimes" in refused(capfd, *given, "--strategy", "sometimes")
    assert "chunk" in refused(capfd, *given, "--cache_chunk_size", "-1")
    assert "does not load" in refused(capfd, *given, "--model", str(tmp_path / "nothing"))
    assert "reads 77 tokens. Stretch it first" in refused(capfd, *given, "--model", str(clip_folder))
    assert "no column 'text'" in refused(capfd, *given, "--long_column", "text")
    assert "hold out fewer" in refused(capfd, *given, "--heldout_rows", "44")
    assert "40 rows to train on, fewer than one batch of 41" in refused(
        capfd, *given, "--per_device_train_batch_size", "41"
    )
    assert "principal" in refused(capfd, *given, "--per_device_train_batch_size", "5").replace("primary", "principal")
    assert "--max_steps" in refused(capfd, *given, "--streaming")
    assert str(tmp_path / "none") in refused(capfd, *given, "--data", str(tmp_path / "none"))
    half = tmp_path / "out" / "checkpoint-2"
    half.mkdir(parents=True)
    assert "written whole" in refused(capfd, *given, "--resume_from_checkpoint", str(half))


def test_errors_of_dataloader_workers_are_one_line() -> None:
    caught = ValueError("Caught ValueError in DataLoader worker process 0.\nTraceback:\n  x\nValueError: Row 3\n")
    assert one_line(caught) == "Row 3"
    assert one_line(OSError(2, "No such file", "a\nb")) == "[Errno 2] No such file: 'a\\nb'"
    assert one_line(ValueError()) == "ValueError"


def test_help_teaches(command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = command("--help")
    assert done.returncode == 0 and not done.stderr
    for field in (*fields(ModelArguments), *fields(DataArguments)):
        assert f"--{field.name}" in done.stdout, field.name
    theirs = {field.name for field in fields(TrainingArguments)}
    assert set(SHOWN) <= theirs
    for name in {field.name for field in fields(LongCLIPTrainingArguments)}:
        shown = f"  --{name} " in done.stdout or f"  --{name}\n" in done.stdout
        assert shown == (name in SHOWN or name in {field.name for field in fields(MethodSettings)}), name
    for word in ("accelerate launch", "--recipe laptop", "conversion/stretch.py", "--help_all"):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 119


# Recipes. Worked from long_clip_facts.md: what the paper and the released code say, column by column.

SAID = {
    "data_format": ("sharegpt4v", "sharegpt4v"),
    "heldout_rows": (1000, 1000),
    "num_train_epochs": (6, 2),
    "weight_decay": (0.01, 0.01),
    "adam_beta1": (0.9, 0.9),
    "adam_beta2": (0.999, 0.999),
    "adam_epsilon": (1e-8, 1e-8),
    "warmup_steps": (200, 200),
    "num_components": (32, 32),
    "strategy": ("primary-component", "primary-component"),
    "first_sentence": ("released", "released"),
    "learning_rate": (1e-6, 1e-6),  # the paper's 1e-4 is a typo
    "lr_scheduler_type": ("cosine", "cosine"),
    "max_grad_norm": (0, 0),
    "components_scope": ("global", "local"),
    "short_loss_weight": (1.0, 1.0),
    "label_smoothing_factor": (0.0, 0.1),
    "logit_scale": (None, 100),
    "max_logit_scale": (None, None),
    "decay_all": (False, True),
    "fp16": (False, True),
}
BATCH = {"paper": (256, 8), "released": (128, 16)}


@pytest.mark.parametrize("recipe", ["paper", "released"])
def test_recipes_say_what_paper_and_code_say(recipe: str) -> None:
    overruled = ["--fp16", "False"] if recipe == "released" else []  # no CPU has it
    settings = parse(["--recipe", recipe, "--model", "m", "--data", "d", "--image_root", "r", "--use_cpu", *overruled])
    values = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    for name, said in SAID.items():
        expected = said[("paper", "released").index(recipe)]
        part = settings.data if hasattr(settings.data, name) else settings.training
        found = values["fp16"] if overruled and name == "fp16" else getattr(part, name)
        assert found == expected, name
    per_device, devices = BATCH[recipe]
    assert settings.training.per_device_train_batch_size == per_device and per_device * devices == 2048
    of_the_machine = {"per_device_train_batch_size", "dataloader_num_workers", "dataloader_persistent_workers"}
    assert set(values) <= set(SAID) | of_the_machine, "a value that no source says"


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("debias", {"strategy": "debias", "draws_short": True, "short_prefix": "tokens", "components": 32}),
        ("himo", {"strategy": "himo", "components_of": "text", "components": 0.9, "num_train_epochs": 10}),
    ],
)
def test_recipes_of_successors(recipe: str, said: dict[str, Any]) -> None:
    """They say what their strategy is, though it is its default; what nobody says is as released."""
    given = ["--recipe", recipe, "--model", "m", "--data", "d", "--image_root", "r", "--use_cpu"]
    training = parse(given).training
    assert {name: getattr(training, name) for name in said} == said
    text = (RECIPES / f"{recipe}.yaml").read_text()
    released = yaml.safe_load((RECIPES / "released.yaml").read_text())
    assumed = [line.partition(":")[0] for line in text.splitlines() if "# not said" in line]
    assert assumed and all(yaml.safe_load(text)[name] == released[name] for name in assumed)


def test_every_recipe_says_where_its_values_come_from() -> None:
    assert recipe_names() == ["debias", "himo", "laptop", "paper", "released"]
    for recipe in ("paper", "released", "debias", "himo"):
        for line in (RECIPES / f"{recipe}.yaml").read_text().splitlines():
            assert not line or line.startswith("#") or " # " in line, line
    settings = parse(["--recipe", "laptop", "--model", "m", "--data", "d", "--use_cpu"])
    assert settings.training.per_device_train_batch_size > settings.training.num_components + 1


def test_launcher_files_load() -> None:
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    files = sorted((RECIPES / "accelerate").glob("*.yaml"))
    assert [file.stem for file in files] == ["deepspeed", "eight_gpus", "fsdp2", "one_gpu", "several_nodes"]
    for file in files:
        loaded = config_args.load_config_from_file(str(file))
        assert loaded.num_processes == {"one_gpu": 1, "several_nodes": 16}.get(file.stem, 8)


# One run from end to end


@pytest.fixture(scope="session")
def bad_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 44 rows, row 10 is a broken picture, row 20 has no caption, and rows 30 and 31 have too long ones."""
    captions: list[str | list[str]] = [caption(number) for number in range(44)]
    captions[4:20] = [[caption(number), caption(100 + number), caption(200 + number)] for number in range(4, 20)]
    captions[20] = "   "
    captions[30], captions[31] = caption(30, 400), caption(31, 400)
    folder = write_photos(tmp_path_factory.mktemp("data") / "bad", captions)
    (folder / "010.png").write_bytes(b"not a picture")
    return folder


def test_end_to_end(
    command: Callable[..., subprocess.CompletedProcess[str]], bad_photos: Path, longclip_folder: Path, tmp_path: Path
) -> None:
    given = ["--model", longclip_folder, *table(bad_photos), *QUIET, "--per_device_train_batch_size", 8]
    done = command(*given, "--num_train_epochs", 2, "--logging_steps", 3, "--output_dir", "out")
    assert done.returncode == 0, done.stderr
    assert "80 images with captions were trained on. 4 bad rows: 2 unreadable, 2 empty_caption." in done.stdout
    assert "Each row once, these are 2 bad rows: 1 unreadable, 1 empty_caption (bad_rows.jsonl names" in done.stdout
    assert "cut at the model's length: 4." in done.stdout
    found = "images from 'file_name', captions from 'caption', short ones: their first sentences."
    assert f"{bad_photos}: {found}\n" in done.stdout
    assert (tmp_path / "out" / "curves.png").is_file()
    metrics = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert 0 <= metrics["eval_long_i2t_r1"] <= 1 and f"{metrics['eval_short_t2i_r5']:.2f}"[:3] in done.stdout
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (longclip_folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    table_name = "text_model.embeddings.position_embedding.weight"
    assert torch.equal(before[table_name][:20], after[table_name][:20])
    assert not torch.equal(before[table_name][20:40], after[table_name][20:40])
    assert AutoModel.from_pretrained(tmp_path / "out").config.text_config.max_position_embeddings == 248

    strict = command(*given, "--on_bad_row", "error", "--dataloader_num_workers", 1, "--output_dir", "strict")
    assert strict.returncode == 2
    said = [line for line in strict.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "Traceback" not in strict.stderr
    assert re.search(r": (Line 11 of \S*metadata\.jsonl .*010\.png|Line 21 of \S*metadata\.jsonl .*caption)", said[0])


def test_a_clip_that_was_not_stretched(photos: Path, clip_folder: Path, tmp_path: Path, capsys: Any) -> None:
    """The control of 77 positions: its own length, no row fixed, and a checkpoint that stock CLIP reads."""
    given = ["--model", str(clip_folder), *table(photos), *QUIET, "--output_dir", str(tmp_path / "out")]
    given += words("--per_device_train_batch_size 8 --max_steps 2 --strategy debias --shuffle_sentences False")
    assert main([*given, *words("--train_length 30 --keep 0 --sentence_dropout 0.2 --hard_negative_margin 0.5")]) == 0
    assert "Long captions cut at 30 tokens (train_length): " in capsys.readouterr().out
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (clip_folder, tmp_path / "out"))
    name = "text_model.embeddings.position_embedding.weight"
    moved = (before[name] != after[name]).any(dim=1)
    assert moved[:20].all() and not moved[30:].any()
    assert CLIPModel.from_pretrained(tmp_path / "out").config.text_config.max_position_embeddings == 77


def test_weights_of_16_bits_are_trained_in_float32(photos: Path, longclip_folder: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    LongCLIPModel.from_pretrained(longclip_folder).half().save_pretrained(half)
    AutoProcessor.from_pretrained(longclip_folder).save_pretrained(half)
    assert parsed_dtype(half) == "float16"
    sizes = words("--per_device_train_batch_size 8 --max_steps 1")
    given = ["--model", str(half), *table(photos), *QUIET, *sizes, "--output_dir", str(tmp_path / "out")]
    assert main(given) == 0
    assert {weight.dtype for weight in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


def parsed_dtype(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text())
    return config.get("dtype", config.get("torch_dtype"))


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_interrupted(
    sent: signal.Signals, code: int, environment: dict[str, str], photos: Path, longclip_folder: Path, tmp_path: Path
) -> None:
    given = [*table(photos), *QUIET, *SAVING, "--max_steps", "100000", "--dataloader_num_workers", "1"]
    line = [sys.executable, str(SCRIPT), "--model", str(longclip_folder), *given, "--output_dir", "out"]
    with fork_server.Fork(line, cwd=tmp_path, env=environment) as process:
        limit = time.monotonic() + 120
        while not list(tmp_path.glob("out/checkpoint-*/COMPLETE.json")) and time.monotonic() < limit:
            time.sleep(0.1)
        assert list(tmp_path.glob("out/checkpoint-*/COMPLETE.json")), process.printed()
        process.send_signal(sent)
        _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "Traceback" not in said and "Interrupted; the same command goes on" in said


# Killed


SAVING = words("--per_device_train_batch_size 8 --save_steps 2 --save_total_limit 1 --logging_steps 3")
KILLS: dict[str, list[list[Any]]] = {
    "never": [],
    "before the first checkpoint": [["in a step", 2]],
    "in the second epoch": [["in a step", 9]],
    "twice": [["in a step", 4], ["in a step", 4]],
    "weights written": [["weights written", 2]],
    "half a file": [["half a file", 6]],
    "before the mark": [["before the mark", 2]],
    "after the mark": [["after the mark", 2]],
    "an older one half deleted": [["half deleted", 1]],
    "before the export": [["before the export", 1]],
    "after the export": [["after the export", 1]],
}
SOME = ["never", "in the second epoch", "half a file", "before the export"]


def killed_runs(
    kills: dict[str, list[list[Any]]], given: list[Any], tmp_path: Path, environment: dict[str, str]
) -> dict[str, Any]:
    given = [str(word) for word in given]
    runs = [
        {"name": name, "args": given, "output": str(tmp_path / f"run{number}"), "kills": how}
        for number, (name, how) in enumerate(kills.items())
    ]
    script = str(Path(__file__).with_name("killed.py"))
    done = fork_server.run([sys.executable, script], input=json.dumps(runs), env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    for run in runs:
        results[run["name"]]["output"] = Path(run["output"])
    return results


def assert_equal_to_the_run_that_was_never_killed(results: dict[str, Any], kills: dict[str, list[list[Any]]]) -> None:
    expected = load_file(results["never"]["output"] / "model.safetensors")
    said = results["never"]["log"].strip().splitlines()[-1]
    for name, result in results.items():
        assert result["codes"][-1] == 0 and len(result["codes"]) == len(kills[name]) + 1, (name, result["log"])
        if "time" not in name:
            assert result["codes"][:-1] == [-signal.SIGKILL] * len(kills[name]), (name, result["log"])
        steps = [step or 0 for step in result["left"]]  # each was loaded in full
        assert steps == sorted(steps), f"{name}: a complete checkpoint was lost, {steps}"
        assert result["incomplete"] == [], name
        found = load_file(result["output"] / "model.safetensors")
        assert found.keys() == expected.keys()
        different = [key for key in expected if not torch.equal(expected[key], found[key])]
        assert not different, (name, different)
        assert result["log"].strip().splitlines()[-1] == said, name  # counts of what was skipped and cut, too


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", ["table", "stream"])
def test_killed_at_any_moment_it_ends_bit_equal(
    source: str,
    workers: int,
    bad_photos: Path,
    shards: Path,
    longclip_folder: Path,
    tmp_path: Path,
    environment: dict[str, str],
) -> None:
    # The table's epochs have 5 steps; the stream's passes 41 rows, so 10 steps are almost two.
    data = [*table(bad_photos), "--num_train_epochs", 2] if source == "table" else stream(shards)
    data += [] if source == "table" else ["--max_steps", 10, "--shuffle_buffer", 6]
    given = ["--model", longclip_folder, *data, *QUIET, *SAVING, "--dataloader_num_workers", workers]
    whole = source == "table" and workers == 0
    kills = KILLS if whole else {name: KILLS[name] for name in SOME}
    if not whole and workers:
        rng = random.Random(0)
        kills = {**kills, "at random times": [["time", round(rng.uniform(0.3, 1.5), 2)] for _ in range(4)]}
    results = killed_runs(kills, given, tmp_path, environment)
    assert_equal_to_the_run_that_was_never_killed(results, kills)
    last = results["never"]["log"].strip().splitlines()[-1]
    assert "80 images" in last and ("4 bad rows" if source == "table" else "0 bad rows") in last


@pytest.mark.slow
def test_killed_with_accumulation_and_adapters(
    photos: Path, longclip_folder: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """Epochs of 5 batches are steps of 2, 2 and 1."""
    pytest.importorskip("peft")
    given = ["--model", longclip_folder, *table(photos), *QUIET, *SAVING, "--num_train_epochs", 2]
    given += ["--gradient_accumulation_steps", 2, "--lora_rank", 2]
    kills = {"never": [], "in the second epoch": [["in a step", 9]]}
    assert_equal_to_the_run_that_was_never_killed(killed_runs(kills, given, tmp_path, environment), kills)


# Several processes

SHARDED = Path(__file__).with_name("sharded.py")
FSDP2 = words(
    "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --fsdp_reshard_after_forward true "
    "--fsdp_transformer_layer_cls_to_wrap CLIPEncoderLayer --fsdp_state_dict_type"
)


LAUNCH = words("--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no")
Several = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def two_processes(environment: dict[str, str], tmp_path: Path) -> Several:
    """Two processes with the environment that `accelerate launch` makes; gloo, because `--use_cpu`."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    def run(kind: str, *given: Any, state_dict_type: str = "FULL_STATE_DICT") -> subprocess.CompletedProcess[str]:
        how = ["--multi_gpu"] if kind == "ddp" else [*FSDP2, state_dict_type]
        script = str(SCRIPT if kind == "ddp" else SHARDED)
        launched = prepare_multi_gpu_env(launch_command_parser().parse_args([*LAUNCH, *how, script]))
        own = {name: value for name, value in launched.items() if name not in os.environ}
        line = [sys.executable, script, *map(str, given)]
        done = fork_server.run_ranks(line, 2, cwd=tmp_path, env=environment | own)
        worst = max(done, key=lambda one: abs(one.returncode))
        printed, errors = ("".join(getattr(one, stream) for one in reversed(done)) for stream in ("stdout", "stderr"))
        return subprocess.CompletedProcess(worst.args, worst.returncode, printed, errors)

    return run


TWO = words("--components_scope global --max_steps 4 --save_strategy no --logging_steps 1 --max_grad_norm 0")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "chunk"), [("ddp", 0), ("fsdp2", 3)])
def test_two_processes_equal_one_with_twice_the_batch(
    kind: str, chunk: int, command: Callable[..., subprocess.CompletedProcess[str]], two_processes: Several,
    bad_photos: Path, longclip_folder: Path, tmp_path: Path,
) -> None:  # fmt: skip
    # The gradient of the keys' biases is zero but for rounding, which Adam without an epsilon would blow up to steps.
    given = ["--model", longclip_folder, *table(bad_photos), *QUIET, *TWO, "--warmup_steps", 0, "--adam_epsilon", 1e-3]
    one = command(*given, "--per_device_train_batch_size", 16, "--output_dir", "one")
    assert one.returncode == 0, one.stderr
    given += ["--per_device_train_batch_size", 8, "--cache_chunk_size", chunk, "--output_dir", "two"]
    two = two_processes(kind, *given)
    assert two.returncode == 0, two.stderr
    start, alone, together = (
        load_file(Path(folder) / "model.safetensors")
        for folder in (longclip_folder, tmp_path / "one", tmp_path / "two")
    )
    moved = max((alone[key] - start[key]).abs().max() for key in alone)
    apart = max((alone[key] - together[key]).abs().max() for key in alone)
    print(f"moved {moved:.2e}, apart {apart:.2e}")
    assert moved > 1e-3 and apart < 2e-5
    assert one.stdout.strip().splitlines()[-1] == two.stdout.strip().splitlines()[-1]  # counts of all processes


@pytest.mark.slow
def test_one_process_with_bad_data_ends_all(
    environment: dict[str, str], bad_photos: Path, longclip_folder: Path, tmp_path: Path
) -> None:
    """By the true launcher, whose part it is."""
    given = ["--model", longclip_folder, *table(bad_photos), *QUIET, *TWO, "--per_device_train_batch_size", 8]
    port = ["--multi_gpu", "--main_process_port", fork_server.ranks(2)[0]["MASTER_PORT"]]
    line = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *LAUNCH, *port, SCRIPT, *given]
    begin = time.monotonic()
    done = subprocess.run(
        [*map(str, line), "--on_bad_row", "error", "--output_dir", "out"],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and time.monotonic() - begin < 150  # a group waits for half an hour
    assert "cannot be trained on" in done.stderr and "error (process " in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_save_full_checkpoints_and_go_on_from_them(
    kind: str, two_processes: Several, photos: Path, longclip_folder: Path, tmp_path: Path,
) -> None:  # fmt: skip
    given = ["--model", longclip_folder, *table(photos), *QUIET, *TWO, "--save_strategy", "steps", "--save_steps", 2]
    given += ["--per_device_train_batch_size", 8, "--output_dir", "out"]
    code = {"modeling_longclip.py", "configuration_longclip.py", "compat.py", "defaults.py"}
    start = load_file(longclip_folder / "model.safetensors")
    kept = "text_model.embeddings.position_embedding.weight"
    for attempt in ("whole", "resumed"):
        done = two_processes(kind, *given)
        assert done.returncode == 0, done.stderr
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert {key: value.shape for key, value in found.items()} == {key: v.shape for key, v in start.items()}
        assert torch.equal(found[kept][:20], start[kept][:20]) and not torch.equal(found[kept], start[kept])
        for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
            assert {file.name for file in folder.glob("*.py")} == code
            AutoModel.from_pretrained(folder)
        if attempt == "whole":
            shutil.move(tmp_path / "out" / "model.safetensors", tmp_path / "whole")
            shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    assert "Going on from out/checkpoint-2." in done.stdout
    whole = load_file(tmp_path / "whole")
    assert all(torch.equal(whole[key], found[key]) for key in whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("state_dict_type", "given", "message"),
    [
        ("SHARDED_STATE_DICT", [], "state_dict_type is SHARDED_STATE_DICT.*fsdp_state_dict_type: FULL_STATE_DICT"),
        ("FULL_STATE_DICT", ["--lora_rank", 2], "not merged under FSDP: train them with DDP"),
        ("FULL_STATE_DICT", ["--distillation", 1], "gave its weights to one alone.*ram_efficient_loading: false"),
    ],
)
def test_what_fsdp2_could_not_save_is_refused(
    state_dict_type: str, given: list[Any], message: str, photos: Path, longclip_folder: Path, two_processes: Several,
) -> None:  # fmt: skip
    settings = ["--model", longclip_folder, *table(photos), *QUIET, *TWO, "--output_dir", "out"]
    settings += ["--per_device_train_batch_size", 8, *given]
    done = two_processes("fsdp2", *settings, state_dict_type=state_dict_type)
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr
