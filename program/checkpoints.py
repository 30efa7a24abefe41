"""A run's folder and the checkpoints in it, from which training goes on to the bit as if it had not stopped; exports."""

import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np

import autograd as ag
from data import UserError, first_line
from program import VERSION
from program.options import flags, needed, read_options, without_place
from program.trainer import Sampler, buffers, make_networks
from store import files
from store.arguments import NAMES
from store.files import CHECKPOINTS
from store.output import note, warn


class NotFinite(UserError):
    """A number of training, named by the message, has become infinite or NaN."""


def save(trainer, path, keep=True):
    """Write a checkpoint: all arrays of training, the step and the options, from which the random state follows.

    The one that lies there is kept as NAME-previous.npz; or replaced at once, without `keep`, where it is of the same step.
    Raises NotFinite, and writes nothing, for a state that is not.
    """
    arrays = {name: ag.to_numpy(x) for name, x in trainer.state().items()}
    for name, x in arrays.items():
        if not np.isfinite(x).all():
            raise NotFinite(f"{name} is not finite after step {trainer.step}")
    options = json.dumps(dataclasses.asdict(trainer.options))
    with files.whole_file(path, keep and path.with_stem(f"{path.stem}-previous")) as part, part.open("wb") as file:
        np.savez(file, options=options, step=np.int64(trainer.step), rate_scale=np.float64(trainer.update.rate_scale),
                 pictures=np.uint64(int(trainer.learns_from, 16)), **arrays)  # fmt: skip


def load(trainer, path):
    """Take a checkpoint's arrays and step; returns the Checkpoint, closed.

    Raises UserError, and takes nothing, if it does not fit these networks.
    """
    state = trainer.state()
    with open_checkpoint(path) as saved:
        arrays = {name: saved.read(name, x) for name, x in state.items()}
        if more := saved.names - state.keys() - {"options", "step", "rate_scale", "pictures"}:
            raise ValueError(f"these networks have no {min(more)!r}")
        scale = float(saved.read("rate_scale", np.float64()))
        if not 0 < scale <= 1:
            raise ValueError("its rate_scale is no number above 0, up to 1")
    for name, x in state.items():  # in place, because parameters and moments are views of Adam's flat arrays
        x[...] = ag.xp.asarray(arrays[name])
    trainer.step, trainer.update.rate_scale = saved.step, scale
    trainer.gen_adam.t, trainer.disc_adam.t = saved.step, saved.step * trainer.options.disc_steps
    trainer.set_window()
    return saved


def load_sampler(options, path, threads=None):
    """The Sampler of a checkpoint of these options: reads the averaged generator, and the discriminator if there is one.

    Raises UserError if these do not fit the options.
    """
    generator, discriminator = make_networks(options)
    with open_checkpoint(path) as saved:
        wanted = {f"average/{name}": p.data for name, p in generator.parameters().items()}
        if any(name.startswith("discriminator/") for name in saved.names):
            wanted |= {f"discriminator/{name}": p.data for name, p in discriminator.parameters().items()}
        else:
            discriminator = None
        wanted |= buffers(generator=generator, discriminator=discriminator)
        for name, x in wanted.items():
            x[...] = ag.xp.asarray(saved.read(name, x))
        digest = files.checksum(saved.archive, "average/")
        return Sampler(options, saved.step, digest, generator, discriminator, threads, saved.pictures)


def export(sampler, path):
    """Write a Sampler's averaged generator alone, its weights as float16: a file that `load_sampler` takes, too.

    `source`, JSON, says where it comes from. Nothing in it tells of this machine: of the path of a folder of pictures only
    the name is left. An earlier export of the same run is replaced. Raises UserError for any other file that lies there,
    and for weights that float16 does not hold.
    """
    options = dataclasses.replace(sampler.options, dataset=without_place(sampler.options.dataset))
    if os.path.lexists(path):
        same, changeable = False, {"steps": options.steps, "accumulate": options.accumulate}
        with contextlib.suppress(UserError), open_checkpoint(path) as saved:
            same = saved.exported and dataclasses.replace(saved.options, **changeable) == options
        if not same:
            raise UserError(f"{path} is there, and is no earlier export of this run; choose another file for --export")
    arrays = {f"average/{name}": ag.to_numpy(p.data) for name, p in sampler.generator.parameters().items()}
    with np.errstate(over="ignore"):
        arrays = {name: x.astype(np.float16) for name, x in arrays.items()}
    for name, x in arrays.items():
        if not np.isfinite(x).all():
            raise UserError(f"{name} does not fit into float16, whose largest number is {np.finfo(np.float16).max:.0f}; "
                            "export an earlier step")  # fmt: skip
    arrays |= {name: ag.to_numpy(x) for name, x in buffers(generator=sampler.generator).items()}
    source = {"program": f"transgan-from-scratch {VERSION}", "step": sampler.step, "dataset": options.dataset,
              "command": f"python transgan.py {flags(needed(options))}".rstrip(),
              "exported": datetime.date.today().isoformat()}  # fmt: skip
    files.save_arrays(path, "--export", options=json.dumps(dataclasses.asdict(options)), step=np.int64(sampler.step),
                      source=json.dumps(source), **arrays)  # fmt: skip


@contextlib.contextmanager
def open_checkpoint(path):
    """Within this context, the Checkpoint or export in a file; whatever is wrong with it becomes a UserError."""
    try:
        with zipfile.ZipFile(files.plain(path)) as archive:
            yield Checkpoint(path, archive)
    except UserError:
        raise
    except Exception as error:  # a damaged archive can raise anything at all
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot read {path}: {reason}; name a run's folder") from None


