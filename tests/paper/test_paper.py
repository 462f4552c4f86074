"""minivit paper: every figure is listed, made, remembered and told of; trainings fit their budget and go on."""

import json
import os

import numpy as np
import pytest
from conftest import ROOT

from minivit import figures
from minivit.base.errors import InputError
from minivit.commands import paper as command
from minivit.data import load
from minivit.model import ViTConfig
from minivit.model.costs import expected_flops
from minivit.paper import analyses, entries, of_a_model, of_trainings, page, trainings
from minivit.paper.context import Context, Entry, Result
from minivit.paper.entries import entry_of, sweep_entry
from minivit.paper.trainings import Stopped, share_within, standard_error
from minivit.training import budget, loop, plan, trainer
from minivit.training.trainer import Trainer
from minivit.weights import checkpoint

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
    """A sweep in place of those of minivit/configs/sweeps."""
    (tmp_path / "configs" / "sweeps").mkdir(parents=True)
    path = tmp_path / "configs" / "sweeps" / "tiny.toml"
    path.write_text(SWEEP.format(config=TINY))
    monkeypatch.setattr(trainings, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(entries, "ENTRIES", (sweep_entry("tiny", "Table 0", "Tiny", "all of it"),))
    return path


def test_the_list(call, tmp_path, trained):
    for words in ([], ["list"], ["LIST"]):
        ended = call("paper", *words, "--out", tmp_path / "none")
        assert ended.status == 0 and not (tmp_path / "none").exists()
        lines = ended.out.splitlines()
        for entry in entries.ENTRIES:
            (line,) = (line for line in lines if line.startswith(f"{entry.name} "))
            assert entry.mirrors in line and entry.needs in line
    names = [entry.name for entry in entries.ENTRIES]
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
        assert entry_of(name).differs in page and entry_of(name).mirrors in page
        command = f"minivit paper {name} --run {trained} --out {tmp_path / 'p'}\n"
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


def test_images_are_drawn_once_and_their_classes_told(call, tmp_path, trained, monkeypatch):
    sheets = []
    monkeypatch.setattr(figures, "save_rollouts", lambda path, *shown, title: sheets.append(shown))
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


def test_distances_are_of_images_of_all_classes(tmp_path, trained, monkeypatch):
    """Folders come class by class: the first images would be of the first classes alone."""
    context, given = Context(tmp_path, run=trained), []
    model, dataset = context.subject
    order = np.argsort(dataset.test_labels, kind="stable")
    context.subject = model, dataset._replace(test_images=dataset.test_images[order])
    monkeypatch.setattr(analyses, "head_distances", lambda model, images: (given.append(images), np.ones((2, 2)))[1])
    monkeypatch.setattr(figures, "save_distances", lambda *_, **__: None)
    of_a_model.make_distance(context)
    labels = {image.tobytes(): label for image, label in zip(dataset.test_images, dataset.test_labels, strict=True)}
    found = [labels[image.tobytes()] for image in given[0]]
    assert len(found) == 128 and set(found) == set(range(10))


def test_cost_in_a_table(call, tmp_path, monkeypatch):
    def cost(models, sizes, speed, *, progress):
        assert models["B/16"].width == 768 and progress
        point = {"model": "B/16", "size": 64, "tokens": 17, "batch": 8, "peak_memory": 3 * 2**20}
        return [point | {"task": task, "images_per_second": rate} for task, rate in (("infer", 50.0), ("step", 12.34))]

    monkeypatch.setattr(analyses, "cost", cost)
    assert call("paper", "cost", "--out", tmp_path).status == 0
    assert "| B/16 | 64 | 17 | 50 | 12.3 | 3, 3 |" in (tmp_path / "index.md").read_text()
    assert len(json.loads((tmp_path / "cost.json").read_text())) == 2
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_is_trained_where_none_is_named(call, tmp_path, no_figures, monkeypatch):
    common = ["--config", TINY, "--out", tmp_path / "p", "--quiet", "--budget", "20s"]
    end_epoch = loop.end_epoch

    def stop(trainer, *arguments):
        end_epoch(trainer, *arguments)
        if trainer.state.epoch == 2 and trainer.out.name == "model":
            trainer.stop("test")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "end_epoch", stop)
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


