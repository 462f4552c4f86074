"""Thousands of damaged and hostile files: each is read, or refused in one line; nothing is run, memory is kept.

Every reader has a valid file, which is mutated (see tests/mutations.py) by a generator of a fixed seed. Counts are
printed (pytest -s). The quick tests take a few of each; those behind the marker ``slow`` more, and other ones.
"""

import contextlib
import functools
import io
import json
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

import mutations as m
import numpy as np
import pytest
import watch
from cifar_samples import NAMES, contents
from conftest import ROOT, load_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_runs import FEW, trainer, whole

from minivit import ViT, ViTConfig
from minivit.base.errors import InputError
from minivit.base.settings import field_names
from minivit.commands import cli
from minivit.data import load, read_image
from minivit.evaluation.metrics import read_real
from minivit.evaluation.runs import records_of, summary_of
from minivit.evaluation.vtab import load_task
from minivit.figures.curves import save_curves
from minivit.training import sweep
from minivit.training.config import TrainConfig, train_config_of
from minivit.training.folder import LAST, METRICS, SETTINGS, SUMMARY
from minivit.training.plan import plan_of
from minivit.training.recipes import prepare, read_recipe
from minivit.training.task import Classification
from minivit.weights import checkpoint, layouts, tensor_files

QUICK, SLOW = 1_200, 10_500  # inputs in all


@functools.cache
def run_files():
    """The files of a small finished run, {name: bytes}."""
    return {path.name: path.read_bytes() for path in whole().iterdir()}


