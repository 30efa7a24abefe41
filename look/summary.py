"""Both networks as a table, counted from what they have: tokens, width, blocks, parameters, multiply-adds a picture."""

import math

import numpy as np

import transgan

COLUMNS = ("network", "stage", "tokens", "width", "blocks", "parameters", "multiply-adds")


class Zeros:
    """Stands in for a random generator where only shapes matter, so that large networks cost neither time nor memory."""

    def standard_normal(self, shape):
        return np.broadcast_to(np.float32(0), shape)

    def uniform(self, low, high, shape):
        return np.broadcast_to(np.float32(0), shape)


def size(*parts):
    """Parameters of modules."""
    return sum(p.size for part in parts for p in part.parameters().values())


def matrices(*parts):
    """Numbers in the matrices of modules, each of which is multiplied once with every token."""
    return sum(p.size for part in parts for name, p in part.parameters().items() if name.endswith("weight") and p.ndim == 2)


def generator_rows(generator):
    """(stage, tokens, width, blocks, parameters, multiply-adds) of each stage of TransGAN's generator."""
    project, to_rgb = generator.project, generator.to_rgb
    rows = [("noise", generator.start**2, generator.latent_dim, "", size(project), matrices(project))]
    for stage in generator.stages:
        _, tokens, width = stage.position.shape
        side, attention = math.isqrt(tokens), len(stage.blocks) * 2 * tokens**2 * width  # q k^T and p v
        operations = tokens * matrices(stage) + attention
        rows.append((f"{side}x{side}", tokens, width, len(stage.blocks), size(stage), operations))
    return [*rows, ("RGB", tokens, 3, "", size(to_rgb), tokens * matrices(to_rgb))]


def discriminator_rows(discriminator):
    """(stage, tokens, width, blocks, parameters, multiply-adds) of each part of TransGAN's discriminator."""
    _, tokens, width = discriminator.position.shape
    embed, *others, last = discriminator.embed, *discriminator.blocks
    operations = tokens * matrices(*others) + len(others) * 2 * tokens**2 * width
    # the last block, for the [cls] token alone: keys and values are all that the others have there
    operations += matrices(last) + (tokens - 1) * 2 * width**2 + 2 * tokens * width
    parameters = size(*others, last) + discriminator.cls.size + discriminator.position.size
    return [
        ("patches", tokens - 1, width, "", size(embed), (tokens - 1) * matrices(embed)),
        ("blocks", tokens, width, len(discriminator.blocks), parameters, operations),
        ("head", 1, width, "", size(discriminator.norm, discriminator.head), matrices(discriminator.head)),
    ]


def peer_rows(network):
    """The same of any network, by the names of its parameters; operations are not counted."""
    return [(name, "", " x ".join(map(str, p.shape)), "", p.size, 0) for name, p in network.parameters().items()]


def summary_rows(generator, discriminator):
    """The rows of the table, in the order of COLUMNS; "" or 0 is for what a row has not."""
    rows = []
    for name, network, kind, own_rows in (
        ("generator", generator, transgan.Generator, generator_rows),
        ("discriminator", discriminator, transgan.Discriminator, discriminator_rows),
    ):
        own = own_rows(network) if isinstance(network, kind) else peer_rows(network)
        total = [sum(column) for column in zip(*(row[4:] for row in own), strict=True)]
        rows += [*((name, *row) for row in own), (name, "total", "", "", "", *total)]
    if hasattr(generator, "from_rgb"):
        layer, (_, tokens, width) = generator.from_rgb, generator.stages[1].position.shape
        rows.append(("co-training", "from RGB", tokens, width, "", size(layer), tokens * matrices(layer)))
    return rows


def table(rows):
    """The rows of `summary_rows` as text, one line each."""
    lines = [COLUMNS, *((*row[:5], *(f"{x:,}" if x else "" for x in row[5:])) for row in rows)]
    return in_columns(lines, "<<>>>>>")


def in_columns(rows, align):
    """Rows of cells as lines of text, each column to the left, <, or to the right, >, as `align` says."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(align))]
    lines = ("  ".join(f"{x!s:{a}{w}}" for x, a, w in zip(row, align, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