def test_a_model_of_fewer_epochs_is_kept_and_goes_on_with_its_threads(call, tmp_path, no_figures, monkeypatch):
    """As many epochs as the budget held, of the 20 of its settings; with the threads that it began with."""
    monkeypatch.setattr(budget, "seconds_of_training", lambda *a, **k: 0.5 + 0.01 * a[3])
    (tmp_path / "mine.toml").write_text(TINY.read_text().replace("workers = 1", "workers = 0"))
    common = ["filters", "--config", tmp_path / "mine.toml", "--out", tmp_path / "p", "--quiet", "--budget", "0.3s"]
    end_epoch = loop.end_epoch
    with monkeypatch.context() as patch:
        patch.setattr(loop, "end_epoch", lambda run, *a: (end_epoch(run, *a), run.stop("test")))
        patch.setattr(plan, "cut", lambda config, batch_size: (2, 7))
        assert call("paper", *common).status == 130
    monkeypatch.setattr(plan, "cut", lambda config, batch_size: (1, 11))
    ended = call("paper", *common)
    assert ended.status == 0, ended.err
    summary = json.loads((tmp_path / "p" / "model" / "summary.json").read_text())
    assert summary["epochs"] == 4 and summary["workers"] == 2
    before = (tmp_path / "p" / "model" / "last.npz").stat().st_mtime_ns
    ended = call("paper", "positions", *common[1:])
    assert ended.status == 0 and "training" not in ended.out, ended.err
    assert (tmp_path / "p" / "model" / "last.npz").stat().st_mtime_ns == before


def test_a_model_of_less_than_an_epoch(call, tmp_path, no_figures, monkeypatch):
    monkeypatch.setattr(budget, "seconds_of_training", lambda *a, **k: 0.5 + 0.01 * a[3])
    common = ["--config", TINY, "--out", tmp_path / "p", "--quiet", "--budget", "0.05s"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "finish", lambda *arguments: None)  # stopped after the last step
        assert call("paper", "filters", *common).status == 130
    ended = call("paper", "filters", *common)
    assert ended.status == 0, ended.err
    assert json.loads((tmp_path / "p" / "model" / "summary.json").read_text())["steps"] == 4
    assert "% after 4 steps." in (tmp_path / "p" / "index.md").read_text()
    ended = call("paper", "positions", *common)
    assert ended.status == 0 and "training" not in ended.out, ended.err


def test_all_rows_get_the_same_share_of_their_epochs():
    times = [lambda n: 10.0 * n, lambda n: 1.0 * n]  # 48 s for 4 and 8 epochs
    assert share_within(times, [4, 8], 1000) == share_within(times, [4, 8], 48) == 1.0
    assert 0.4998 < share_within(times, [4, 8], 24) <= 0.5
    assert share_within(times, [4, 8], 0) == 0.0