@functools.cache
def weights(layout):
    """The files of a small model in a layout of another program, {name: bytes}."""
    config = ViTConfig(
        image_size=8, patch_size=4, channels=3, num_classes=3, width=8, depth=2, num_heads=2, mlp_dim=16,
        gelu="tanh" if layout == "official" else "erf",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / ("w.npz" if layout == "official" else "w")
        paths = layouts.write(place, ViT(config, seed=1), layout, class_names=["a", "b", "c"])
        return {path.name: path.read_bytes() for path in map(Path, paths)}


@functools.cache
def images():
    """A small image in each format, {name: bytes}."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (12, 9, 3), dtype=np.uint8))
    with tempfile.TemporaryDirectory() as folder:
        for suffix in ("png", "jpg", "gif", "bmp", "webp"):
            image.save(Path(folder) / f"x.{suffix}")
        image.convert("RGBA").save(Path(folder) / "a.png")
        image.convert("P").save(Path(folder) / "p.png")
        image.save(
            Path(folder) / "e.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
        )
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def put(folder, files):
    """Write files, {name: bytes}; returns how many bytes they are."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return sum(map(len, files.values()))


# ---- the readers: each makes the files of one input, and returns what reads them -------------------------------------


def with_meta(data, change):
    """A checkpoint's bytes with other meta: ``change(meta)`` is its tree."""
    members = dict(m.members_of(data))
    meta = json.loads(str(np.load(io.BytesIO(members["meta.npy"]))))
    file = io.BytesIO()
    text = m.json_text(change(meta)).encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    np.save(file, np.array(text))
    return m.zip_of([*((k, v) for k, v in members.items() if k != "meta.npy"), ("meta.npy", file.getvalue())])


def of_checkpoint(folder, random):
    data = run_files()[LAST]
    data = m.npz(data, random) if random.random() < 0.5 else with_meta(data, lambda tree: m.json_tree(tree, random))
    return put(folder, {"x.npz": data}), lambda: checkpoint.load_model(folder / "x.npz")


def of_resume(folder, random):
    data = with_meta(run_files()[LAST], lambda tree: m.json_tree(tree, random))
    if random.random() < 0.2:
        data = m.npz(data, random)

    def read():
        arrays, record = checkpoint.read(folder / LAST)
        config = train_config_of(record)
        trainer(folder, config, model=record.config, resume=(arrays, record))

    return put(folder, {LAST: data}), read


def of_weights(layout, folder, random):
    files = dict(weights(layout))
    name = random.choice(list(files))
    change = {".npz": m.npz, ".safetensors": m.safetensors}.get(Path(name).suffix, m.json_file)
    files[name] = change(files[name], random)
    path = folder / "w.npz" if layout == "official" else folder
    return put(folder, files), lambda: layouts.load_any(path)


def of_tensors(folder, random):
    layout = random.choice(("official", "timm"))
    name, data = next((k, v) for k, v in weights(layout).items() if not k.endswith("json"))
    data = (m.npz if layout == "official" else m.safetensors)(data, random)

    def read():
        for tensor in tensor_files.open_tensors(folder / name).values():
            with tensor_files.refused(name):
                tensor.read()

    return put(folder, {name: data}), read


def of_cifar(name, form, folder, random):
    files = contents(name, form)
    if random.random() < 0.3:
        names = b"\n".join(b"class %d" % k for k in range(10 if name == "cifar10" else 100)) + b"\n"
        files["batches.meta.txt" if name == "cifar10" else "fine_label_names.txt"] = names
    if random.random() < 0.3:
        size = put(folder, {"x.tar.gz": m.tar_gz(files, random)})
        return size, lambda: load(name, folder / "x.tar.gz")
    changed = random.choice(list(files))
    files[changed] = m.mutate(files[changed], random)
    return put(folder, files), lambda: load(name, folder)


def of_image(folder, random):
    name = random.choice(list(images()))
    return put(folder, {name: m.mutate(images()[name], random)}), lambda: read_image(folder / name, 8)


def of_folder(folder, random):
    name = random.choice(list(images()))
    files = {f"{split}/{c}/{name}": images()[name] for split in ("train", "test") for c in ("cat", "dog")}
    kind, victim = random.randrange(4), random.choice(list(files))
    if kind == 0:
        files[victim] = m.mutate(files[victim], random)
    elif kind == 1:
        data = files.pop(victim)
        files[random.choice(("train/cat/.hidden.png", "train/x.png", "test/bird/x.png", "train/cat/x\udcff.png",
                             "train/a\nb/x.png", "train/cat/sub/x.png", "x"))] = data  # fmt: skip
    elif kind == 2:
        del files[victim]
    size = put(folder, files)
    if kind == 3:
        (folder / "train/cat/link.png").symlink_to(
            random.choice(("/etc/passwd", "..", "link.png", "nowhere", "/dev/zero"))
        )
    kind = random.choice(("folder", "imagefolder"))

    def read():
        data = load(kind, folder, image_size=8)
        return [images[np.arange(len(images))] for images in (data.train_images, data.test_images)]

    return size, read


def of_list(folder, random):
    data = images()["x.png"]
    files = {f"train/{c}/{i}.png": data for c in ("cat", "dog") for i in range(2)}
    files |= {f"val/v{i}.png": data for i in range(4)}
    lines = random.choice((
        b"v0.png cat\nv1.png dog\nv2.png cat\nv3.png dog\n", b"v0.png,0\nv1.png,1\nv2.png,0\nv3.png,1\n",
        b"ImageId,PredictionString\nv0,cat\nv1,dog\nv2,cat\nv3,dog\n", b"cat\ndog\ncat\ndog\n",
    ))  # fmt: skip
    files["val.txt"] = m.mutate(lines, random)
    return put(folder, files), lambda: load("imagefolder", folder, image_size=8)


def of_real(folder, random):
    text = json.dumps([[1, 2], [], [3], [0]]).encode()
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 3, 4)]
    return put(folder, {"real.json": m.json_file(text, random)}), lambda: read_real(folder / "real.json", names, 10)


def of_names(folder, random):
    read_names = load_script("convert").read_names
    data = m.mutate(b"cat\ndog\nbird\n", random)
    return put(folder, {"names.txt": data}), lambda: read_names(folder / "names.txt", 3)


