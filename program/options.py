"""What a run's options may be: on the command line, in a preset, in a checkpoint.

GROUPS says it of each once. `add_options` makes the command line of it, `read_options` checks what a checkpoint claims,
`refuse_idle_options` knows what does nothing, `choose_options` fills in what the data set, a preset and the other options
decide, and `commands` writes it all down as one can paste it.
"""

import argparse
import dataclasses
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import fast
import transgan
from data import UserError
from look.pictures import KINDS
from paper.networks import NAMES
from program import presets
from program.presets import PRESETS
from store import arguments, datasets, files
from store.arguments import folder, number


@dataclasses.dataclass
class Options(transgan.Options):
    """The book's options, and those of what the program adds to it."""

    generator: str = "transgan"  # or the name of a peer, see paper/networks.py
    discriminator: str = "transgan"
    accumulate: int = 1  # parts in which each batch is worked through
    precision: str = "float32"  # of matrix products, see fast.install

    @property
    def pair(self):
        """The networks in words: TransGAN-S, or AutoGAN-S against TransGAN."""
        against = f" against {NAMES[self.discriminator]}" if self.discriminator != self.generator else ""
        return f"{NAMES[self.generator]}-{self.size}{against}"


def policy(text):
    """An argument type: names of augmentations, separated by commas, or none."""
    names = [name.strip() for name in text.split(",")]
    if names != ["none"] and (not set(names) <= set(transgan.AUGMENTATIONS) or len(set(names)) < len(names)):
        known = ",".join(transgan.AUGMENTATIONS)
        raise argparse.ArgumentTypeError(f"{text!r} must be none, or some of {known}, each once")
    return ",".join(names)


def schedule(text):
    """An argument type: half_width:epoch pairs, separated by commas, both growing, or none."""
    try:
        pairs = [(0, 0.0), *(transgan.locality_pairs(text) if text != "none" else ())]
        growing = all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(pairs))
    except ValueError:
        growing = False
    if not growing:
        example = f"pairs half_width:epoch like {Options.locality}, both growing"
        raise argparse.ArgumentTypeError(f"{text!r} must be none, or {example}")
    return text


class Option(NamedTuple):
    """An option of the command line, a field of Options or another."""

    values: Any  # choices, or an argument type that raises for others, or bool: to say it is enough
    metavar: str | None
    help: str
    default: Any = None  # for fields of Options, `fill_in` knows where that is


