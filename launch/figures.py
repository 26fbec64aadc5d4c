r"""Measures the tables and figures of a trained cascade on the captioned shapes.

  pip install '.[plot]' && python launch/figures.py FOLDER PART [PART …]

table1        original and distilled stages with constant and oscillating guidance, as the paper's Table 1
guidance      weights of constant guidance
augmentation  signal-to-noise ratios of the noise on the low-resolution clips (Section 2.5)
steps         sampling steps of the original stages and of their students
contact       frames of twelve prompts, in one picture

Each row is measured as --mode=evaluate does, once for each of --seeds. FOLDER/PART/ROW.SEED.json has the measures of a
row's clips of one seed, and is written when they are known. Run a command again after an interruption, or with more
--seeds or --values: what is there is kept. FOLDER/PART.md, PART.json and PART.png (of contact: the picture alone) are
made from all files of the part. Seconds are those of sampling without compilation, on the device that the table names.

Weights come from the package, or of the original stages from --originals=DIR and of students from --students=DIR:
DIR/STAGE_PHASE.safetensors, DIR/STAGE.safetensors, or DIR/STAGE, the folder of a training run or of a distillation.
"""

import argparse
import functools
import json
import os
import pathlib
import re
import sys
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax

from ivideo import checks, files, stages
from ivideo.config_files import load_config
from ivideo.data import shapes
from ivideo.errors import UserError
from ivideo.evaluation import averages, evaluate, generated, pictures, prompt_following
from ivideo.planning import describe
from ivideo.sampling import cascade
from ivideo.training import trained

ORIGINAL, DISTILLED = "demo", "demo_distilled"  # variants of the cascade's config
GUIDED = ("base", "tsr1", "ssr1")  # the stages that the paper samples with oscillating guidance
WEIGHTS, RATIOS, STEPS = (0, 1, 2, 4), (3, 5, 10, 20, 30, 100), (32, 16, 8, 4, 2, 1)
# Of each plotted part: the label of the horizontal axis, whether it is logarithmic, and what is drawn beside following
PLOTS = {
    "guidance": ("weight", False, ("drift", "ideal_iou")),
    "augmentation": ("SNR", True, ("ideal_iou", "grain")),
    "steps": ("steps", True, ("ideal_iou", "seconds")),
}
PROMPTS = (
    "a red star moving right on a teal background", "a blue triangle moving up on a gray background",
    "a white circle standing still on a brown background", "a purple square moving left on a black background",
    "a yellow star moving left on a gray background", "a green triangle moving down on a black background",
    "a red circle moving up on a teal background", "a blue square standing still on a brown background",
    "a white star moving down on a black background", "a purple triangle moving right on a teal background",
    "a yellow circle moving left on a brown background", "a green square moving right on a gray background",
)  # fmt: skip

_flops = {}


class Row(NamedTuple):
    """A row of a part: its name, its place in the table, its labels there, and the config of its cascade."""

    name: str
    place: list
    labels: dict
    config: object


def changed(config, names, **values):
    """The cascade's config with other `sample` values of the named stages."""
    config = config.copy_and_resolve_references()
    for name in names:
        config.stages[name].sample.update(values)
    return config


def mixed(original, distilled, names):
    """The original cascade's config with the named stages of the distilled one."""
    config = original.copy_and_resolve_references()
    with config.unlocked():
        for name in names:
            config.stages[name] = distilled.stages[name]
    return config


def table1(args, networks):
    """The rows of the paper's Table 1: base and super-resolution original or distilled, × the kinds of guidance."""
    order = networks["original"].order
    given = {"weight": args.weight, "high_weight": args.high, "low_weight": args.low}
    given = {name: value for name, value in given.items() if value is not None}
    students = {"original / original": (), "original / distilled": order[1:], "distilled / distilled": order}
    for number, (networks_used, names) in enumerate(students.items()):
        config = mixed(networks["original"], networks["distilled"], names)
        for kind in ("constant", "oscillating"):
            labels = {"base / super-resolution": networks_used, "guidance": kind}
            row_config = changed(config, args.stages or GUIDED, guidance=kind, **given)
            yield Row(f"{networks_used.replace(' / ', '-')} {kind}", [number, kind], labels, row_config)


def guidance(args, networks):
    """A row per network and weight of constant guidance."""
    for name in args.networks:
        for weight in args.values or WEIGHTS:
            config = changed(networks[name], args.stages or GUIDED, guidance="constant", weight=float(weight))
            yield Row(f"{name} {weight:g}", [name, weight], {"network": name, "weight": weight}, config)