def of_task(folder, random):
    file = io.BytesIO()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    np.savez(
        file, train_images=images, train_labels=np.array([0, 1, 2, 0]), test_images=images, test_labels=np.arange(4) % 3
    )
    config = ViTConfig(image_size=8, patch_size=4, channels=3, num_classes=3, width=8, depth=1, num_heads=2)
    size = put(folder, {"caltech101.npz": m.npz(file.getvalue(), random)})
    return size, lambda: load_task(folder, "caltech101", config, examples=2)


def of_array(folder, random):
    file = io.BytesIO()
    np.save(file, np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8))
    data = m.npy_header(file.getvalue(), random) if random.random() < 0.6 else m.mutate(file.getvalue(), random)
    return put(folder, {"x.npy": data}), lambda: load_script("predict").array_image(folder / "x.npy", 8, 1)


KEYS = (
    *field_names(TrainConfig),
    *field_names(ViTConfig),
    "data",
    "data_dir",
    "preset",
    "checkpoint",
    "classes",
    "train_share",
)


@functools.cache
def settings_texts():
    """Settings files whose data `pretend` has."""
    paths = [ROOT / "tests" / "tiny.toml", *sorted((ROOT / "minivit" / "configs").glob("*.toml"))]
    texts = [path.read_text(encoding="utf-8") for path in paths]
    return [text for text in texts if 'data = "digits"' in text or 'data = "cifar' in text]


def of_settings(folder, random):
    data = m.toml(random.choice(settings_texts()), random, KEYS)

    def read():
        # the model is planned, not made: a settings file may ask for all of the machine
        dataset, model, config, begins = prepare(read_recipe(folder / "x.toml"), pretend)
        plan_of(dataset, model, config, Classification(dataset, model, config), start=begins["start"])

    return put(folder, {"x.toml": data}), read


def pretend(name, data_dir, *, image_size=None, **kept):
    """A few images in place of any data set; the digits are read as they are asked for."""
    if name == "digits":
        return load(name, data_dir, image_size=image_size, **kept)
    size = min(image_size or 32, 64)
    images = np.zeros((60, size, size, 3), np.uint8)
    names = tuple("0123456789")
    return FEW._replace(name=name, train_images=images, test_images=images[:40], class_names=names)


SWEEP = """title = "a sweep"
config = "digits"
seeds = [0, 1]

[base.schedule]
epochs = 1

[[row]]
name = "AdamW"
optimizer.optimizer = "adamw"

[[row]]
name = "as it is"
"""


def of_sweep(folder, random):
    size = put(folder, {"x.toml": m.toml(SWEEP, random, KEYS)})

    def read():
        return [sweep.recipe_of(run) for run in sweep.runs_of(sweep.read_sweep(folder / "x.toml"), folder)]

    return size, read


def of_results(folder, random):
    """The folders of a sweep that was under way."""
    put(folder, {"x.toml": SWEEP.encode()})
    plan = sweep.read_sweep(folder / "x.toml")
    for run in sweep.runs_of(plan, folder):
        recipe = sweep.recipe_of(run)
        summary = json.loads(run_files()[SUMMARY])
        defaults = sweep.DEFAULTS
        summary["settings"] = {
            "model": defaults["model"] | {"mlp_dim": 256} | recipe.model, "train": defaults["train"] | recipe.train,
            "data": recipe.data,
        }  # fmt: skip
        put(run.folder, {SUMMARY: json.dumps(summary).encode(), SETTINGS: json.dumps(summary["settings"]).encode()})
    (folder / "ended").mkdir()
    (folder / "ended" / sweep.TABLE).write_text(json.dumps(sweep.table_of(plan, folder)))
    changed = random.choice(sorted(folder.rglob("*.json")))
    changed.write_bytes(m.json_file(changed.read_bytes(), random))
    if random.random() < 0.3:
        changed.rename(changed.with_name(sweep.DIVERGED) if changed.name == SUMMARY else changed)
    size = sum(path.stat().st_size for path in folder.rglob("*.json"))
    return size, lambda: [sweep.markdown(sweep.table_of(plan, place)) for place in (folder, folder / "ended")]