WHOLE = number(int, 1)
NETWORKS = {
    "dataset": Option(arguments.pictures, "NAME", "pictures to learn: shapes, drawn by the program; cifar10, stl10 (2.6 "
                      "GB) or celeba (1.4 GB); or a folder of any pictures, of which the middle is cut out and resized "
                      "(default: shapes)"),
    "size": Option(transgan.SIZES, None, "networks: the paper's S, M, L, XL, or tiny for a laptop "
                   "(default: S; tiny for shapes, XL for stl10 and celeba)"),
    "generator": Option(NAMES, None, "the paper's, or a convolutional one it is compared with: AutoGAN's or WGAN-GP's "
                        "residual network (default: transgan)"),
    "discriminator": Option(NAMES, None, "likewise (default: transgan)"),
    "image_size": Option(number(int, 8, 128), "N", "pixels a side, for a folder (default: 32) and for shapes (default: "
                         "16); cifar10 has 32, stl10 48, celeba 64, and what divides these is averaged"),
    "patch_size": Option(number(int, 1, 128), "N", "side of a discriminator's patch (default: an 8x8 grid, at least 4)"),
}  # fmt: skip
TRAINING = {
    "loss": Option(transgan.LOSSES, None, "the adversarial loss (default: wgangp-eps)"),
    "steps": Option(WHOLE, "N", "generator steps (default: 500000; 50000 for the discriminator autogan, 100000 for "
                    "resnet; for shapes 1000)"),
    "batch_size": Option(WHOLE, "N", "real pictures a discriminator step (default: 32; 64 for other discriminators; 16 for "
                         "stl10, celeba and shapes)"),
    "accumulate": Option(WHOLE, "N", "work through each batch in N parts, in an N-th of the memory, up to half as long "
                         "again; the steps are the same up to rounding (default: 1)"),
    "gen_batch_size": Option(WHOLE, "N", "generated pictures a generator step (default: 64; 128 for other "
                             "discriminators; 32 for stl10 and celeba; 16 for shapes)"),
    "disc_steps": Option(WHOLE, "N", "discriminator steps a generator step (default: 5; for shapes 2)"),
    "learning_rate": Option(number(float, 0, 1), "R", "Adam's rate at the start (default: 1e-4; for tiny 5e-4)"),
    "decay": Option(transgan.DECAYS, None, "of that rate: none; or linear, to 0 over the run, as WGAN-GP's authors had it "
                    "(default: none; for the discriminator resnet linear)"),
    "beta2": Option(number(float, 0, 1 - 1e-6), "R", "Adam's second decay (default: 0.99; 0.9 for other discriminators)"),
    "precision": Option(fast.PRECISIONS, None, "of matrix products: a GPU is faster with tf32 or bfloat16, a CPU rounds as "
                        "it would, slowly (default: float32)"),
    "ema_decay": Option(number(float, 0, 1), "R", "decay of the moving average of the generator that makes the samples "
                        "(default: 0.999; for tiny 0.99; for the discriminator resnet 0, so none)"),
    "seed": Option(number(int, 0), "N", "of everything random in training (default: 0)"),
    "diff_aug": Option(policy, "LIST", "augmentations of all pictures that the discriminator sees, separated by commas, or "
                       f"none (default: {Options.diff_aug}; for shapes none)"),
    "sr_weight": Option(number(float, 0), "W", "weight of co-training with super-resolution in the generator's loss; 0 is "
                        "without (default: 50; for tiny 0)"),
    "locality": Option(schedule, "LIST", "how far a token of the generator sees, until which epoch of "
                       f"{transgan.EPOCHS['cifar10']} (stl10 {transgan.EPOCHS['stl10']}, celeba "
                       f"{transgan.EPOCHS['celeba']}), scaled to the run, or none (default: {Options.locality}; for celeba "
                       f"{presets.CELEBA}; for tiny none)"),
    "locality_stages": Option(number(int, 1, 4), "N", "the last N stages are so limited (default: 1)"),
    "locality_shape": Option(transgan.LOCALITY_SHAPES, None, "window: tokens near in rows and columns, as the paper's "
                             "figure has it; band: near in number, in the last block alone, as the authors' code (default: "
                             "window)"),
}  # fmt: skip
OPTIONS = NETWORKS | TRAINING
REWINDS = 5  # times that the learning rate may be halved
GROUPS = {
    "what to train": NETWORKS | {
        "preset": Option(PRESETS, "NAME", "all options of one of the paper's runs, or of one for a laptop: "
                         f"{', '.join(PRESETS)}; what else is given goes before; with --summary, what the paper's text, "
                         "the authors' commands and we have where these differ"),
    },
    "how to train; the defaults follow the authors' code for CIFAR-10, and are smaller on a laptop": TRAINING | {
        "on_nan": Option(("stop", "rewind"), None, "when a number is no longer finite: stop, or go on from the last "
                         f"checkpoint at half the rate, up to {REWINDS} times (default: stop)", "stop"),
    },
    "where": {
        "data_dir": Option(folder, "DIR", "where data sets are kept (default: data)", Path("data")),
        "out": Option(folder, "DIR", "the run's folder (default: runs/DATASET-SIZE)"),
        "resume": Option(folder, "DIR", "go on with the run in DIR, with its own options; only --steps, --accumulate and "
                         "the path of a folder of pictures may change"),
        "device": Option(("auto", "cpu", "gpu"), None, "gpu needs CuPy (default: auto, the GPU if there is one)", "auto"),
        "gpus": Option(number(int, 1, 64), "N", "GPUs of this machine that share a batch (default: 1)", 1),
        "threads": Option(number(int, 1, 1024), "N", "CPU threads that share a batch; another number gives the same run "
                          "up to rounding (default: as many as pay)"),
        "plain": Option(bool, None, "run on the definitions in autograd.py alone, without the faster forms of fast/; the "
                        "same up to rounding, and practical for tiny: S wants 9 GB", False),
    },
    "how often to look": {
        "sample_every": Option(WHOLE, "N", "steps between sample grids (default: 100, and every 10 minutes)", 100),
        "save_every": Option(WHOLE, "N", "steps between checkpoints (default: 100, and every 10 minutes)", 100),
        "evaluate_every": Option(WHOLE, "N", "steps between FID-own and IS-own in the log (default: never)"),
        "profile": Option(bool, None, "print which operations took the time, when the run is done", False),
        "summary": Option(bool, None, "print the networks as a table, and stop", False),
        "quiet": Option(bool, None, "print nothing, but errors to standard error", False),
        "json": Option(bool, None, "print JSON, an object a line with its event: start, step (as in log.csv), picture, "
                       "...; the last is end, with the exit code and what went wrong", False),
    },
    "scores, see paper/scores.py": {
        "evaluate": Option(folder, "RUN", "FID and Inception Score of the run in the folder RUN, or of an --export"),
        "features": Option(("inception", "own"), None, "the network that looks: Inception-v3, as papers have it (96 MB, "
                           "downloaded once), or a small classifier trained here on the data set, whose scores are named "
                           "FID-own and IS-own (default: inception; for shapes own)"),
        "num_images": Option(number(int, 10), "N", "generated pictures (default: 50000; for --evaluate-every 2000)"),
        "inception": Option(folder, "PATH", "a file with Inception-v3's weights, as pytorch-fid publishes them"),
        "fid_stats": Option(folder, "PATH", "a fid_stats_*.npz with mean and covariance of the real pictures (default: "
                            "computed of the data set once, and kept)"),
    },
}  # fmt: skip