class Checkpoint:
    """The arrays of a checkpoint's zip file, or of an export's.

    names: what it holds; exported: whether `export` made it; options, step: those of its run; pictures: the fingerprint
    of those it learnt from, or None where it does not say it. What it says of itself is not trusted: nothing may be
    compressed, and all together may claim no more than the file's size. Raises UserError and ValueError.
    """

    def __init__(self, path, archive):
        self.archive, self.size = archive, path.stat().st_size
        members = archive.infolist()
        self.names = {member.filename.removesuffix(".npy") for member in members}
        self.exported = "source" in self.names
        claimed = sum(max(member.file_size, member.compress_size) for member in members)
        if any(member.compress_type for member in members) or claimed > self.size:
            raise ValueError("it claims more than its size")
        self.options = read_options(str(self.read("options")), path)
        self.step = int(self.read("step", np.int64()))
        if self.step < 0:
            raise ValueError("its step is below 0")
        self.pictures = f"{int(self.read('pictures', np.uint64())):016x}" if "pictures" in self.names else None

    def read(self, name, like=None):
        """The array of this name, read-only; if there is a `like`, of its shape and dtype, and finite.

        The weights in an export are of float16, and `like` those that they are to become.
        """
        if name not in self.names:
            raise ValueError(f"it has no {name}")
        array = files.read_array(self.archive, name, self.size)
        if like is None:
            return array
        expected = np.dtype(np.float16) if self.exported and name.startswith("average/") else like.dtype
        if (array.shape, array.dtype) != (like.shape, expected):
            wanted = f"{expected} of shape {like.shape}"
            raise ValueError(f"its {name} is {array.dtype} of shape {array.shape}, not {wanted}")
        if not np.isfinite(array).all():
            raise ValueError(f"its {name} is not finite")
        return array


def newest_checkpoint(begun):
    """The newest whole checkpoint in a run's folder, (path, Options); says on standard error if that is the previous one.

    begun: the folder; or a file, a checkpoint or an export, that is then the one. Raises UserError if none can be used.
    """
    folder, reasons = os.path.isdir(begun), []
    for path in [begun / name for name in CHECKPOINTS] if folder else [begun]:
        if reasons and not path.exists():
            break
        try:
            with open_checkpoint(path) as saved:
                if broken := saved.archive.testzip():
                    raise ValueError(f"{broken} is not as it was written")
        except UserError as error:
            reasons.append(str(error).rpartition(";")[0])
            continue
        if reasons:
            warn(f"transgan: {reasons[0]}; going on from {path.name}")
        return path, saved.options
    advice = "start a new run, or name a run's folder" if folder else "name a run's folder, or a file that --export made"
    raise UserError(f"{', and '.join(reasons)}; {advice}")


def own_folder(out, dataset):
    """Where a new run on this data set goes if nobody says: `out`, or out-2, out-3, ... where that holds one on another."""
    places = itertools.chain([out], (out.with_name(f"{out.name}-{n}") for n in itertools.count(2)))
    place = next(place for place in places if dataset_of(place) in (dataset, None))
    if place != out and dataset_of(place) is None:
        note(f"{out} holds a run on {dataset_of(out)}; this one goes into {place}")
    return place


def dataset_of(folder):
    """The data set of the run in a folder, None if there is no run."""
    for name in CHECKPOINTS:
        with contextlib.suppress(UserError), open_checkpoint(folder / name) as saved:
            return saved.options.dataset
    return None


def refuse_among_pictures(out, dataset, trains):
    """Raise UserError if what is made in the folder `out` would be among the pictures that it is made of.

    A run, `trains`, may lie in a folder of its own among them: it is known by its checkpoint, and passed over.
    """
    out, folder = out.resolve(), Path(dataset).resolve()
    if dataset in NAMES or folder not in (out, *out.parents):
        return
    within = [out, *out.parents][: [out, *out.parents].index(folder)]
    if any((place / name).exists() for place in within for name in CHECKPOINTS):
        return
    made = (path for path in out.rglob("*") if path.name != ".lock" and path.suffix != ".part")  # by who was killed
    if out == folder or not trains or (out.is_dir() and any(path.is_file() for path in made)):
        raise UserError(f"{out} is among the pictures of --dataset; choose another --out")


@contextlib.contextmanager
def owned(out, resume=None, goes_on=""):
    """Within this context, a run's folder `out` is there, holds its folder for samples, and no other process trains in it.

    resume: the folder of the run to go on with, if any; another one may not lie in `out`, nor anything else that this one
    would overwrite. goes_on: the command that goes on with a run there. Raises UserError.
    """
    samples = out / "samples"
    files.need_folder(samples, "--out")
    with files.belongs_to_one(out / ".lock", f"another process trains in {out}; wait for its end, or choose another --out"):
        kinds = "npz|csv|png|gif|html|json" if out == resume else "npz"
        for part in (*out.glob("*.part"), *samples.glob("*.part")):
            if re.search(rf"\.({kinds})\.\d+\.part$", part.name):
                part.unlink(missing_ok=True)  # what a killed process was writing
        if out != resume and (found := [*out.glob("checkpoint*.npz"), *out.glob("log.csv"), *samples.iterdir()]):
            if dataset_of(out):
                raise UserError(f"{out} holds a run already; choose another --out, or go on with it: {goes_on}")
            raise UserError(f"{out} holds {found[0].relative_to(out)} already; choose another --out")
        yield
