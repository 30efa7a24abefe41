"""The paper's runs: what its text gives, what its authors' commands had, and what stands here where these differ.

And one that is not the paper's, for a laptop.
"""

import transgan
from store import datasets

CELEBA = "8:5,12:10,16:15,20:20"  # the authors' windows there


def sources(dataset):
    """All in which the sources of the paper's runs on a data set differ, by the option's name, or by what has none.

    Of each: what a preset has, what the paper's text gives with its tables and figures, what the authors' command or code
    has, and why it is as it is here; "" where nothing is said.
    """
    larger = dataset != "cifar10"
    real, generated = ("16", "32") if larger else ("32", "64")
    found = {
        "batch_size": (64, "64", real, "the text's; without a preset the command's"),
        "gen_batch_size": (128, "128", generated, "the text's; without a preset the command's"),
        "sr_weight": (50.0, "50, from memory", "no co-training", "the text's; the layer from RGB is ours"),
        "locality_shape": ("window", "a figure of rows and columns", "band", "the figure's"),
        "locality_stages": (1, "", "the last block of the last stage", "all blocks of the last stage"),
    }
    if larger:
        side = datasets.SIDES[dataset]
        found["patch_size"] = (side // 8, "8x8 patches at 32x32", f"4: {(side // 4) ** 2} patches", "8x8 patches")
    if dataset == "stl10":
        found["size"] = ("XL", "XL", "width 768, depths 5, 2, 2, noise of 1024", "the table's: 1024; 5, 4, 2; 1024")
        found["pictures"] = ("100,000", "", "105,000", "without the 5,000 labelled ones for training")
        found["resizing"] = ("bicubic", "", "bilinear", "our default for any picture")
    if dataset == "celeba":
        found["depths"] = ("5, 3, 3, 2", "XL: 5, 4, 2 of three stages", "5, 3, 3, 2", "the published file's")
        found["resizing"] = ("the middle square", "", "the whole picture squeezed", "faces keep their shape")
    return found


def source_table(name, options):
    """Of a preset, a row for each value whose sources differ: what it is here, by the text, by the command, and why."""
    rows, preset = [], PRESETS[name]
    if name not in PAPERS or options.dataset != preset["dataset"]:
        return rows  # another run than anybody's
    for what, (ours, text, command, reading) in sources(options.dataset).items():
        here = getattr(options, what, ours)
        if what != "depths" or options.size == preset["size"]:
            rows.append({"value": what, "here": str(here), "paper's text": text or "-", "authors' command": command,
                         "our reading": reading if here == ours else "as you say"})  # fmt: skip
    return rows


# What the text gives, and the authors' commands where it is silent; where they differ, see `sources`.
PAPER = {"loss": "wgangp-eps", "steps": 500_000, "disc_steps": 5, "learning_rate": 1e-4, "decay": "none",
         "ema_decay": 0.999, "diff_aug": transgan.Options.diff_aug}  # fmt: skip


def preset(dataset, size):
    """The options of the paper's run of this size on a data set."""
    options = transgan.Options.__annotations__.keys() - {"patch_size"}  # which follows from the side, if that is another's
    stated = {name: here for name, (here, *_) in sources(dataset).items() if name in options}
    locality = CELEBA if dataset == "celeba" else transgan.Options.locality
    return PAPER | stated | {"dataset": dataset, "size": size, "locality": locality}


# Photographs on a processor in an evening; how it was chosen is in docs/figures.md.
LAPTOP = {"dataset": "cifar10", "size": "tiny", "image_size": 16, "steps": 40_000, "disc_steps": 2, "batch_size": 32,
          "gen_batch_size": 32, "learning_rate": 5e-4, "ema_decay": 0.999}  # fmt: skip

PAPERS = {f"{dataset}-{size}": preset(dataset, size) for dataset, size in
          [*(("cifar10", size) for size in ("S", "M", "L", "XL")), ("stl10", "XL"), ("celeba", "XL")]}  # fmt: skip
PRESETS = {"cifar10-laptop": LAPTOP} | PAPERS