# Where an option that is none of OPTIONS does something: in a training, with --summary, and so on. --json does anywhere.
TRAINING_MODES = ("a training", "--resume")
ACTS = {
    **dict.fromkeys(("data_dir", "out", "device", "threads", "plain"), (*TRAINING_MODES, "--evaluate", "--from")),
    **dict.fromkeys(("gpus", "on_nan", "sample_every", "save_every", "evaluate_every", "profile"), TRAINING_MODES),
    "num_images": ("--evaluate", *TRAINING_MODES),
    **dict.fromkeys(("features", "inception", "fid_stats"), ("--evaluate",)),
    **dict.fromkeys((*KINDS, "query", "export"), ("--from",)),
    "preset": ("a training", "--summary"),
}
# What a checkpoint does not know of the command that made it.
KEPT = [name for name, modes in ACTS.items() if "--resume" in modes and name not in ("out", "profile")]
# Of which an option needs one, or else does nothing.
NEEDS = {"query": ("attention",), "num_images": ("evaluate", "evaluate_every")}
# Two of which only one can have its way.
EITHER = (
    ("--resume", "--evaluate"), ("--resume", "--from"), ("--evaluate", "--from"), ("--summary", "--evaluate"),
    ("--summary", "--from"), ("--quiet", "--json"), ("--quiet", "--summary"), ("--quiet", "--profile"),
    ("--inception", "--features own"), ("--gpus", "--on-nan"), ("--threads", "--device gpu"),
)  # fmt: skip

# What shapes decide where nothing else is said, also of peers.
SHAPES = {"size": "tiny", "image_size": 16, "steps": 1000, "disc_steps": 2, "batch_size": 16, "gen_batch_size": 16,
          "diff_aug": "none"}  # fmt: skip
# What the larger data sets decide, as TransGAN's authors had it, where nothing else does; a folder is like cifar10.
LARGER = {
    "stl10": {"size": "XL", "image_size": 48, "batch_size": 16, "gen_batch_size": 32},
    "celeba": {"size": "XL", "image_size": 64, "batch_size": 16, "gen_batch_size": 32, "locality": presets.CELEBA},
}
# The peers of the paper's tables, as their authors trained them where there is an option for it; a mixed pair is trained as
# its discriminator asks for. What stays different is printed below their tables: DIFFERENCES of paper/tables.py.
PEER_DEFAULTS = {
    "autogan": {"loss": "hinge", "steps": 50_000, "batch_size": 64, "gen_batch_size": 128, "learning_rate": 2e-4,
                "beta2": 0.9, "diff_aug": "none", "decay": "none"},
    "resnet": {"steps": 100_000, "batch_size": 64, "gen_batch_size": 128, "learning_rate": 2e-4, "beta2": 0.9,
               "ema_decay": 0.0, "diff_aug": "none", "decay": "linear"},
}  # fmt: skip
# A laptop's run ends long before the paper's average over thousands of steps forgets the first, and has no time to spare.
TINY_DEFAULTS = {"learning_rate": 5e-4, "ema_decay": 0.99, "sr_weight": 0.0, "locality": "none"}


def flag(name):
    """An option's name on the command line."""
    return f"--{name.replace('_', '-')}"


def quoted(path):
    """A word, such as a path, as one writes it in a command; bytes that no terminal shows as bash and zsh have them."""
    text = f"./{path}" if isinstance(path, Path) and str(path)[0] in "-~" else str(path)  # no option, nobody's home
    if os.name == "nt" or text.isprintable():
        return subprocess.list2cmdline([text]) if os.name == "nt" else shlex.quote(text)
    odd = {c: "".join(f"\\x{byte:02x}" for byte in os.fsencode(c)) for c in text if not c.isprintable() or c in "\\'"}
    return "$'" + "".join(odd.get(c, c) for c in text) + "'"


def flags(values):
    """Options by name, as one writes them on the command line."""
    return " ".join(flag(name) if value is True else f"{flag(name)} {quoted(value)}" for name, value in values.items())


