"""A run's folder and the checkpoints in it, from which training goes on to the bit as if it had not stopped; exports."""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import shlex
import sys
import tempfile
import zipfile

import numpy as np

import autograd as ag
from data import UserError, first_line
from paper.convolutions import Stateful
from program import VERSION
from program.options import flags, needed, read_options, without_place
from program.sampler import Sampler
from program.trainer import make_networks
from store import files
from store.files import CHECKPOINTS
from store.output import one_line


class NotFinite(UserError):
    """A number of training, named by the message, has become infinite or NaN."""


def save(trainer, path):
    """Write a checkpoint: all arrays of training, the step and the options, from which the random state follows.

    The one that lies there is kept as NAME-previous.npz. Raises NotFinite, and writes nothing, for a state that is not.
    """
    arrays = {name: ag.to_numpy(x) for name, x in trainer.state().items()}
    for name, x in arrays.items():
        if not np.isfinite(x).all():
            raise NotFinite(f"{name} is not finite after step {trainer.step}")
    options = json.dumps(dataclasses.asdict(trainer.options))
    with files.whole_file(path, path.with_stem(f"{path.stem}-previous")) as part, part.open("wb") as file:
        known = {"step": trainer.step, "rate_scale": trainer.update.rate_scale, "pictures": pictures_of(trainer)}
        np.savez(file, options=options, **known, **arrays)


def pictures_of(trainer):
    """The fingerprint of the pictures that a trainer learns from."""
    if not hasattr(trainer, "learns_from"):  # it takes seconds for gigabytes
        trainer.learns_from = np.uint64(int(files.fingerprint(trainer.batches.pictures), 16))
    return trainer.learns_from


def load(trainer, path):
    """Take a checkpoint's arrays and step; returns the fingerprint of the pictures of its run, or None where it has none.

    Raises UserError, and takes nothing, if it does not fit these networks.
    """
    state = trainer.state()
    with open_checkpoint(path) as saved:
        theirs = saved.options()
        for name, own in dataclasses.asdict(trainer.options).items():
            if name not in ("steps", "accumulate", "dataset") and getattr(theirs, name) != own:
                raise UserError(f"{path} is of another run: its {name} is {getattr(theirs, name)!r}, not {own!r}")
        arrays = {name: saved.read(name, x) for name, x in state.items()}
        if more := saved.names - state.keys() - {"options", "step", "rate_scale", "pictures"}:
            raise UserError(f"{path} does not fit: these networks have no {min(more)!r}")
        step, scale = saved.step(), saved.read("rate_scale")
        if scale.dtype != np.float64 or scale.shape or not 0 < scale <= 1:
            raise ValueError("its rate_scale is no number above 0, up to 1")
        pictures = saved.read("pictures") if "pictures" in saved.names else None
    for name, x in state.items():  # in place, because parameters and moments are views of Adam's flat arrays
        x[...] = ag.xp.asarray(arrays[name])
    trainer.step, trainer.update.rate_scale = step, float(scale)
    trainer.gen_adam.t, trainer.disc_adam.t = step, step * trainer.options.disc_steps
    trainer.set_window()
    return pictures


def load_sampler(options, path, threads=None):
    """The Sampler of a checkpoint of these options: reads the averaged generator, and the discriminator if there is one.

    Raises UserError if these do not fit the options.
    """
    generator, discriminator = make_networks(options)
    with open_checkpoint(path) as saved:
        if not any(name.startswith("discriminator/") for name in saved.names):
            discriminator = None
        wanted = {f"average/{name}": p.data for name, p in generator.parameters().items()}
        wanted |= (
            {f"discriminator/{name}": p.data for name, p in discriminator.parameters().items()} if discriminator else {}
        )
        for network, kind in ((generator, "generator"), (discriminator, "discriminator")):
            if isinstance(network, Stateful):
                wanted |= {f"{kind}/{name}": x for name, x in network.buffers().items()}
        for name, x in wanted.items():
            x[...] = ag.xp.asarray(saved.read(name, x))
        return Sampler(options, saved.step(), files.checksum(saved.file, "average/"), generator, discriminator, threads)


def export(sampler, path):
    """Write a Sampler's averaged generator alone, its weights as float16: a file that `load_sampler` takes, too.

    `source`, JSON, says where it comes from. Nothing in it tells of this machine: of the path of a folder of pictures only
    the name is left. An earlier export of the same run is replaced. Raises UserError for any other file that lies there,
    and for weights that float16 does not hold.
    """
    options = dataclasses.replace(sampler.options, dataset=without_place(sampler.options.dataset))
    refuse_to_replace(path, options)
    arrays = {f"average/{name}": ag.to_numpy(p.data) for name, p in sampler.generator.parameters().items()}
    with np.errstate(over="ignore"):
        arrays = {name: x.astype(np.float16) for name, x in arrays.items()}
    for name, x in arrays.items():
        if not np.isfinite(x).all():
            raise UserError(f"{name} does not fit into float16, whose largest number is {np.finfo(np.float16).max:.0f}; "
                            "export an earlier step")  # fmt: skip
    if isinstance(sampler.generator, Stateful):
        arrays |= {f"generator/{name}": ag.to_numpy(x) for name, x in sampler.generator.buffers().items()}
    source = {"program": f"transgan-from-scratch {VERSION}", "step": sampler.step, "dataset": options.dataset,
              "command": f"python transgan.py {flags(needed(options))}".rstrip(),
              "exported": datetime.date.today().isoformat()}  # fmt: skip
    files.save_arrays(path, "--export", options=json.dumps(dataclasses.asdict(options)), step=sampler.step,
                      source=json.dumps(source), **arrays)  # fmt: skip