def test_a_sweep_is_cut_to_the_budget_and_goes_on(call, tmp_path, sweep, monkeypatch):
    monkeypatch.setattr(trainings, "time_of_epochs", lambda *_, probe: lambda epochs: 10.0 * epochs)
    common = ["tiny", "--out", tmp_path / "p", "--quiet"]
    train = Trainer.run
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", lambda self: None if self.config.optimizer == "sgd" else train(self))
        assert call("paper", *common, "--budget", "32s").status == 130
    assert not (tmp_path / "p" / "index.json").exists()
    plan = json.loads((tmp_path / "p" / "tiny" / "plan.json").read_text())  # 30.4 of 60 s, for 4 and 2 epochs
    assert plan["steps"] == {"AdamW": 12, "SGD": 6}
    monkeypatch.setattr(trainings, "time_of_epochs", None)  # measured once
    before = (tmp_path / "p" / "tiny" / "adamw-seed3" / "last.npz").stat().st_mtime_ns
    ended = call("paper", *common, "--budget", "32s")
    assert ended.status == 0, ended.err
    assert (tmp_path / "p" / "tiny" / "adamw-seed3" / "last.npz").stat().st_mtime_ns == before
    table = json.loads((tmp_path / "p" / "tiny" / "table.json").read_text())
    assert table["seeds"] == [3] and [row["epochs"] for row in table["rows"]] == [2, 1]
    page = (tmp_path / "p" / "index.md").read_text()
    assert (
        "Tiny: seed 3, 6 to 12 steps (51%) of minivit/configs/sweeps/tiny.toml" in page
        and table["title"] in page
        and "| SGD | " in page
        and "(tiny.png)" in page
        and "Table 0" in page
    )
    assert f"minivit paper tiny --out {tmp_path / 'p'} --budget 32s\n" in page
    (accuracies,) = ([row["mean"] for row in table["rows"]],)
    assert standard_error(accuracies, 360) in page
    assert call("paper", "list", "--out", tmp_path / "p").out.count("  made\n") == 1  # of whatever budget
    assert "already" in call("paper", *common, "--budget", "32s").out
    ended = call("paper", *common, "--budget", "1h")
    assert ended.status == 2 and "cut for another budget (32 s, not 3600 s); choose another --out" in ended.err


def test_measured_times_of_two_sweeps(call, tmp_path, sweep, monkeypatch):
    """A step takes 0.01 s; an epoch of 6 steps and 360 predictions, a third of a step each 256, 0.0647 s."""
    monkeypatch.setattr(budget, "seconds_of_training", lambda *a, **k: 0.5 + 0.01 * a[3])
    other = sweep.with_name("other.toml")
    other.write_text(sweep.read_text())
    two = [sweep_entry(name, "Table 0", "Tiny", "all of it") for name in ("tiny", "other")]
    monkeypatch.setattr(entries, "ENTRIES", two)
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
        return Result((), "c")

    entry = Entry("a", "Fig. 0", "A", "nothing", "training", 0, made)
    four = (
        entry._replace(weight=6.0),
        entry._replace(name="b"),
        entry._replace(name="c", needs="a model"),
        entry._replace(name="d", needs="nothing"),
    )
    monkeypatch.setattr(entries, "ENTRIES", four)
    monkeypatch.setattr(page, "sources_of", lambda entry, context: {})
    monkeypatch.setattr(Context, "description", "")
    assert call("paper", "--all", "--out", tmp_path, "--config", TINY, "--budget", "60s").status == 0
    assert shares == [30, 10, 20, 60]  # by weight: 6, 2, and the model's 4; the last trains nothing
    # what is made, and a model that is trained, have their shares still
    shares.clear()
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(Context, "checkpoint", lambda self, **_: tmp_path / "model")
    index = index_of(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({name: index[name] for name in "ad"}))
    monkeypatch.setattr(
        page, "is_made", lambda entry, context: entry.name in page.read_object(context.out / "index.json")
    )
    assert call("paper", "--all", "--out", tmp_path, "--config", TINY, "--budget", "60s").status == 0
    assert shares == [10, 20]
    # the page names the share of each; a budget that no number of seconds divides is told as it is used
    commands = [
        f"minivit paper b --config {TINY} --out {tmp_path} --budget 10s",
        f"c --config {TINY} --out {tmp_path}",
    ]
    assert all(words in (tmp_path / "index.md").read_text() for words in commands)
    third = page.shares_of(four[:3], Context(tmp_path, budget=7.0))
    assert third == {"a": 3.5, "b": 1.167, "c": 2.333}
    assert page.shares_of(four[1:2], Context(tmp_path, budget=1.167)) == {"b": 1.167}
    shares.clear()
    assert call("paper", "b", "--out", tmp_path / "x", "--config", TINY, "--budget", "60s").status == 0
    assert shares == [60]


