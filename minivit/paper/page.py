"""The page of the paper's figures: what is made, from what, and how to make it again.

model/           the run of the model that is analysed, where none is named: an ordinary run
NAME.png         the figure of an entry
NAME/            the runs of an entry that trains, and its table
index.json       what the figures were made from, so that nothing is made twice
index.md         the page
"""

from __future__ import annotations

import shlex
import time
import zlib
from typing import Any

from minivit.base.files import read_object, write_atomically, write_json
from minivit.paper import entries
from minivit.paper.context import Result
from minivit.paper.trainings import plan_of
from minivit.weights.layouts import file_of

INDEX, PAGE = "index.json", "index.md"
MODEL_WEIGHT = 4.0  # of the budget, for the model that several figures are of


def sources_of(entry, context):
    """What an entry's figure depends on, for JSON: where it is the same, nothing is to be made again."""
    content: dict[str, Any] = {"suffix": context.suffix}
    if entry.needs == "a model" and (path := context.checkpoint(train=False)) is not None:
        if (path := file_of(path)).is_file():
            content["checkpoint"] = zlib.crc32(path.read_bytes())
    if entry.needs == "training":
        content |= {"budget": context.share, "data": context.data}
    return content


def shares_of(group, context):
    """The seconds for each of the entries, by name: the context's, by weight, but for those that train nothing.

    What is made already has its share like the others: the same command, given again, shares out as it did before.
    """
    weights = {entry.name: entry.weight for entry in group if entry.needs == "training"}
    models = [entry.name for entry in group if entry.needs == "a model" and context.run is None]
    whole = sum(weights.values()) + MODEL_WEIGHT * bool(models)
    weights |= dict.fromkeys(models, MODEL_WEIGHT)  # of one and the same model
    # four digits: what --budget says when an entry is made again alone
    return {name: float(f"{context.share * weight / whole:.4g}") for name, weight in weights.items()}


def budget_of(entry, context):
    """The --budget with which an entry alone is made as it was, in seconds; None if it trains nothing."""
    if entry.needs == "training":
        return context.share
    if entry.needs == "a model" and context.run is None:
        return plan_of(context.out / "model").get("budget", context.share)
    return None


def is_made(entry, context, *, any_budget=False):
    """Is the figure in the folder already, and made from the same, perhaps but for the budget?"""
    record, sources = read_object(context.out / INDEX).get(entry.name), sources_of(entry, context)
    if not isinstance(record, dict) or not isinstance(before := record.get("from"), dict):
        return False
    if any_budget and "budget" in before:
        sources["budget"] = before["budget"]
    if before != sources:
        return False
    return all((context.out / name).is_file() for name in record.get("files", ["?"]))


def make(entry, context, command):
    """Make an entry's figures and write the page anew.

    ``command``: what a reader types to do it again, without its --budget.

    Raises  InputError: it cannot be made;  Stopped
    """
    context.out.mkdir(parents=True, exist_ok=True)
    started_at = time.monotonic()
    result = entry.make(context)
    budget = budget_of(entry, context)
    add_to_page(context, entry.name, result._asdict() | {
        "from": sources_of(entry, context),
        "command": shlex.join([*command, *([] if budget is None else ["--budget", f"{budget:.10g}s"])]),
        "seconds": time.monotonic() - started_at,
        "model": context.description if entry.needs == "a model" else "",
    })  # fmt: skip
    return result


def add_to_page(context, name, content):
    """Remember an entry, or the note (see `page_of`), in index.json, and write the page anew."""
    context.out.mkdir(parents=True, exist_ok=True)
    index = read_object(context.out / INDEX) | {name: content}
    write_json(context.out / INDEX, index)
    text = page_of(index)
    write_atomically(context.out / PAGE, lambda file: file.write(text.encode(errors="backslashreplace")))


def page_of(index):
    """The Markdown page of all figures that were made, from the content of index.json.

    What stands there under "note" is a paragraph at its head: of the data, say, what the program cannot know.
    """
    lines = [
        "# The figures of the ViT paper, made again",
        "",
        "After Dosovitskiy et al. 2020, [arXiv:2010.11929](https://arxiv.org/abs/2010.11929), by `minivit paper`.",
        "Its `--all --budget TIME` makes all of them and shares the time out; the command below a figure makes that",
        "one alone, with the time that it had. One seed and little training each: means are shown, not ends.",
    ]
    if isinstance(note := index.get("note"), str):
        lines += ["", note]
    for entry in entries.ENTRIES:
        record = index.get(entry.name)
        if not isinstance(record, dict) or not record.keys() >= {*Result._fields, "command", "model"}:
            continue
        lines += ["", f"## {entry.title} ({entry.mirrors})", ""]
        lines += [f"![{entry.title}]({name})" for name in record["files"]]
        lines += ["", f"*{record['caption']}*", ""]
        lines += [f"What differs from the paper: {entry.differs}.", ""]
        if record["model"]:
            lines += [f"Model: {record['model']}.", ""]
        lines += ["```bash", record["command"], "```"]
        if record["table"]:
            lines += ["", record["table"]]
    lines += ["", "## What of the paper has no figure here", "", *(f"- {each}" for each in entries.ABSENT)]
    return "\n".join(lines) + "\n"