def refuse_to_replace(path, options):
    """Raise UserError for what lies at `path` if it is no export of a run with these options, as `export` has them."""
    if not os.path.lexists(path):
        return
    same, changeable = False, {"steps": options.steps, "accumulate": options.accumulate}
    with contextlib.suppress(UserError), open_checkpoint(path) as saved:
        same = saved.exported and dataclasses.replace(saved.options(), **changeable) == options
    if not same:
        raise UserError(f"{path} is there, and is no earlier export of this run; choose another file for --export")


class open_checkpoint:
    """Within this context, the arrays of a checkpoint's zip file; whatever is wrong with it becomes a UserError.

    names: what it holds; exported: whether `export` made it. What it says of itself is not trusted: nothing may be
    compressed, all together may claim no more than the file's size, and an array is read only if its header says what it
    should.
    """

    SMALL = 1 << 16  # bytes of what is no array of the networks

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        try:
            self.file = zipfile.ZipFile(files.plain(self.path))
            members = self.file.infolist()
            self.names = {member.filename.removesuffix(".npy") for member in members}
            self.exported = "source" in self.names
            if not {"options", "step"} <= self.names:
                raise ValueError("it lacks options or step")
            claimed = sum(max(member.file_size, member.compress_size) for member in members)
            if any(member.compress_type for member in members) or claimed > self.path.stat().st_size:
                raise ValueError("it claims more than its size")
        except Exception as error:  # a damaged archive can raise anything at all
            with contextlib.suppress(AttributeError):  # there is none if this is no zip file
                self.file.close()
            reason = getattr(error, "strerror", None) or first_line(error)
            raise UserError(f"cannot read {self.path}: {reason}; name a run's folder") from None
        return self

    def __exit__(self, kind, error, _):
        self.file.close()
        if isinstance(error, Exception) and not isinstance(error, UserError):
            raise UserError(f"{self.path} is damaged: {first_line(error)}; name another run's folder") from None

    def read(self, name, like=None):
        """The array of this name, read-only; of the shape and dtype of `like` and finite, or of at most SMALL bytes.

        The weights in an export are of float16, and `like` those that they are to become.
        """
        if name not in self.names:
            raise UserError(f"{self.path} does not fit: it has no {name}")
        if like is None:
            return files.read_array(self.file, name, self.SMALL)
        with self.file.open(f"{name}.npy") as member:
            shape, _, dtype = files.array_header(member)
        expected = np.dtype(np.float16) if self.exported and name.startswith("average/") else like.dtype
        if (shape, dtype) != (like.shape, expected):
            found, wanted = f"{dtype} of shape {shape}", f"{expected} of shape {like.shape}"
            raise UserError(f"{self.path} does not fit: {name} is {found}, not {wanted}")
        if not np.isfinite(array := files.read_array(self.file, name, math.prod(shape) * dtype.itemsize)).all():
            raise ValueError(f"its {name} is not finite")
        return array

    def step(self):
        """The number of the generator step after which it was written."""
        step = self.read("step")
        if step.dtype.kind != "i" or step.shape or step < 0:
            raise ValueError("its step is no whole number")
        return int(step)

    def options(self):
        """The Options of its run."""
        return read_options(str(self.read("options")), self.path)


def newest_checkpoint(begun):
    """The newest whole checkpoint in a run's folder, (path, Options); says on standard error if that is the previous one.

    begun: the folder; or a file, a checkpoint or an export, that is then the one. Raises UserError if none can be used.
    """
    if not os.path.isdir(begun):
        try:
            return begun, whole_checkpoint(begun)
        except UserError as error:
            reason = str(error).rpartition(";")[0]
            raise UserError(f"{reason}; name a run's folder, or a file that --export made") from None
    newest, previous = (begun / name for name in CHECKPOINTS)
    try:
        return newest, whole_checkpoint(newest)
    except UserError as error:
        if not previous.exists():
            raise
        reason = str(error).rpartition(";")[0]
    try:
        options = whole_checkpoint(previous)
    except UserError as error:
        raise UserError(f"{reason}, and {str(error).rpartition(';')[0]}; start a new run") from None
    print(f"transgan: {one_line(reason)}; going on from {previous.name}", file=sys.stderr)
    return previous, options


def whole_checkpoint(path):
    """The Options of a checkpoint, if these can be had and its every byte is as written. Raises UserError."""
    with open_checkpoint(path) as saved:
        options = saved.options()
        saved.step()
        if broken := saved.file.testzip():
            raise ValueError(f"{broken} is not as it was written")
    return options


def prepare_folder(out, resume):
    """Make the run's folder, and refuse one that holds another run, or anything else that this one would overwrite."""
    try:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        log = out / "log.csv"
        if out != resume:
            if any((out / name).exists() for name in CHECKPOINTS) or (log.exists() and log.stat().st_size):
                raise holds_a_run(out)
            log.unlink(missing_ok=True)  # empty: a run was killed before its first checkpoint
        if out != resume and any((out / "samples").iterdir()):
            raise UserError(f"{out / 'samples'} is not empty; move what it holds away, or choose another --out")
        tempfile.TemporaryFile(dir=out).close()
        for part in (*out.glob(f"{CHECKPOINTS[0]}.*.part"), *out.glob("samples/*.part")) if out == resume else ():
            part.unlink(missing_ok=True)  # what a killed process was writing
    except OSError as error:
        raise UserError(f"cannot write in {out}: {error.strerror}; choose another --out") from None


def holds_a_run(out):
    return UserError(f"{out} holds a run already; go on with it by --resume {quoted(out)}, or choose another --out")


def quoted(path):
    """A path as one writes it in a command."""
    return shlex.quote(str(path))