def add_options(group, options):
    """Add options, {name: Option}, to a group of the command line."""
    for name, (values, metavar, text, default) in options.items():
        kind = {"type" if callable(values) else "choices": values, "metavar": metavar}
        kind = {"action": "store_true"} if values is bool else kind
        group.add_argument(flag(name), **kind, default=default, help=text)


def is_valid(name, value):
    """Whether an option may have this value, of any type."""
    if type(value) is not type(getattr(Options, name)):
        return False
    if name == "dataset":  # a folder may have been moved, also from another kind of system
        whole = any(kind(value).is_absolute() for kind in (PurePosixPath, PureWindowsPath))
        return value in arguments.NAMES or ((whole or value == without_place(value)) and files.is_possible(value))
    values = OPTIONS[name].values
    try:
        return values(str(value)) == value if callable(values) else value in values
    except argparse.ArgumentTypeError:
        return False


def read_options(text, path):
    """The Options that a checkpoint, `path`, says in JSON. Raises UserError if they are not such as this program writes."""
    try:
        options = Options(**(found := json.loads(text)))
        if len(found) < len(dataclasses.fields(Options)):  # another one's default must not stand in
            raise ValueError("it lacks options")
    except (TypeError, ValueError):
        raise UserError(f"{path} holds options of another version; start a new run") from None
    for name in OPTIONS:
        if not is_valid(name, getattr(options, name)):
            raise UserError(f"{path}: its option {name} is {getattr(options, name)!r:.99}; start a new run")
    return options


def without_place(dataset):
    """A data set as other machines may know it: of a folder's path no more than its name, as ./NAME."""
    return dataset if dataset in arguments.NAMES else "./" + re.split(r"[/\\]", dataset.rstrip("/\\"))[-1]


def fill_in(given, preset=None):
    """The Options of a new run: those given, by name, and else those of the preset, the peer, the size and the data set."""
    preset = PRESETS.get(preset, {})
    dataset = given.get("dataset") or preset.get("dataset", "shapes")
    if preset.get("dataset") != dataset:  # whose epochs its windows count
        preset = {name: value for name, value in preset.items() if name != "locality"}
    chosen = {"dataset": dataset} | (SHAPES if dataset == "shapes" else {}) | preset | given
    if chosen.get("generator", "transgan") != "transgan":
        chosen = {"sr_weight": 0.0, "locality": "none"} | chosen
    chosen = PEER_DEFAULTS.get(chosen.get("discriminator", "transgan"), {}) | chosen
    if chosen.get("size") == "tiny":
        chosen = TINY_DEFAULTS | chosen
    chosen = {"image_size": Options.image_size} | LARGER.get(dataset, {}) | chosen
    return Options(**({"patch_size": transgan.patch_side(chosen["image_size"])} | chosen))


def choose_options(args, saved=None):
    """(Options, the run's folder) of parsed arguments: filled in, or those `saved` in a checkpoint. Raises UserError."""
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    if not saved:
        options = check_options(fill_in(given, args.preset))
        for name, why in idle(options).items():
            if name in given:
                raise UserError(f"{flag(name)} does nothing here: {why}; leave it out")
        pair = [options.generator, options.discriminator]
        parts = [Path(options.dataset).name, options.size, *(pair if pair != ["transgan", "transgan"] else [])]
        return options, args.out or Path("runs") / files.portable("-".join(parts))
    begun = args.resume or args.evaluate or args.begun  # the last is --from
    if args.begun:
        given.pop("seed", None)  # of the pictures, not of the run
    moved = saved.dataset not in arguments.NAMES and given.get("dataset") not in arguments.NAMES
    moved = moved and (not args.begun or (args.nearest and not args.export))  # what else is made needs no pictures
    changeable = ({"steps", "accumulate"} if args.resume else set()) | ({"dataset"} if moved else set())
    for name, value in given.items():
        if name not in changeable and value != getattr(saved, name):
            raise UserError(f"the run in {begun} has {flag(name)} {getattr(saved, name)}; leave out {flag(name)} {value}")
    options, out = check_options(dataclasses.replace(saved, **given)), begun / "look" if args.begun else begun
    if begun.is_file():
        out = Path("runs") / f"{files.portable(begun.stem)}-look"
        if not args.out and any((out / name).exists() for name in files.CHECKPOINTS):
            raise UserError(f"{out}, where what is made of {begun} goes, holds a run; choose another place with --out")
    return options, args.out or out


