"""scripts/paper.py: every figure is listed, made, remembered and told of; trainings fit their budget and go on."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, load_script

from minivit import analysis, budget, checkpoint, paper, paper_plots, plots, train
from minivit.data import load
from minivit.errors import InputError
from minivit.model import ViTConfig
from minivit.trace import expected_flops
from minivit.train import Trainer

TINY = ROOT / "tests" / "tiny.toml"
OF_A_MODEL = ["filters", "positions", "distance", "rollout"]
SWEEP = """
title = "tiny"
config = "{config}"
seeds = [3, 4]
[base.train]
epochs = 4
checkpoint_seconds = 1000.0
[[row]]
name = "AdamW"
[[row]]
name = "SGD"
train.optimizer = "sgd"
train.epochs = 2
"""


def index_of(out):
    return json.loads((out / "index.json").read_text())


@pytest.fixture
def sweep(tmp_path, monkeypatch, no_figures):
    """A sweep in place of those of configs/sweeps."""
    (tmp_path / "configs" / "sweeps").mkdir(parents=True)
    path = tmp_path / "configs" / "sweeps" / "tiny.toml"
    path.write_text(SWEEP.format(config=TINY))
    monkeypatch.setattr(paper, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(paper, "ENTRIES", (paper.sweep_entry("tiny", "Table 0", "Tiny", "all of it"),))
    return path


def test_the_list(call, tmp_path, trained):
    for words in ([], ["list"], ["LIST"]):
        ended = call("paper", *words, "--out", tmp_path / "none")
        assert ended.status == 0 and not (tmp_path / "none").exists()
        lines = ended.out.splitlines()
        for entry in paper.ENTRIES:
            (line,) = (line for line in lines if line.startswith(f"{entry.name} "))
            assert entry.mirrors in line and entry.needs in line and line.endswith(entry.missing())
    names = [entry.name for entry in paper.ENTRIES]
    assert len(set(names)) == len(names)


def test_figures_of_a_run(call, tmp_path, trained):
    other = tmp_path / "other"
    other.mkdir()
    arrays, meta = checkpoint.load(trained / "last.npz")
    checkpoint.save(other / "last.npz", arrays | {"params/head.bias": arrays["params/head.bias"] + 1}, meta)
    common = ["--run", trained, "--out", tmp_path / "p"]
    ended = call("paper", *OF_A_MODEL, *common)
    assert ended.status == 0, ended.err
    index, page = index_of(tmp_path / "p"), (tmp_path / "p" / "index.md").read_text()
    assert list(index) == OF_A_MODEL
    for name in OF_A_MODEL:
        assert (tmp_path / "p" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in page and index[name]["caption"] in page and index[name]["caption"] in ended.out
        assert paper.entry_of(name).differs in page and paper.entry_of(name).mirrors in page
        command = f"python scripts/paper.py {name} --run {trained} --out {tmp_path / 'p'}\n"
        assert command in page and "test accuracy" in page
    # nothing is made twice, unless it is asked for, or the model is another one
    before = 10**9  # in 1970: a file's time is not told more finely than by the tick of a clock
    os.utime(tmp_path / "p" / "filters.png", ns=(before, before))
    ended = call("paper", "filters", "--run", trained / "last.npz", "--out", tmp_path / "p")
    assert "already" in ended.out and (tmp_path / "p" / "filters.png").stat().st_mtime_ns == before
    assert call("paper", "filters", *common, "--again").status == 0
    assert (tmp_path / "p" / "filters.png").stat().st_mtime_ns > before
    assert call("paper", "list", *common).out.count("  made\n") == 4
    ended = call("paper", "filters", "--run", other / "last.npz", "--out", tmp_path / "p")
    assert (
        "already" not in ended.out
        and call("paper", "list", "--run", other, "--out", tmp_path / "p").out.count("  made\n") == 1
    )
    ended = call("paper", "filters", *common, "--format", "svg")
    assert ended.status == 0 and (tmp_path / "p" / "filters.svg").exists()
    assert index_of(tmp_path / "p")["filters"]["files"] == ["filters.svg"]


def test_pictures_are_drawn_once_and_their_classes_told(call, tmp_path, trained, monkeypatch):
    sheets = []
    monkeypatch.setattr(paper_plots, "save_rollouts", lambda path, *shown, title: sheets.append(shown))
    for out in ("a", "b"):
        assert call("paper", "rollout", "--run", trained, "--out", tmp_path / out).status == 0
    images, maps, titles = sheets[0]
    np.testing.assert_array_equal(images, sheets[1][0])
    assert len(images) == len(maps) == len(titles) == 24 and len({image.tobytes() for image in images}) == 24
    data = load("digits")
    place = [int((data.test_images == image).all(axis=(1, 2, 3)).argmax()) for image in images]
    logits = checkpoint.load_model(trained / "last.npz")[0].predict(images)
    for row, truth, (text, right) in zip(logits, data.test_labels[place], titles, strict=True):
        guess = int(text.split()[0])
        assert row[guess] > row.max() - 1e-4 and right == (guess == truth)


def test_distances_are_of_pictures_of_all_classes(tmp_path, trained, monkeypatch):
    """Folders come class by class: the first pictures would be of the first classes alone."""
    context, given = paper.Context(tmp_path, run=trained), []
    model, dataset = context.trained
    order = np.argsort(dataset.test_labels, kind="stable")
    context.trained = model, dataset._replace(test_images=dataset.test_images[order])
    monkeypatch.setattr(analysis, "head_distances", lambda model, images: (given.append(images), np.ones((2, 2)))[1])
    monkeypatch.setattr(paper_plots, "save_distances", lambda *_, **__: None)
    paper.make_distance(context)
    labels = {image.tobytes(): label for image, label in zip(dataset.test_images, dataset.test_labels, strict=True)}
    found = [labels[image.tobytes()] for image in given[0]]
    assert len(found) == 128 and set(found) == set(range(10))


def test_cost_in_a_table(call, tmp_path, monkeypatch):
    def cost(models, sizes, *, progress):
        assert models["B/16"].width == 768 and progress
        point = {"model": "B/16", "size": 64, "tokens": 17, "batch": 8, "peak_memory": 3 * 2**20}
        return [point | {"task": task, "images_per_second": rate} for task, rate in (("infer", 50.0), ("step", 12.34))]

    monkeypatch.setattr(analysis, "cost", cost)
    assert call("paper", "cost", "--out", tmp_path).status == 0
    assert "| B/16 | 64 | 17 | 50 | 12.3 | 3, 3 |" in (tmp_path / "index.md").read_text()
    assert len(json.loads((tmp_path / "cost.json").read_text())) == 2
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_is_trained_where_none_is_named(call, tmp_path, no_figures, monkeypatch):
    common = ["--config", TINY, "--out", tmp_path / "p", "--quiet", "--budget", "20s"]
    end_epoch = Trainer._end_epoch

    def stop(trainer, *arguments):
        end_epoch(trainer, *arguments)
        if trainer.epoch == 2 and trainer.out.name == "model":
            trainer.stop("test")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_end_epoch", stop)
        assert call("paper", "positions", *common).status == 130  # stopped, to go on
    assert not (tmp_path / "p" / "index.json").exists()
    ended = call("paper", "positions", *common)
    assert ended.status == 0, ended.err
    summary = json.loads((tmp_path / "p" / "model" / "summary.json").read_text())
    assert (
        summary["epochs"] == 20 and summary["settings"]["train"]["workers"] == 1
    )  # the most that the settings ask for
    before = (tmp_path / "p" / "model" / "last.npz").stat().st_mtime_ns
    ended = call("paper", "filters", *common)
    assert ended.status == 0 and "training" not in ended.out
    assert (tmp_path / "p" / "model" / "last.npz").stat().st_mtime_ns == before
    # a model of other settings is not taken for it
    (tmp_path / "other.toml").write_text(TINY.read_text().replace("width = 16", "width = 8"))
    ended = call("paper", "distance", *common, "--config", tmp_path / "other.toml")
    assert ended.status == 2 and "width" in ended.err and "--out" in ended.err and ended.err.count("\n") == 1


def test_a_model_of_fewer_epochs_is_kept_and_goes_on_with_other_cores(call, tmp_path, no_figures, monkeypatch):
    """As many epochs as the budget held, of the 20 of its settings; with the threads that it began with."""
    monkeypatch.setattr(budget, "seconds_of_training", lambda *a: 0.5 + 0.01 * a[3])
    (tmp_path / "mine.toml").write_text(TINY.read_text().replace("workers = 1", "workers = 0"))
    common = ["filters", "--config", tmp_path / "mine.toml", "--out", tmp_path / "p", "--quiet", "--budget", "0.3s"]
    end_epoch = Trainer._end_epoch
    with monkeypatch.context() as patch:
        patch.setattr(train, "available_cores", lambda: 2)
        patch.setattr(Trainer, "_end_epoch", lambda self, *a: (end_epoch(self, *a), self.stop("test")))
        assert call("paper", *common).status == 130
    monkeypatch.setattr(train, "available_cores", lambda: 1)
    ended = call("paper", *common)
    assert ended.status == 0, ended.err
    summary = json.loads((tmp_path / "p" / "model" / "summary.json").read_text())
    assert summary["epochs"] == 4 and summary["workers"] == 2
    before = (tmp_path / "p" / "model" / "last.npz").stat().st_mtime_ns
    ended = call("paper", "positions", *common[1:])
    assert ended.status == 0 and "training" not in ended.out, ended.err
    assert (tmp_path / "p" / "model" / "last.npz").stat().st_mtime_ns == before


def test_a_model_of_less_than_an_epoch(call, tmp_path, no_figures, monkeypatch):
    monkeypatch.setattr(budget, "seconds_of_training", lambda *a: 0.5 + 0.01 * a[3])
    common = ["--config", TINY, "--out", tmp_path / "p", "--quiet", "--budget", "0.05s"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_finish", lambda self, engine: None)  # stopped after the last step
        assert call("paper", "filters", *common).status == 130
    ended = call("paper", "filters", *common)
    assert ended.status == 0, ended.err
    assert json.loads((tmp_path / "p" / "model" / "summary.json").read_text())["steps"] == 4
    assert "% after 4 steps." in (tmp_path / "p" / "index.md").read_text()
    ended = call("paper", "positions", *common)
    assert ended.status == 0 and "training" not in ended.out, ended.err


def test_all_rows_get_the_same_share_of_their_epochs():
    times = [lambda n: 10.0 * n, lambda n: 1.0 * n]  # 48 s for 4 and 8 epochs
    assert paper.share_within(times, [4, 8], 1000) == paper.share_within(times, [4, 8], 48) == 1.0
    assert 0.4998 < paper.share_within(times, [4, 8], 24) <= 0.5
    assert paper.share_within(times, [4, 8], 0) == 0.0


def test_a_sweep_is_cut_to_the_budget_and_goes_on(call, tmp_path, sweep, monkeypatch):
    monkeypatch.setattr(paper, "time_of_epochs", lambda *_, probe: lambda epochs: 10.0 * epochs)
    common = ["tiny", "--out", tmp_path / "p", "--quiet"]
    train = Trainer.run
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", lambda self: None if self.config.optimizer == "sgd" else train(self))
        assert call("paper", *common, "--budget", "32s").status == 130
    assert not (tmp_path / "p" / "index.json").exists()
    plan = json.loads((tmp_path / "p" / "tiny" / "plan.json").read_text())  # 30.4 of 60 s, for 4 and 2 epochs
    assert plan["steps"] == {"AdamW": 12, "SGD": 6}
    monkeypatch.setattr(paper, "time_of_epochs", None)  # measured once
    before = (tmp_path / "p" / "tiny" / "adamw-seed3" / "last.npz").stat().st_mtime_ns
    ended = call("paper", *common, "--budget", "32s")
    assert ended.status == 0, ended.err
    assert (tmp_path / "p" / "tiny" / "adamw-seed3" / "last.npz").stat().st_mtime_ns == before
    table = json.loads((tmp_path / "p" / "tiny" / "table.json").read_text())
    assert table["seeds"] == [3] and [row["epochs"] for row in table["rows"]] == [2, 1]
    page = (tmp_path / "p" / "index.md").read_text()
    assert (
        "Tiny: seed 3, 6 to 12 steps (51%) of configs/sweeps/tiny.toml" in page
        and table["title"] in page
        and "| SGD | " in page
        and "(tiny.png)" in page
        and "Table 0" in page
    )
    assert f"python scripts/paper.py tiny --out {tmp_path / 'p'} --budget 32s\n" in page
    (accuracies,) = ([row["mean"] for row in table["rows"]],)
    assert paper.sure_of(accuracies, 360) in page
    assert call("paper", "list", "--out", tmp_path / "p").out.count("  made\n") == 1  # of whatever budget
    assert "already" in call("paper", *common, "--budget", "32s").out
    ended = call("paper", *common, "--budget", "1h")
    assert ended.status == 2 and "cut for another budget (32 s, not 3600 s); choose another --out" in ended.err


def test_measured_times_of_two_sweeps(call, tmp_path, sweep, monkeypatch):
    """A step takes 0.01 s; an epoch of 6 steps and 360 predictions, a third of a step each 256, 0.0647 s."""
    monkeypatch.setattr(budget, "seconds_of_training", lambda *a: 0.5 + 0.01 * a[3])
    other = sweep.with_name("other.toml")
    other.write_text(sweep.read_text())
    entries = [paper.sweep_entry(name, "Table 0", "Tiny", "all of it") for name in ("tiny", "other")]
    monkeypatch.setattr(paper, "ENTRIES", entries)
    ended = call("paper", "tiny", "--out", tmp_path / "p", "--quiet", "--budget", "0.13s")  # 0.1235 after the reserve
    assert ended.status == 2 and "larger --budget" in ended.err and ended.err.count("\n") == 1
    # four epochs of the one and two of the other take 0.388 s; each sweep has half of the budget, less its reserve
    ended = call("paper", "--all", "--out", tmp_path / "p", "--quiet", "--budget", "0.6s")
    assert ended.status == 0, ended.err
    for name in ("tiny", "other"):
        assert json.loads((tmp_path / "p" / name / "plan.json").read_text())["steps"] == {"AdamW": 17, "SGD": 8}


def test_the_budget_is_shared_out(call, tmp_path, monkeypatch):
    shares = []

    def made(context):
        shares.append(context.share)
        return paper.Made((), "c")

    entry = paper.Entry("a", "Fig. 0", "A", "nothing", "training", 0, made)
    entries = (
        entry._replace(weight=6.0),
        entry._replace(name="b"),
        entry._replace(name="c", needs="a model"),
        entry._replace(name="d", needs="nothing"),
    )
    monkeypatch.setattr(paper, "ENTRIES", entries)
    monkeypatch.setattr(paper, "made_from", lambda entry, context: {})
    monkeypatch.setattr(paper.Context, "says", "")
    assert call("paper", "--all", "--out", tmp_path, "--config", TINY, "--budget", "60s").status == 0
    assert shares == [30, 10, 20, 60]  # by weight: 6, 2, and the model's 4; the last trains nothing
    # what is made, and a model that is trained, have their shares still
    shares.clear()
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(paper.Context, "checkpoint", lambda self, **_: tmp_path / "model")
    index = index_of(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({name: index[name] for name in "ad"}))
    monkeypatch.setattr(
        paper, "is_made", lambda entry, context: entry.name in paper.read_json(context.out / "index.json")
    )
    assert call("paper", "--all", "--out", tmp_path, "--config", TINY, "--budget", "60s").status == 0
    assert shares == [10, 20]
    # the page names the share of each; a budget that no number of seconds divides is told as it is used
    commands = [
        f"scripts/paper.py b --config {TINY} --out {tmp_path} --budget 10s",
        f"c --config {TINY} --out {tmp_path}",
    ]
    assert all(words in (tmp_path / "index.md").read_text() for words in commands)
    third = paper.shares_of(entries[:3], paper.Context(tmp_path, budget=7.0))
    assert third == {"a": 3.5, "b": 1.167, "c": 2.333}
    assert paper.shares_of(entries[1:2], paper.Context(tmp_path, budget=1.167)) == {"b": 1.167}
    shares.clear()
    assert call("paper", "b", "--out", tmp_path / "x", "--config", TINY, "--budget", "60s").status == 0
    assert shares == [60]


def test_what_fails_of_all_is_told_and_the_rest_made(call, tmp_path, monkeypatch):
    def bad(context):
        raise InputError("no luck")

    entry = paper.Entry("a", "Fig. 0", "A", "nothing", "nothing", 0, bad)
    gone = entry._replace(name="gone", missing=lambda: "this version has no x")
    good = entry._replace(name="good", make=lambda context: paper.Made((), "fine"))
    monkeypatch.setattr(paper, "ENTRIES", (entry, gone, good))
    ended = call("paper", "--all", "--out", tmp_path)
    assert ended.status == 0 and "  not made: no luck" in ended.out and "fine" in ended.out and "gone" not in ended.out
    assert list(index_of(tmp_path)) == ["good"]
    monkeypatch.setattr(paper, "ENTRIES", (entry,))
    ended = call("paper", "--all", "--out", tmp_path)
    assert ended.status == 2 and ended.err == "error: nothing could be made of a: the reasons stand above\n"


def test_a_figure_of_another_script(tmp_path, trained, call, monkeypatch):
    monkeypatch.setattr(paper, "SCRIPTS", tmp_path)
    (tmp_path / "transfer.py").write_text(
        "import sys\nfrom pathlib import Path\n"
        "def main(argv):\n    out = Path(argv[-1])\n    out.mkdir(parents=True, exist_ok=True)\n"
        "    (out / 'transfer-fewshot-digits.png').write_text(' '.join(argv))\n    return len(argv) - 7\n"
    )
    context = paper.Context(tmp_path / "o", run=trained, data="cifar10")  # the run's own are the digits
    made = paper.make_few_shot(context)
    assert made.files == ("fewshot/transfer-fewshot-digits.png",)
    (tmp_path / "o" / "fewshot" / "transfer-fewshot-cifar10.png").write_text("of another run in the same folder")
    assert paper.make_few_shot(context).files == made.files
    asked = (tmp_path / "o" / made.files[0]).read_text()
    assert asked == f"{trained / 'last.npz'} --untrained --pixels --device cpu --out {tmp_path / 'o' / 'fewshot'}"
    context = paper.Context(tmp_path / "o2", run=trained, data_dir="there")
    with pytest.raises(InputError, match="ended with status 2"):
        paper.make_few_shot(context)
    assert " --data-dir there --device cpu --out " in (tmp_path / "o2" / made.files[0]).read_text()
    with pytest.raises(InputError, match="ended with status 1"):
        paper.call_script("transfer.py", *range(1, 8), tmp_path / "y")


def test_figures_of_weights_of_another_program(call, tmp_path, trained):
    """What its file does not say is the data set that is named; other weights in the same place are another model."""
    entries, common = ("filters", "positions"), ["--run", tmp_path / "timm", "--out", tmp_path / "p"]
    for layout, name in (("timm", "timm"), ("official", "o.npz")):
        assert call("convert", trained / "last.npz", tmp_path / name, "--to", layout).status == 0
    ended = call("paper", *entries, *common)
    assert ended.status == 2 and ended.err.endswith("name one with --data\n") and ended.err.count("\n") == 1
    ended = call("paper", *entries, "fewshot", *common, "--data", "digits")
    assert ended.status == 0, ended.err
    index = index_of(tmp_path / "p")
    assert list(index) == [*entries, "fewshot"] and index["filters"]["model"].startswith("digits, patch ")
    assert (
        f"python scripts/paper.py filters --run {tmp_path / 'timm'} --data digits --out {tmp_path / 'p'}\n"
        in (tmp_path / "p" / "index.md").read_text()
    )
    again = [*entries, *common, "--data", "digits"]
    assert call("paper", *again).out.count("already") == 2
    arrays, meta = checkpoint.load(trained / "last.npz")
    changed = arrays | {"ema/head.bias": arrays["ema/head.bias"] + 1}
    checkpoint.save(tmp_path / "other.npz", changed, meta)
    for path in (tmp_path / "timm").iterdir():
        path.unlink()
    assert call("convert", tmp_path / "other.npz", tmp_path / "timm", "--to", "timm").status == 0
    assert "already" not in call("paper", *again).out
    ended = call("paper", "filters", "--run", tmp_path / "o.npz", "--data", "digits", "--out", tmp_path / "p")
    assert ended.status == 2 and "scripts/convert.py --class-names FILE gives them their names" in ended.err


def test_masked_patches_by_another_script(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "SCRIPTS", tmp_path)
    (tmp_path / "pretrain.py").write_text(
        "import json, os\nfrom pathlib import Path\n"
        "def main(argv):\n"
        "    out = Path(argv[argv.index('--out') + 1])\n    os.makedirs(out, exist_ok=True)\n"
        "    (out / 'argv').write_text(' '.join(argv))\n    (out / 'last.npz').write_text('')\n"
        "    figures = {'test_accuracy': 0.25, 'chance_accuracy': 0.0625, 'epochs': 3,\n"
        "               'settings': {'data': {'data': 'digits'}, 'model': {'channels': 1}}}\n"
        "    (out / 'summary.json').write_text(json.dumps(figures))\n"
        "    return 0 if '--resume' in argv else 130\n"
    )
    context, other = (paper.Context(tmp_path / "o", data_dir="d", budget=b, progress=False) for b in (60.5, 3600.0))
    asked = f"--method mpp --device cpu --out {tmp_path / 'o' / 'masked'} --quiet --data-dir d"
    with pytest.raises(paper.Stopped):
        paper.make_masked(context)
    assert (tmp_path / "o" / "masked" / "argv").read_text() == f"{asked} --budget 60.5s"
    made = paper.make_masked(context)
    assert (tmp_path / "o" / "masked" / "argv").read_text() == f"{asked} --resume"
    with pytest.raises(InputError, match="cut for another budget .60.5 s, not 3600 s.; choose another --out"):
        paper.make_masked(other)
    assert made.caption.startswith("Test pictures of digits, ") and "25.0% are right, of 8 colours" in made.caption
    assert "after 3 epochs; without looking 6.2%" in made.caption


def test_half_of_the_time_without_labels(tmp_path, monkeypatch):
    """Equal times for all; what is finished is left alone, what stopped goes on; the flags are those of the scripts."""
    asked, stops = [], ["mae"]

    def script(name, *arguments):
        load_script(name.removesuffix(".py")).parse([str(a) for a in arguments])
        out = Path(arguments[-1])
        asked.append((out.name, arguments))
        out.mkdir(parents=True, exist_ok=True)
        (out / "last.npz").write_text("")
        if out.name in stops:
            stops.remove(out.name)
            raise paper.Stopped
        accuracy = {"plain": 0.5, "mae": 0.625}.get(out.name, 0.25)
        summary = {"test_accuracy": accuracy, "steps": 1234, "train_seconds": 3.5, "test_images": 400}
        (out / "summary.json").write_text(json.dumps(summary))

    monkeypatch.setattr(paper, "call_script", script)
    context = paper.Context(tmp_path, data="digits", budget=400.0, progress=False)
    with pytest.raises(paper.Stopped):
        paper.make_self_supervision(context)
    made = paper.make_self_supervision(context)
    times = {name: words[words.index("--budget") + 1] for name, words in asked if "--budget" in words}
    halves = dict.fromkeys(["mpp-before", "mpp", "mae-before", "mae"], "50s")
    assert times == {"plain": "100s", "recipe": "100s"} | halves
    assert [name for name, words in asked if "--resume" in words] == ["mae"] and len(asked) == 7
    words = dict(asked)["mpp"]
    assert words[words.index("--from") + 1] == tmp_path / "selfsupervision" / "mpp-before" / "last.npz"
    assert (tmp_path / made.files[0]).stat().st_size > 1000
    assert (
        "| masked autoencoder, then labels | 62.50% | 1,234 | 4 |" in made.table
        and "100 s of training each" in made.caption
    )
    assert "on 400 test pictures an accuracy has a standard error of up to 2.5 points" in made.caption
    for other, words in ({"budget": 3600.0}, "cut for another budget"), ({"data": "cifar10"}, "runs of other settings"):
        with pytest.raises(InputError, match=words):  # whose caption would tell of what was never trained
            paper.make_self_supervision(paper.Context(tmp_path, **{"data": "digits", "budget": 400.0} | other))
    assert len(asked) == 7


def test_targets_of_masked_patches(tmp_path, monkeypatch):
    """Each target gets a sixth of the time before the labels and a sixth with them, and begins where it ended."""
    asked = {}

    def script(name, *arguments):
        told = load_script(name.removesuffix(".py")).parse([str(a) for a in arguments])
        asked[Path(told.out).name] = (name, told)
        Path(told.out).mkdir(parents=True)
        accuracy = {"colour": 0.5, "downsized": 0.25}.get(Path(told.out).name, 0.125)
        summary = {"test_accuracy": accuracy, "steps": 2345, "test_images": 400, "chance_accuracy": 0.0625}
        (Path(told.out) / "summary.json").write_text(json.dumps(summary))

    monkeypatch.setattr(paper, "call_script", script)
    made = paper.make_targets(paper.Context(tmp_path, data="digits", budget=60.0, progress=False))
    assert list(asked) == [name for each in ("colour", "downsized", "pixels") for name in (f"{each}-before", each)]
    for target in ("colour", "downsized", "pixels"):
        (before, first), (after, then) = asked[f"{target}-before"], asked[target]
        assert (before, first.method, first.target, first.budget) == ("pretrain.py", "mpp", target, "10s")
        assert (after, then.budget) == ("train.py", "10s") and first.data == then.data == "digits"
        assert then.checkpoint == str(tmp_path / "targets" / f"{target}-before" / "last.npz")
    assert "| downsized | 12.5% | 6.2% | 2,345 | 25.00% | 2,345 |" in made.table
    assert (tmp_path / made.files[0]).stat().st_size > 1000 and "10 s without" in made.caption


def test_fine_tuning_begins_with_the_model_of_the_first_classes(tmp_path, monkeypatch, no_figures):
    tiny = {"patch_size": 8, "width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 16}
    read_sweep = paper.read_sweep

    def small(path):
        sweep = read_sweep(path)
        recipes = [row.recipe._replace(model=row.recipe.model | tiny) for row in sweep.rows]
        return sweep._replace(rows=tuple(row._replace(recipe=r) for row, r in zip(sweep.rows, recipes, strict=True)))

    monkeypatch.setattr(paper, "read_sweep", small)
    monkeypatch.setattr(paper, "time_of_epochs", lambda *_, probe: lambda epochs: 10.0 * epochs)
    context = paper.Context(tmp_path, data="digits", budget=100.0, progress=False)
    made = paper.make_fine_tuning(context)
    plans = [json.loads((tmp_path / name / "plan.json").read_text())["steps"] for name in ("pretraining", "finetuning")]
    # 38 of 260 s and of 26 epochs, 57 of 250 s and of 5 epochs each: of 6 steps
    assert plans == [{"pre-training": 22}, dict.fromkeys(plans[1], 6)] and len(plans[1]) == 5
    settings = json.loads((tmp_path / "finetuning" / "fine-tuned-48-pixels-seed0" / "settings.json").read_text())
    before = tmp_path / "pretraining" / "pre-training-seed0" / "last.npz"
    assert settings["start"]["checkpoint"] == str(before) and settings["model"]["image_size"] == 48
    assert settings["data"]["classes"] == "5-9"
    assert (
        "The model of the first five classes of digits had" in made.caption
        and "| from scratch, 48 pixels | " in made.table
    )


def test_nothing_begins_with_a_model_that_diverged(tmp_path, monkeypatch):
    sweep = paper.read_sweep(paper.CONFIGS / "sweeps" / "pretraining.toml")
    monkeypatch.setattr(paper, "carried_out", lambda *_, **settings: (sweep._replace(seeds=(0,)), tmp_path))
    monkeypatch.setattr(paper, "result_of", lambda run: {"diverged": 7})
    with pytest.raises(InputError, match="pre-training-seed0 diverged at step 7: there is no model to begin with"):
        paper.make_fine_tuning(paper.Context(tmp_path))


def test_axial_attention_against_compute_and_speed(call, tmp_path, monkeypatch, no_figures):
    """Every row of configs/sweeps/paper-axial.toml, made small, is trained, timed and drawn; FLOPs are of its steps."""
    tiny, read_sweep, timed, drawn = {"width": 8, "num_heads": 2, "mlp_dim": 8}, paper.read_sweep, [], []

    def small(path):
        sweep = read_sweep(path)
        recipes = [row.recipe._replace(model=row.recipe.model | tiny) for row in sweep.rows]
        return sweep._replace(rows=tuple(row._replace(recipe=r) for row, r in zip(sweep.rows, recipes, strict=True)))

    def speed(config, task, batch, turns):
        timed.append((config.attention, config.depth, config.patch_size))
        return {"images_per_second": 1000.0 * len(timed)} if task == "infer" and turns > 1 else None

    monkeypatch.setattr(paper, "read_sweep", small)
    monkeypatch.setattr(paper, "time_of_epochs", lambda *_, probe: lambda epochs: 10.0 * epochs)
    monkeypatch.setattr(analysis, "speed", speed)
    monkeypatch.setattr(plots, "save_sweep", lambda *_: None)
    real = paper_plots.save_axial
    monkeypatch.setattr(paper_plots, "save_axial", lambda path, *a, **k: (drawn.append(a), real(path, *a, **k)))
    flags = ["--data", "digits", "--budget", "100s", "--quiet", "--out", tmp_path / "p"]  # 95 of 180 s: 18 of 36 steps
    ended = call("paper", "paper-axial", *flags)
    assert ended.status == 0, ended.err
    kinds = [("full", 4, 8), ("full", 4, 4), ("axial", 4, 8), ("axial", 4, 4), ("axial", 8, 8), ("axial", 8, 4)]
    ((points,),) = drawn
    assert timed == [(p["attention"], p["blocks"], p["patch"]) for p in points] == kinds
    assert json.loads((tmp_path / "p" / "paper-axial.json").read_text()) == points
    table = json.loads((tmp_path / "p" / "paper-axial" / "table.json").read_text())
    assert [p["accuracy"] for p in points] == [row["mean"] for row in table["rows"]]
    model = ViTConfig(
        image_size=8, channels=1, patch_size=4, width=8, num_heads=2, mlp_dim=8, depth=8, pooling="mean",
        attention="axial",
    )  # fmt: skip
    assert points[5]["training_flops"] == 18 * sum(expected_flops(model, 128))
    assert points[5]["prediction_flops"] == expected_flops(model, 1).forward
    page = (tmp_path / "p" / "index.md").read_text()
    assert "(paper-axial.png)" in page and "Fig. 13" in page and page.count("\n| axial | ") == 4
    assert f"| full | 4 | 4 | {points[1]['accuracy']:.2%} | " in page and "| 2,000 |" in page
    assert (tmp_path / "p" / "paper-axial.png").read_bytes().startswith(b"\x89PNG")


def test_hybrids_against_compute(call, tmp_path, monkeypatch, no_figures):
    """Every row of configs/sweeps/paper-hybrid.toml, made small, is trained and drawn; FLOPs are of its steps."""
    drawn, read_sweep = [], paper.read_sweep

    def small(path):
        sweep, rows = read_sweep(path), []
        for row in sweep.rows:
            tiny = {"width": row.recipe.model["width"] // 8, "depth": 1, "num_heads": 2, "stem_width": 4}
            patch = {"patch_size": 1} if row.recipe.model.get("stem") else {"patch_size": 4}
            rows.append(row._replace(recipe=row.recipe._replace(model=row.recipe.model | tiny | patch)))
        return sweep._replace(rows=tuple(rows))

    monkeypatch.setattr(paper, "read_sweep", small)
    monkeypatch.setattr(paper, "time_of_epochs", lambda *_, probe: lambda epochs: 10.0 * epochs)
    monkeypatch.setattr(plots, "save_sweep", lambda *_: None)
    real = paper_plots.save_compute
    monkeypatch.setattr(paper_plots, "save_compute", lambda path, *a, **k: (drawn.append(a), real(path, *a, **k)))
    ended = call("paper", "paper-hybrid", "--data", "digits", "--budget", "100s", "--quiet", "--out", tmp_path / "p")
    assert ended.status == 0, ended.err
    ((points,),) = drawn
    kinds = ["ViT", "hybrid: root", "hybrid: root and a unit"]
    assert [(p["kind"], p["width"], p["tokens"]) for p in points] == [(k, w, 5) for k in kinds for w in (8, 16)]
    model = ViTConfig(
        image_size=8, channels=1, patch_size=1, width=16, num_heads=2, depth=1, stem="1", stem_width=4, stem_groups=4
    )
    assert points[5]["training_flops"] == 18 * sum(expected_flops(model, 128))  # 95 of 180 s: 18 of 36 steps
    table = json.loads((tmp_path / "p" / "paper-hybrid" / "table.json").read_text())
    assert [p["accuracy"] for p in points] == [row["mean"] for row in table["rows"]]
    page = (tmp_path / "p" / "index.md").read_text()
    assert f"| hybrid: root | 8 | 5 | {points[2]['accuracy']:.2%} | " in page and "(paper-hybrid.png)" in page


def test_equal_steps_on_shares_of_the_pictures():
    """The rows of configs/sweeps/paper-datasize.toml have as many steps, and as many of them to warm up."""
    rows = paper.read_sweep(ROOT / "configs" / "sweeps" / "paper-datasize.toml").rows
    shares = [row.recipe.data.get("train_share") or 1.0 for row in rows]
    assert shares == [1.0, 0.5, 0.25, 0.125]
    for name in ("epochs", "warmup_epochs"):
        passes = [row.recipe.train[name] * share for row, share in zip(rows, shares, strict=True)]
        assert passes == passes[:1] * 4


def test_one_figure_anew_leaves_the_rest_of_the_page(call, tmp_path, monkeypatch):
    """What a fresh clone of the project holds of docs/paper is enough."""
    for name in ("index.json", "index.md", "cost.png"):
        (tmp_path / name).write_bytes((ROOT / "docs" / "paper" / name).read_bytes())
    before = index_of(tmp_path)
    point = {"model": "B/16", "size": 64, "tokens": 17, "batch": 8, "peak_memory": 3, "images_per_second": 1.0}
    monkeypatch.setattr(analysis, "cost", lambda *_, **__: [point | {"task": task} for task in ("infer", "step")])
    assert "already" in call("paper", "cost", "--out", tmp_path).out
    assert call("paper", "cost", "--out", tmp_path, "--again").status == 0
    after = index_of(tmp_path)
    assert {**after, "cost": None} == {**before, "cost": None} and after["cost"] != before["cost"]
    assert before["note"] in (tmp_path / "index.md").read_text()


def test_the_page_of_the_project():
    """docs/paper/index.md is what docs/paper/index.json says, and every figure of it is there."""
    folder = ROOT / "docs" / "paper"
    index = index_of(folder)
    assert paper.page_of(index) == (folder / "index.md").read_text()
    assert "JPEG-recompressed" in index["note"] and "5,000" in index["note"]
    for name, known in index.items():
        if name == "note":
            continue
        entry = paper.entry_of(name)
        assert all((folder / file).is_file() for file in known["files"]) and "--out docs/paper" in known["command"]
        if entry.needs == "training":
            assert f"--budget {known['from']['budget']:g}s" in known["command"]


def test_a_note_at_the_head_of_the_page(call, tmp_path, trained, monkeypatch):
    monkeypatch.setattr(paper_plots, "save_filters", lambda path, *_, **__: path.write_bytes(b""))
    common = ["filters", "--run", trained, "--out", tmp_path / "p"]
    assert call("paper", *common, "--note", "Half of the pictures.").status == 0
    assert call("paper", *common, "--again").status == 0  # and it stays
    page = (tmp_path / "p" / "index.md").read_text()
    assert page.index("Half of the pictures.") < page.index("## Filters") and "## What of the paper has no " in page
    assert call("paper", *common, "--note", "All of them.").out.count("already") == 1
    assert "Half" not in (page := (tmp_path / "p" / "index.md").read_text()) and "All of them.\n\n## Filters" in page


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fig7"], "there are filters, "),
        (["filters", "--all"], "leave it out"),
        (["filters", "--run", "nowhere"], "nowhere"),
        (["filters", "--budget", "soon"], "budget"),
        (["filters", "--config", "nosuch"], "nosuch"),
        (["list", "filters"], "no figure 'list'"),
    ],
)
def test_bad_input(call, tmp_path, arguments, says):
    ended = call("paper", *arguments, "--out", tmp_path / "p")
    assert ended.status == 2 and says in ended.err and ended.err.startswith("error: ") and ended.err.count("\n") == 1
    assert not (tmp_path / "p" / "index.json").exists()


def test_what_is_missing_is_told(call, tmp_path):
    gone = [entry for entry in paper.ENTRIES if entry.missing()]
    for entry in gone:
        ended = call("paper", entry.name, "--out", tmp_path / "p")
        assert ended.status == 2 and f"{entry.name} cannot be made: this version has no " in ended.err
    assert (
        paper.without_file(ROOT / "configs" / "nosuch.toml")() == f"this version has no {Path('configs/nosuch.toml')}"
    )
    assert paper.without_file(TINY)() == ""


def test_a_damaged_index_is_made_anew(call, tmp_path, trained, monkeypatch):
    monkeypatch.setattr(paper_plots, "save_filters", lambda path, *_, **__: path.write_bytes(b""))
    for content in ("{", "[]", '{"filters": 3, "cost": {}}', '{"filters": {"from": {}, "files": ["nowhere"]}}'):
        (tmp_path / "index.json").write_text(content)
        ended = call("paper", "filters", "--run", trained, "--out", tmp_path)
        assert ended.status == 0, ended.err
        assert index_of(tmp_path)["filters"]["files"] == ["filters.png"]