def test_what_fails_of_all_is_told_and_the_rest_made(call, tmp_path, monkeypatch):
    def bad(context):
        raise InputError("no luck")

    entry = Entry("a", "Fig. 0", "A", "nothing", "nothing", 0, bad)
    good = entry._replace(name="good", make=lambda context: Result((), "fine"))
    monkeypatch.setattr(entries, "ENTRIES", (entry, good))
    ended = call("paper", "--all", "--out", tmp_path)
    assert ended.status == 0 and "  not made: no luck" in ended.out and "fine" in ended.out
    assert list(index_of(tmp_path)) == ["good"]
    monkeypatch.setattr(entries, "ENTRIES", (entry,))
    ended = call("paper", "--all", "--out", tmp_path)
    assert ended.status == 2 and ended.err == "error: nothing could be made of a: the reasons stand above\n"


def test_few_shot_accuracies_are_of_the_runs_own_data(tmp_path, trained):
    context = Context(tmp_path / "o", run=trained, data="cifar10")  # the run's own are the digits
    result = of_a_model.make_few_shot(context)
    assert result.files == ("fewshot/transfer-fewshot-digits.png",)
    assert (tmp_path / "o" / result.files[0]).read_bytes().startswith(b"\x89PNG")
    told = json.loads((tmp_path / "o" / "fewshot" / "transfer-fewshot-digits.json").read_text())
    assert [row["features"] for row in told["rows"]] == ["trained", "untrained", "pixels"]
    assert told["checkpoint"] == str(trained / "last.npz") and told["method"] == "fewshot"
    with pytest.raises(InputError, match="nowhere"):
        of_a_model.make_few_shot(Context(tmp_path / "o2", run=tmp_path / "nowhere"))


def test_figures_of_weights_of_another_program(call, tmp_path, trained):
    """What its file does not say is the data set that is named; other weights in the same place are another model."""
    names, common = ("filters", "positions"), ["--run", tmp_path / "timm", "--out", tmp_path / "p"]
    for layout, name in (("timm", "timm"), ("official", "o.npz")):
        assert call("convert", trained / "last.npz", tmp_path / name, "--to", layout).status == 0
    ended = call("paper", *names, *common)
    assert ended.status == 2 and ended.err.endswith("name one with --data\n") and ended.err.count("error: ") == 1
    ended = call("paper", *names, "fewshot", *common, "--data", "digits")
    assert ended.status == 0, ended.err
    index = index_of(tmp_path / "p")
    assert list(index) == [*names, "fewshot"] and index["filters"]["model"].startswith("digits, patch ")
    assert (
        f"minivit paper filters --run {tmp_path / 'timm'} --data digits --out {tmp_path / 'p'}\n"
        in (tmp_path / "p" / "index.md").read_text()
    )
    again = [*names, *common, "--data", "digits"]
    assert call("paper", *again).out.count("already") == 2
    arrays, meta = checkpoint.load(trained / "last.npz")
    changed = arrays | {"ema/head.bias": arrays["ema/head.bias"] + 1}
    checkpoint.save(tmp_path / "other.npz", changed, meta)
    for path in (tmp_path / "timm").iterdir():
        path.unlink()
    assert call("convert", tmp_path / "other.npz", tmp_path / "timm", "--to", "timm").status == 0
    assert "already" not in call("paper", *again).out
    ended = call("paper", "filters", "--run", tmp_path / "o.npz", "--data", "digits", "--out", tmp_path / "p")
    assert ended.status == 2 and "minivit convert --class-names FILE gives them their names" in ended.err