def of_metrics(folder, random):
    files = {METRICS: m.json_lines(run_files()[METRICS], random), SUMMARY: m.json_file(run_files()[SUMMARY], random)}
    drawn = random.random() < 0.02  # drawing takes long

    def read():
        records = records_of(folder)
        if drawn:
            save_curves(None, records)
        return records, summary_of(folder)

    return put(folder, files), read


def of_run(folder, random):
    """A run's folder in which everything is damaged, the checkpoint now and then."""
    files = {name: m.json_file(run_files()[name], random) for name in (SUMMARY, SETTINGS)}
    files[METRICS] = m.json_lines(run_files()[METRICS], random)
    files[LAST] = run_files()[LAST]
    if random.random() < 0.5:
        files[LAST] = with_meta(files[LAST], lambda tree: m.json_tree(tree, random))
    return put(folder, files), lambda: checkpoint.load_model(folder / LAST)


def of_json(folder, random):
    data = random.choice([v for k, v in {**weights("hf"), **weights("timm")}.items() if k.endswith("json")])
    return put(folder, {"x.json": m.json_file(data, random)}), lambda: tensor_files.read_json(folder / "x.json")


READERS = {
    "checkpoint": of_checkpoint, "resume": of_resume, "tensors": of_tensors,
    **{f"{layout} weights": functools.partial(of_weights, layout) for layout in ("official", "timm", "hf")},
    **{f"{name} {form}": functools.partial(of_cifar, name, form) for name, form in NAMES},
    "image": of_image, "folder": of_folder, "list": of_list, "real.json": of_real, "class names": of_names,
    "task": of_task, "array": of_array, "settings": of_settings, "sweep": of_sweep, "results": of_results,
    "metrics": of_metrics, "run": of_run, "json": of_json,
}  # fmt: skip


def read_one(make, folder, random):
    """Read one hostile input: "read" or "refused". AssertionError and whatever else is raised are faults."""
    size, read = make(folder, random)
    with watch.watch(size):
        try:
            read()
        except (InputError, OSError) as error:
            message = cli.describe_os_error(error) if isinstance(error, OSError) else str(error)
            assert message and "\n" not in message and len(message) < 1600, message
            return "refused"
    return "read"