def augmentation(args, networks):
    """A row per network and signal-to-noise ratio of the low-resolution clips."""
    for name in args.networks:
        for snr in args.values or RATIOS:
            config = changed(networks[name], args.stages or networks[name].order[1:], augmentation_snr=float(snr))
            yield Row(f"{name} {snr:g}", [name, snr], {"network": name, "SNR": snr}, config)


def steps(args, networks):
    """A row per number of steps: of the original stages in so many steps, and of the students for so many."""
    for name in args.networks:
        order, student = networks[name].order, name == "distilled"
        own = [] if student else [max(networks[name].stages[stage].sample.steps for stage in order)]
        for count in map(int, args.values or [*own, *STEPS]):
            config = networks[name].copy_and_resolve_references()
            with config.unlocked():
                for stage in args.stages or order:
                    config.stages[stage] = in_steps(networks[name].stages[stage], count, student=student)
            yield Row(f"{name} {count}", [name, -count], {"network": name, "steps": count}, config)


def in_steps(config, count: int, *, student: bool):
    """A stage's config, or that of its student, for `count` steps or for all that it has."""
    if student:
        phases = stages.phases(config)
        names = [name for name in (f"{count}_stochastic", str(count)) if name in phases]
        return stages.distilled(
            config, [*names, "guidance" if count >= config.distill.teacher_steps else str(count)][0]
        )
    config = config.copy_and_resolve_references()
    config.sample.steps = min(count, config.sample.steps)
    return config


PARTS = {"table1": table1, "guidance": guidance, "augmentation": augmentation, "steps": steps}


def find_weights(configs, args) -> dict[str, str | None]:
    """Per stage, where its weights are: a file or a folder, or None for the package."""
    found = {}
    for config in configs:
        folder, name = (args.students if config.phase else args.originals), config.stage
        if folder is not None:
            choices = [os.path.join(folder, f"{n}.safetensors") for n in (f"{name}_{config.phase}", name)]
            folder = next(filter(os.path.exists, choices), os.path.join(folder, name))
        found[name] = folder
    return found


def forward_flops(config) -> int:
    """`describe.forward_flops`, counted once per network: it takes seconds."""
    key = f"{config.video} {config.cond} {config.model} {config.text}"
    if key not in _flops:
        _flops[key] = describe.forward_flops(config)
    return _flops[key]


def settings(configs, sources, clips: int, seed: int) -> dict:
    """All that a row's file must have been made with."""

    def of_stage(config):
        sample = config.sample.to_dict()
        kept = {name: sample[name] for name in sorted(sample) if name not in ("mesh", "batch", "group")}
        return {"phase": config.phase, "weights": trained.check(config, sources[config.stage]), "sample": kept}

    found = {"clips": clips, "seed": seed, "stages": {config.stage: of_stage(config) for config in configs}}
    return json.loads(json.dumps(found))  # tuples become lists, as in a file


def measure_row(row: Row, folder: pathlib.Path, args) -> None:
    """Measures the clips of the seeds for which there is no file yet. UserError for a file of other settings."""
    configs = cascade.select(row.config, None, args.to_stage)
    sources = find_weights(configs, args)
    wanted = {}
    for seed in args.seeds:
        path, found = folder / f"{row.name}.{seed}.json", settings(configs, sources, args.clips, seed)
        if not path.exists() or args.again:
            wanted[path] = found
        elif files.read_json(path)["settings"] != found:
            raise UserError(
                f"{path} was measured with other weights, clips or settings: choose another FOLDER, or --again"
            )
    if not wanted:
        return
    seeds = [found["seed"] for found in wanted.values()]
    attributes = [a for seed in seeds for a in evaluate.choose_captions(args.clips, seed)]
    noise = [(seed, n) for seed in seeds for n in range(args.clips)]
    rows, seconds = evaluate.measure_captions(
        configs, attributes, seeds=noise, sources=sources, group=row.config.sample.group
    )
    evaluations = {config.stage: stages.evaluations(config) for config in configs}
    flops = sum(evaluations[config.stage] * forward_flops(config) for config in configs)
    for number, (path, found) in enumerate(wanted.items()):
        of_seed = range(number * args.clips, (number + 1) * args.clips)
        result = {
            "labels": row.labels, "place": row.place, "settings": found, "seconds": seconds, "flops": flops,
            "evaluations": evaluations, "device": jax.devices()[0].device_kind,
            "clips": [clip for clip in rows if clip["number"] in of_seed],
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, json.dumps(result, default=bool))