def test_masked_patches(tmp_path, monkeypatch, no_figures):
    """A step takes 0.01 s; what stopped goes on with as many steps as were measured."""
    monkeypatch.setattr(budget, "seconds_of_training", lambda *a, **k: 0.5 + 0.01 * a[3])
    context, other = (
        Context(tmp_path / "o", data="digits", budget=seconds, progress=False) for seconds in (0.08, 3600.0)
    )
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "finish", lambda *arguments: None)  # stopped after the last step
        with pytest.raises(Stopped):
            of_trainings.make_masked(context)
    with monkeypatch.context() as patch:
        patch.setattr(trainings, "within", None)  # measured once
        result = of_trainings.make_masked(context)
    summary = json.loads((tmp_path / "o" / "masked" / "summary.json").read_text())
    assert 1 < summary["steps"] < 8 and summary["settings"]["pretraining"]["method"] == "mpp"
    with pytest.raises(InputError, match="cut for another budget .0.08 s, not 3600 s.; choose another --out"):
        of_trainings.make_masked(other)
    assert result.files == ("masked/reconstructions.png",)
    assert result.caption.startswith("Test images of digits, ")
    assert f"{summary['test_accuracy']:.1%} are right, of 8 colours" in result.caption
    assert f"after 1 epoch; without looking {summary['chance_accuracy']:.1%}" in result.caption


class Pretence:
    """In place of `run_of`: remembers what it is asked for, and gives summaries; some runs stop at first."""

    def __init__(self, summaries, stops=()):
        self.summaries, self.stops, self.runs = summaries, list(stops), {}

    def __call__(self, context, folder, recipe, seconds, *, masked=None):
        self.runs[folder.name] = (seconds, recipe, masked)
        if folder.name in self.stops:
            self.stops.remove(folder.name)
            raise Stopped
        accuracy = self.summaries.get(folder.name, 0.25)
        return {"test_accuracy": accuracy, "steps": 1234, "train_seconds": 3.5, "test_images": 400,
                "chance_accuracy": 0.0625}  # fmt: skip


def test_half_of_the_time_without_labels(tmp_path, monkeypatch):
    """Equal times for all; each run that begins with another takes that one's last checkpoint."""
    pretence = Pretence({"plain": 0.5, "mae": 0.625}, stops=["mae"])
    monkeypatch.setattr(of_trainings, "run_of", pretence)
    context = Context(tmp_path, data="digits", budget=400.0, progress=False)
    with pytest.raises(Stopped):
        of_trainings.make_self_supervision(context)
    result = of_trainings.make_self_supervision(context)
    times = {name: seconds for name, (seconds, _, _) in pretence.runs.items()}
    assert times == {"plain": 100, "recipe": 100} | dict.fromkeys(["mpp-before", "mpp", "mae-before", "mae"], 50)
    for method in ("mpp", "mae"):
        _, before, masked = pretence.runs[f"{method}-before"]
        _, after, none = pretence.runs[method]
        assert masked.method == method and none is None and before.start == {} and "init" not in before.train
        assert after.start == {"checkpoint": str(tmp_path / "selfsupervision" / f"{method}-before" / "last.npz")}
        assert after.train == pretence.runs["plain"][1].train
        assert before.data["data"] == after.data["data"] == "digits" and before.model["width"] == after.model["width"]
    plain, recipe = pretence.runs["plain"][1].train, pretence.runs["recipe"][1].train
    assert (plain["optimizer"], plain["half_size"], plain["whiten"]) == ("adamw", 0.0, False)
    assert recipe["optimizer"] == "muon" and recipe["half_size"] > 0 and plain["flip"] == recipe["flip"]
    assert (tmp_path / result.files[0]).stat().st_size > 1000
    assert "| masked autoencoder, then labels | 62.50% | 1,234 | 4 |" in result.table
    assert "100 s of training each" in result.caption
    assert "on 400 test images an accuracy has a standard error of up to 2.5 points" in result.caption
    runs = dict(pretence.runs)
    for other, words in ({"budget": 3600.0}, "cut for another budget"), ({"data": "cifar10"}, "runs of other settings"):
        with pytest.raises(InputError, match=words):  # whose caption would tell of what was never trained
            of_trainings.make_self_supervision(Context(tmp_path, **{"data": "digits", "budget": 400.0} | other))
    assert pretence.runs == runs