def idle(options):
    """What does nothing beside the others, and why: {name: words}."""
    found = {}
    if options.discriminator != "transgan":
        found["patch_size"] = f"--discriminator {options.discriminator} has no patches"
    if options.locality == "none":
        found |= dict.fromkeys(("locality_shape", "locality_stages"), "there is no --locality")
    return found


def check_options(options):
    """The options, if they go together; what the networks refuse is theirs to say. Raises UserError otherwise."""
    side = datasets.SIDES.get(options.dataset, options.image_size)
    if side % options.image_size:
        sides = ", ".join(str(side // n) for n in range(1, side // 8 + 1) if side % n == 0)
        raise UserError(f"{options.dataset} has pictures of {side} pixels a side, which --image-size {options.image_size} "
                        f"does not divide; choose one of {sides}")  # fmt: skip
    peer = options.generator != "transgan"
    if peer and (options.sr_weight or options.locality != "none"):
        raise UserError(f"co-training and locality are TransGAN's: --generator {options.generator} wants --sr-weight 0 "
                        "and --locality none, its defaults")  # fmt: skip
    epochs = transgan.epochs_of(options.dataset)
    if options.locality != "none" and transgan.locality_pairs(options.locality)[-1][1] > epochs:
        raise UserError(f"--locality {options.locality} goes on after the {epochs} epochs of a run on {options.dataset}; "
                        "choose smaller numbers")  # fmt: skip
    if options.locality_shape == "band" and options.locality_stages > 1:
        raise UserError("--locality-shape band is for the last stage alone; leave out --locality-stages")
    if peer and options.accumulate > 1:
        raise UserError(f"--accumulate cannot be: the batch norm of --generator {options.generator} wants whole batches")
    return options


def refuse_idle_options(args, parser):
    """Raise UserError for an option, of those that `parser` made `args` of, that does nothing beside the others.

    What `choose_options` makes an Options of is its business. One that says no more than its default is no offence.
    """
    flags = {name: flag(name) for name in vars(args)} | {"begun": "--from"}
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    said = {words for name in given for words in (flags[name], f"{flags[name]} {getattr(args, name)}")}
    for pair in EITHER:
        if said.issuperset(pair):
            raise UserError(f"{' and '.join(pair)} do not go together; leave out one of them")
    mode = next((flags[name] for name in ("summary", "evaluate", "begun", "resume") if name in given), "a training")
    for name in sorted(given & ACTS.keys()):
        if mode not in ACTS[name]:
            where = " or ".join(other for other in ACTS[name] if other != "--resume")
            raise UserError(f"{flags[name]} does nothing here: it goes with {where}; leave it out")
        if name in NEEDS and not given & {*NEEDS[name]}:
            raise UserError(f"{flags[name]} goes with {' or '.join(map(flags.get, NEEDS[name]))}; leave it out")
    if mode == "--from" and not given & {*KINDS}:
        if "export" not in given:
            raise UserError("--from wants to know what to make: --sample N, --interpolate N, --attention, --nearest N or "
                            "--export FILE")  # fmt: skip
        if given & {"out", "seed"}:
            raise UserError("--out and --seed are of pictures, which nothing here asks for; leave them out")


def program():
    """How this program is called, as one can paste it in the folder where it was."""
    here, paths = Path.cwd(), [Path(path) for path in (sys.executable or "python", transgan.__file__)]
    return " ".join(quoted(path.relative_to(here) if path.is_relative_to(here) else path) for path in paths)


def long_command(options):
    """The command that names all of these options, but for those that do nothing."""
    return "transgan.py " + flags({name: x for name, x in dataclasses.asdict(options).items() if name not in idle(options)})


def needed(options):
    """Those of the options, by name, that are not what the others decide."""
    given, deciding = {}, ["dataset", "size", "generator", "discriminator", "image_size"]
    for name in dict.fromkeys([*deciding, *OPTIONS]):
        if getattr(options, name) != getattr(fill_in(given), name):
            given[name] = getattr(options, name)
    return given


def command(options):
    """The shortest command that gives these options."""
    return f"{program()} {flags(needed(options))}".rstrip()


def commands(options, out, args, parser):
    """Three commands of a run in the folder `out`: what began it, what goes on with it, what makes pictures of it.

    All of them say those of KEPT that `args` of `parser` has not by default.
    """
    kept = {name: getattr(args, name) for name in KEPT if getattr(args, name) != parser.get_default(name)}
    looks = {name: value for name, value in kept.items() if "--from" in ACTS[name]}
    return (
        f"{command(options)} {flags({'out': out} | kept)}",
        f"{program()} {flags({'resume': out} | kept)}",
        f"{program()} --from {quoted(out)} --sample 64 --interpolate 8 --attention --nearest 8 {flags(looks)}".rstrip(),
    )