def read_many(name, count, seed, folder):
    """Read inputs numbered from 0; returns how many were read and refused. The number is all that makes an input."""
    counts = Counter()
    for number in range(count):
        place = folder / str(number)
        place.mkdir()
        try:
            counts[read_one(READERS[name], place, Random(f"{name} {seed} {number}"))] += 1
        except BaseException as error:
            error.add_note(f"{name}, seed {seed}, input {number}, in {place}")
            raise
    print(f"{name}: seed {seed}, {count:,} inputs, {counts['read']:,} read, {counts['refused']:,} refused")
    return counts


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused_in_one_line(name, tmp_path):
    counts = read_many(name, -(-QUICK // len(READERS)), 0, tmp_path)
    assert counts["read"] and counts["refused"] or name in ("list", "metrics", "official weights")


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_more_damaged_files(name, tmp_path):
    read_many(name, -(-SLOW // len(READERS)), 1, tmp_path)


# ---- values of every type, drawn by hypothesis -----------------------------------------------------------------------

SAME = settings(
    max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def is_refused_or_read(read, size):
    """Read something that may be refused, in one line."""
    with watch.watch(size), contextlib.suppress(InputError):
        read()


@SAME
@given(part=st.sampled_from(("config", "settings", "data", "progress", "start", "class_names")), data=st.data())
def test_a_checkpoint_that_says_anything(part, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    meta = json.loads(str(np.load(io.BytesIO(dict(m.members_of(run_files()[LAST]))["meta.npy"]))))
    keys = st.sampled_from(sorted(meta[part])) if isinstance(meta[part], dict) else st.just("")
    change = data.draw(st.dictionaries(keys, VALUES, max_size=3))
    meta[part] = meta[part] | change if isinstance(meta[part], dict) else change.get("", meta[part])
    content = with_meta(run_files()[LAST], lambda _: meta)
    (folder / LAST).write_bytes(content)

    def read():
        arrays, record = checkpoint.read(folder / LAST)
        trainer(folder, train_config_of(record), model=record.config, resume=(arrays, record))

    is_refused_or_read(read, len(content))


@SAME
@given(lines=st.lists(st.dictionaries(st.sampled_from(
    ("kind", "step", "epoch", "lr", "loss", "accuracy", "train_loss", "train_accuracy", "grad_norm", "seconds")),
    st.sampled_from(("train", "test")) | VALUES, max_size=10), max_size=6))  # fmt: skip
def test_metrics_that_say_anything(lines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    (folder / METRICS).write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    for record in records_of(folder):
        assert record["kind"] in ("train", "test") and record["epoch"] > 0


@SAME
@given(tables=st.dictionaries(st.sampled_from(("model", "data", "optimizer", "schedule", "machine", "log", "train")),
    st.dictionaries(st.sampled_from(KEYS), st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
                    | st.lists(st.integers(), max_size=2), max_size=3), max_size=3))  # fmt: skip
def test_settings_of_any_type(tables, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    lines = [
        f"[{table}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items())
        for table, values in tables.items()
    ]
    (folder / "x.toml").write_text("".join(lines).replace("Infinity", "inf").replace("NaN", "nan"), encoding="utf-8")
    is_refused_or_read(lambda: prepare(read_recipe(folder / "x.toml"), pretend), 1000)


# ---- through the commands --------------------------------------------------------------------------------------------

COMMANDS = {
    "checkpoint": "evaluate x.npz --out new", "resume": "train --resume --out . --quiet",
    "official weights": "convert --info w.npz", "timm weights": "convert . new/x.npz --to minivit",
    "hf weights": "convert . new/x.npz --to minivit", "cifar10 binary": "data info cifar10 --data-dir .",
    "cifar10 python": "data info cifar10 --data-dir .", "cifar100 binary": "data info cifar100 --data-dir .",
    "cifar100 python": "data info cifar100 --data-dir .", "folder": "data info folder --data-dir . --image-size 8",
    "list": "data info imagefolder --data-dir . --image-size 8", "sweep": "sweep x.toml --table --out new",
    "run": "report . --out new/report.html", "settings": "train --config x.toml --quiet --steps 1 --out new",
}  # fmt: skip


def through_the_command(name, words, number, folder, call, monkeypatch):
    """Give a hostile input to a command: it is used, or refused in one line with status 2; nothing else changes."""
    folder.mkdir()
    (folder / "new").mkdir()
    monkeypatch.chdir(folder)
    size, read = READERS[name](folder, Random(f"{name} command {number}"))
    if name in ("settings", "resume"):
        try:
            read()
        except InputError:
            pass
        else:
            return 0  # it would be trained
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with watch.watch(size, writes=folder / "new", room=2**27):  # figures too
        ended = call(*words.split())
    assert ended.status in (0, 2), ended
    if ended.status:
        lines = [line for line in ended.err.splitlines() if not line.startswith(("note: ", "warning: "))]
        assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 1700, ended.err
    kept = {path: path.read_bytes() for path in before}
    assert kept == before, "a file was changed"
    written = [path for path in folder.rglob("*") if path.is_file() and path not in before]
    assert all(path.is_relative_to(folder / "new") for path in written), written
    return 1


@pytest.mark.parametrize("name", [*COMMANDS])
def test_damaged_files_through_the_commands(name, tmp_path, call, monkeypatch):
    numbers = range(2 if name == "run" else 4)  # a page takes seconds
    assert sum(through_the_command(name, COMMANDS[name], n, tmp_path / str(n), call, monkeypatch) for n in numbers)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*COMMANDS])
def test_many_more_through_the_commands(name, tmp_path, call, monkeypatch):
    for n in range(4, 44):
        through_the_command(name, COMMANDS[name], n, tmp_path / str(n), call, monkeypatch)