def test_targets_of_masked_patches(tmp_path, monkeypatch):
    """Each target gets a sixth of the time before the labels and a sixth with them, and begins where it ended."""
    pretence = Pretence({"colour": 0.5, "downsized": 0.25, "downsized-before": 0.125})
    monkeypatch.setattr(of_trainings, "run_of", pretence)
    result = of_trainings.make_targets(Context(tmp_path, data="digits", budget=60.0, progress=False))
    targets = ("colour", "downsized", "pixels")
    assert list(pretence.runs) == [name for each in targets for name in (f"{each}-before", each)]
    for target in targets:
        (first, _, masked), (then, recipe, none) = pretence.runs[f"{target}-before"], pretence.runs[target]
        assert (first, masked.method, masked.target) == (10, "mpp", target) and (then, none) == (10, None)
        assert recipe.start == {"checkpoint": str(tmp_path / "targets" / f"{target}-before" / "last.npz")}
    assert "| downsized | 12.5% | 6.2% | 1,234 | 25.00% | 1,234 |" in result.table
    assert (tmp_path / result.files[0]).stat().st_size > 1000 and "10 s without" in result.caption


def test_a_finished_run_is_left_alone_and_one_that_stopped_goes_on(tmp_path, monkeypatch, no_figures):
    monkeypatch.setattr(budget, "seconds_of_training", lambda *a, **k: 0.5 + 0.01 * a[3])
    context = Context(tmp_path, data="digits", progress=False)
    recipe = trainings.read_recipe(TINY)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "finish", lambda *arguments: None)
        with pytest.raises(Stopped):
            trainings.run_of(context, tmp_path / "run", recipe, 0.05)
    monkeypatch.setattr(trainings, "within", None)  # no time is asked for again
    summary = trainings.run_of(context, tmp_path / "run", recipe, 1000.0)
    assert summary["steps"] == 4
    monkeypatch.setattr(trainings, "prepare", None)
    assert trainings.run_of(context, tmp_path / "run", recipe, 1000.0) == summary