def summaries(folder: pathlib.Path) -> list[dict]:
    """One entry per row of which the folder has files, over all seeds."""
    by_row = {}
    for path in sorted(folder.glob("*.json")):
        by_row.setdefault(path.name.rsplit(".", 2)[0], []).append(files.read_json(path))
    found = []
    for results in sorted(by_row.values(), key=lambda results: results[0]["place"]):
        table = generated.summarize([clip for result in results for clip in result["clips"]])
        stage, first = list(table["stages"])[-1], results[0]
        found.append({
            "labels": first["labels"], "to_stage": stage, "seeds": [r["settings"]["seed"] for r in results],
            **table["stages"][stage], "seconds": averages.mean([sum(r["seconds"].values()) for r in results]),
            "evaluations": sum(first["evaluations"].values()), "flops": first["flops"], "device": first["device"],
            "table": table,
        })  # fmt: skip
    return found


def markdown(found: list[dict]) -> str:
    """The entries of a part as a table."""
    labels = list(found[0]["labels"])
    columns = [*labels, "up to", "clips", "seen", "held-out", "ideal IoU", "steady IoU", "grain", "drift"]
    columns += ["evaluations", "FLOPs", "seconds per clip"]
    lines = [f"| {' | '.join(columns)} |", "|---" * (len(labels) + 1) + f"|{'--:|' * (len(columns) - len(labels) - 1)}"]
    for row in found:
        error, seeds = row["standard_error"], len(row["seeds"])
        cells = [
            *(row["labels"][name] for name in labels),
            row["to_stage"],
            f"{row['clips']} ({seeds} seed{'s' * (seeds > 1)})",
        ]
        cells += [averages.text(row[n], error[n], digits=1, percent=True) for n in ("seen", "held_out")]
        cells += [averages.text(row[n], error[n], digits=3 if "iou" in n else 2) for n in generated.MEASURES]
        cells += [row["evaluations"], describe.human_flops(row["flops"]), f"{row['seconds']:.3g}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    devices = ", ".join(dict.fromkeys(row["device"] for row in found))
    return "\n".join(
        [*lines, "", f"Measured on {devices}; means ± standard errors over all clips; grain and drift of 255."]
    )


def draw(part: str, found: list[dict], pyplot):
    """Draws a part's entries. Returns the figure."""
    label, logarithmic, measures = PLOTS[part]
    figure, panels = pyplot.subplots(1, 1 + len(measures), figsize=(12, 3.5), layout="constrained")
    for network in dict.fromkeys(row["labels"]["network"] for row in found):
        rows = [row for row in found if row["labels"]["network"] == network]
        for panel, names in zip(panels, (("seen", "held_out"), *((name,) for name in measures)), strict=True):
            for name in names:
                line = f"{network}, {name.replace('_', '-')} captions" if len(names) > 1 else network
                errors = [row["standard_error"].get(name) or 0 for row in rows]
                x, y = ([row["labels"][label] for row in rows], [row[name] for row in rows])
                panel.errorbar(x, y, errors, fmt="o-", capsize=2, label=line)
    for panel, title in zip(panels, ("share of correct clips", *measures), strict=True):
        panel.set(xlabel=label, ylabel={"seconds": "seconds per clip"}.get(title, title.replace("_iou", " IoU")))
        panel.legend(fontsize=7)
        if logarithmic:
            panel.set_xscale("log", base=2)
    return figure


def contact(args, config) -> None:
    """Samples the prompts and draws their frames, unless the picture exists."""
    path = args.folder / "contact.png"
    if path.exists() and not args.again:
        return print(f"{path} exists: --again makes it anew")
    configs = cascade.select(config, None, args.to_stage)
    sources, noise = find_weights(configs, args), [(args.seeds[0], n) for n in range(len(PROMPTS))]
    for stage in configs:
        trained.check(stage, sources[stage.stage])
    videos, lines = [], []
    for _, _, video in cascade.run(configs, PROMPTS, seeds=noise, sources=sources, group=4):
        right = generated.measure(video, shapes.parse_caption(PROMPTS[len(videos)]))
        wrong = [name for name in prompt_following.ATTRIBUTES if right[name] is False]
        lines.append(f"{PROMPTS[len(videos)]}: {'wrong ' + ', '.join(wrong) if wrong else 'right'}")
        videos.append(video[:: max(1, (len(video) - 1) // 5)])  # six frames, or a few more
    args.folder.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as temporary:
        pictures.contact_sheet(videos, PROMPTS, width=args.frame_width).save(temporary, format="png")
    print("\n".join([*lines, str(path)]))


def make_part(part: str, args, networks) -> None:
    """Measures a part's rows, and writes its table and its picture."""
    rows = [row for row in PARTS[part](args, networks) if re.search(args.only, row.name)]
    for row in list(rows):  # before anything is sampled
        configs = cascade.select(row.config, None, args.to_stage)
        try:
            sources = find_weights(configs, args)
            for config in configs:
                checks.check(config)
                trained.check(config, sources[config.stage])
        except UserError as e:
            if part != "steps":  # there need not be students for every number of steps
                raise
            print(f"{part}: {row.name} is left out: {e}", flush=True)
            rows.remove(row)
    for row in rows:
        measure_row(row, args.folder / part, args)
        print(f"{part}: {row.name}", flush=True)
    if found := summaries(args.folder / part):
        files.write_json(args.folder / f"{part}.json", found)
        files.write_text(args.folder / f"{part}.md", markdown(found) + "\n")
        print(f"\n{markdown(found)}\n")
        if part in PLOTS:
            pictures.plot(args.folder / f"{part}.png", functools.partial(draw, part, found))


def load_networks(args) -> dict:
    """The configs that the parts need, 'original' and 'distilled'. UserError for a stage that they do not have."""
    needed = {"contact": ["distilled"], "table1": ["original", "distilled"]}
    names = {name for part in args.parts for name in needed.get(part, args.networks)}
    networks = {name: load_config(f"{args.config}:{getattr(args, name)}") for name in sorted(names)}
    for config in networks.values():
        for stage in args.stages or ():
            cascade.select(config, None, stage)
    return networks


def words(text: str) -> list[str]:
    return text.split(",")


def networks_of(text: str) -> list[str]:
    if unknown := {*words(text)} - {"original", "distilled"}:
        raise argparse.ArgumentTypeError(f"expected original, distilled or both, not {', '.join(sorted(unknown))}")
    return words(text)


def clips_of(text: str) -> int:
    if int(text) < 2:
        raise argparse.ArgumentTypeError("expected 2 or more, one of a caption from training and one held out")
    return int(text)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "contact"], metavar="PART")
    add = parser.add_argument
    add("--config", default="configs/cascade.py", help="config file of the cascade")
    add("--original", default=ORIGINAL, help="its variant with the original stages")
    add("--distilled", default=DISTILLED, help="its variant with the distilled stages")
    add("--originals", metavar="DIR", help="weights of original stages; default: the package's")
    add("--students", metavar="DIR", help="weights of distilled stages; default: the package's")
    add("--to_stage", help="the last stage to run; default: all")
    add("--clips", type=clips_of, default=96, help="clips per row and seed, half of them of held-out captions")
    add("--seeds", type=lambda text: [int(n) for n in words(text)], default=[2, 3], help="such as 2,3")
    add("--networks", type=networks_of, default=["original", "distilled"], help="of guidance, augmentation and steps")
    add("--stages", type=words, help="stages that a part changes; default: base,tsr1,ssr1 of guidance, all of the rest")
    add("--values", type=lambda text: [float(n) for n in words(text)], help="weights, ratios or numbers of steps")
    add("--weight", type=float, help="constant weight of table1; default: the configs'")
    add("--high", type=float, help="high weight of oscillating guidance in table1; default: the configs'")
    add("--low", type=float, help="low weight")
    add("--only", default="", help="measure only rows whose name matches this regular expression")
    add("--again", action="store_true", help="measure rows that exist, too")
    add("--frame_width", type=int, default=160, help="pixels of a frame in the contact sheet")
    args = parser.parse_args(arguments)
    try:
        networks = load_networks(args)
        for part in args.parts:
            contact(args, networks["distilled"]) if part == "contact" else make_part(part, args, networks)
    except UserError as e:
        parser.exit(2, f"figures.py: {e}\n")


if __name__ == "__main__":
    if not jax.config.jax_compilation_cache_dir:  # rows share most of their programs
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/ivideo"))
    main()