def test_fine_tuning_begins_with_the_model_of_the_first_classes(tmp_path, monkeypatch, no_figures):
    tiny = {"patch_size": 8, "width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 16}
    read_sweep = trainings.read_sweep

    def small(path):
        sweep = read_sweep(path)
        recipes = [row.recipe._replace(model=row.recipe.model | tiny) for row in sweep.rows]
        return sweep._replace(rows=tuple(row._replace(recipe=r) for row, r in zip(sweep.rows, recipes, strict=True)))

    monkeypatch.setattr(trainings, "read_sweep", small)
    monkeypatch.setattr(trainings, "time_of_epochs", lambda *_, probe: lambda epochs: 10.0 * epochs)
    context = Context(tmp_path, data="digits", budget=100.0, progress=False)
    made = of_trainings.make_fine_tuning(context)
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
    sweep = trainings.read_sweep(trainings.CONFIGS / "sweeps" / "pretraining.toml")
    monkeypatch.setattr(of_trainings, "finished_sweep", lambda *_, **settings: (sweep._replace(seeds=(0,)), tmp_path))
    monkeypatch.setattr(of_trainings, "result_of", lambda run: {"diverged": 7})
    with pytest.raises(InputError, match="pre-training-seed0 diverged at step 7: there is no model to begin with"):
        of_trainings.make_fine_tuning(Context(tmp_path))


def test_axial_attention_against_compute_and_speed(call, tmp_path, monkeypatch, no_figures):
    """Every row of paper-axial.toml, made small, is trained, timed and drawn; FLOPs are of its steps."""
    tiny, read_sweep, timed, drawn = {"width": 8, "num_heads": 2, "mlp_dim": 8}, trainings.read_sweep, [], []

    def small(path):
        sweep = read_sweep(path)
        recipes = [row.recipe._replace(model=row.recipe.model | tiny) for row in sweep.rows]
        return sweep._replace(rows=tuple(row._replace(recipe=r) for row, r in zip(sweep.rows, recipes, strict=True)))

    def speed(config, task, batch, turns):
        timed.append((config.attention, config.depth, config.patch_size))
        return {"images_per_second": 1000.0 * len(timed)} if task == "infer" and turns > 1 else None

    monkeypatch.setattr(trainings, "read_sweep", small)
    monkeypatch.setattr(trainings, "time_of_epochs", lambda *_, probe: lambda epochs: 10.0 * epochs)
    monkeypatch.setattr(command, "speed", speed)
    monkeypatch.setattr(figures, "save_sweep", lambda *_: None)
    real = figures.save_axial
    monkeypatch.setattr(figures, "save_axial", lambda path, *a, **k: (drawn.append(a), real(path, *a, **k)))
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
    """Every row of paper-hybrid.toml, made small, is trained and drawn; FLOPs are of its steps."""
    drawn, read_sweep = [], trainings.read_sweep

    def small(path):
        sweep, rows = read_sweep(path), []
        for row in sweep.rows:
            tiny = {"width": row.recipe.model["width"] // 8, "depth": 1, "num_heads": 2, "stem_width": 4}
            patch = {"patch_size": 1} if row.recipe.model.get("stem") else {"patch_size": 4}
            rows.append(row._replace(recipe=row.recipe._replace(model=row.recipe.model | tiny | patch)))
        return sweep._replace(rows=tuple(rows))

    monkeypatch.setattr(trainings, "read_sweep", small)
    monkeypatch.setattr(trainings, "time_of_epochs", lambda *_, probe: lambda epochs: 10.0 * epochs)
    monkeypatch.setattr(figures, "save_sweep", lambda *_: None)
    real = figures.save_compute
    monkeypatch.setattr(figures, "save_compute", lambda path, *a, **k: (drawn.append(a), real(path, *a, **k)))
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


def test_equal_steps_on_shares_of_the_images():
    """The rows of minivit/configs/sweeps/paper-datasize.toml have as many steps, and as many of them to warm up."""
    rows = trainings.read_sweep(trainings.CONFIGS / "sweeps" / "paper-datasize.toml").rows
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
    monkeypatch.setattr(analyses, "cost", lambda *_, **__: [point | {"task": task} for task in ("infer", "step")])
    assert "already" in call("paper", "cost", "--out", tmp_path).out
    assert call("paper", "cost", "--out", tmp_path, "--again").status == 0
    after = index_of(tmp_path)
    assert {**after, "cost": None} == {**before, "cost": None} and after["cost"] != before["cost"]
    assert before["note"] in (tmp_path / "index.md").read_text()


def test_the_page_of_the_project():
    """docs/paper/index.md is what docs/paper/index.json says, and every figure of it is there."""
    folder = ROOT / "docs" / "paper"
    index = index_of(folder)
    assert page.page_of(index) == (folder / "index.md").read_text()
    assert "JPEG-recompressed" in index["note"] and "5,000" in index["note"]
    for name, known in index.items():
        if name == "note":
            continue
        entry = entry_of(name)
        assert all((folder / file).is_file() for file in known["files"]) and "--out docs/paper" in known["command"]
        if entry.needs == "training":
            assert f"--budget {known['from']['budget']:g}s" in known["command"]


def test_a_note_at_the_head_of_the_page(call, tmp_path, trained, monkeypatch):
    monkeypatch.setattr(figures, "save_filters", lambda path, *_, **__: path.write_bytes(b""))
    common = ["filters", "--run", trained, "--out", tmp_path / "p"]
    assert call("paper", *common, "--note", "Half of the images.").status == 0
    assert call("paper", *common, "--again").status == 0  # and it stays
    page = (tmp_path / "p" / "index.md").read_text()
    assert page.index("Half of the images.") < page.index("## Filters") and "## What of the paper has no " in page
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


def test_a_damaged_index_is_made_anew(call, tmp_path, trained, monkeypatch):
    monkeypatch.setattr(figures, "save_filters", lambda path, *_, **__: path.write_bytes(b""))
    for content in ("{", "[]", '{"filters": 3, "cost": {}}', '{"filters": {"from": {}, "files": ["nowhere"]}}'):
        (tmp_path / "index.json").write_text(content)
        ended = call("paper", "filters", "--run", trained, "--out", tmp_path)
        assert ended.status == 0, ended.err
        assert index_of(tmp_path)["filters"]["files"] == ["filters.png"]
