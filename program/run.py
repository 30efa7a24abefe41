"""A run, from its options to its last picture: what surrounds the book's training loop.

Contents
    1. Training       train, with samples, log, checkpoints and signals; train_on, which goes back after NaN
    2. Several GPUs   gather_gpus, take_part
    3. Running        run: what the command line asks for
"""

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import signal
import socket
import threading
import time
import warnings
from multiprocessing import connection

import numpy as np

import autograd as ag
import data
import fast
import transgan
from data import UserError
from fast import augment, cpu
from look import pictures as looks
from look import summary
from look.report import Report
from paper import scores
from paper.networks import NAMES
from program import checkpoints, options, presets
from program.checkpoints import NotFinite
from program.log import Log
from program.options import REWINDS
from program.profile import profile, tell_profile
from program.signals import stop_signals
from program.trainer import make_networks, make_trainer
from program.update import Group
from store import datasets, files, output, reading
from store.files import CHECKPOINTS

# --- 1. Training ------------------------------------------------------------------------------------------------------

GRID = 64  # pictures in a sample grid
JUDGED = 512  # pictures on each side of the distance
PATIENCE = 600  # seconds that training may go without a sample grid and a checkpoint
LONG = 2 * 86400  # seconds: a run that takes more is better thought over


def explain_locality(options, path):
    """Write a picture of each phase of locality-aware initialization: what the token in the middle may see, then all.

    Above by windows, below by bands, whichever of them the run has.
    """
    side, pictures = options.image_size, []
    query = (side + 1) * (side // 2)
    half_widths = [*(half_width for half_width, _ in transgan.locality_phases(options)), side**2]
    for shape, half_width in itertools.product(transgan.LOCALITY_SHAPES, half_widths):
        seen = transgan.window_mask(side, half_width, shape)[query].reshape(side, side)
        picture = np.where(seen, 0.5, -0.8) * np.ones((3, 1, 1))  # (3, side, side)
        picture[:, side // 2, side // 2] = (1.0, -0.6, -0.6)
        pictures.append(picture)
    files.save_grid(np.stack(pictures), path, columns=len(half_widths))


def look(trainer, noise, real, samples):
    """Write grids of generated and of restored pictures into the folder `samples`; returns the distance, for the log."""
    pictures = trainer.sample(noise)
    files.save_grid(pictures[:GRID], samples / f"step-{trainer.step:06d}.png")
    if trainer.options.sr_weight:
        factor = 2 ** (len(trainer.generator.stages) - 2)
        small = transgan.downsample(real[: GRID // 8], factor)
        rows = [small.repeat(factor, 2).repeat(factor, 3), trainer.restore(small), real[: GRID // 8]]
        files.save_grid(np.concatenate(rows), samples / f"restored-{trainer.step:06d}.png")
    return {"distance": transgan.sliced_wasserstein(pictures, real)}


def train(trainer, out, sample_every, save_every, evaluate_every=None, measure=None, commands=("", "", "")):
    """Train until `trainer.options.steps`, writing samples, log and checkpoints into the folder `out`.

    sample_every, save_every: generator steps between sample grids and between checkpoints. Either is also made when it is
    PATIENCE seconds old, because a step of the large sizes takes a CPU half a minute. evaluate_every: generator steps
    between calls of measure(), which returns more numbers for the log. commands: see `options`. Returns the number of the
    signal that stopped it before (the step was finished, and saved), or None. Raises NotFinite; the last checkpoint is
    then from before.
    """
    settings = trainer.options
    if not (out / CHECKPOINTS[0]).exists():  # first, so that whatever stops the run can be gone on from
        checkpoints.save(trainer, out / CHECKPOINTS[0])
    rng = data.random_stream("judge", settings.seed)
    noise = trainer.noise(JUDGED, rng)
    pictures = trainer.batches.pictures
    real = data.scale(pictures[rng.choice(len(pictures), JUDGED, replace=len(pictures) < JUDGED)])
    log = Log(out / "log.csv", trainer.step, settings.steps, sample_every)
    report = Report(trainer, out, commands)
    updates = itertools.count()

    def watch():
        number = next(updates) % (settings.disc_steps + 1)
        log.busy(f"discriminator {number + 1} of {settings.disc_steps}" if number < settings.disc_steps else "generator")

    trainer.update.watch = watch
    if settings.locality != "none":
        explain_locality(settings, out / "locality.png")
    done = False  # and saved
    with contextlib.closing(log), stop_signals() as stop:
        try:
            before = [(0, {})] if trainer.step == 0 else []  # all is looked at before the first step, too
            if not before:
                with log.aside("drawing the report"):
                    report.update(quiet=True)
            sampled = saved = time.monotonic()
            for step, losses in itertools.chain(before, transgan.train(trainer)):
                last, now = step == settings.steps, time.monotonic()
                log.add(step, losses, settings.batch_size * settings.disc_steps if step else 0)
                if last or step % sample_every == 0 or now - sampled > PATIENCE:
                    with log.aside("drawing samples"):
                        log.measure(look(trainer, noise, real, out / "samples"))
                    sampled = now
                if measure and (last or step % evaluate_every == 0):
                    with log.aside("scoring", evaluate_every):
                        log.measure(measure())
                asked = stop.asked
                if step and (last or asked or step % save_every == 0 or now - saved > PATIENCE):
                    log.write()
                    files.sync(out / "log.csv")  # whose rows are not to be older than the checkpoint
                    checkpoints.save(trainer, out / CHECKPOINTS[0])
                    saved, done = now, last
                log.tick(at_once=asked)
                if step == 2 + log.late and (seconds := log.left()) > LONG:
                    long = f"this run will take about {output.clock(seconds)} here"
                    shorter = "--preset cifar10-laptop, or a run of fewer --steps, takes less"
                    log.say(f"{long}; {shorter}", event="long", seconds=seconds)
                if sampled == now and not last:  # in this step; the last one's report is drawn below
                    log.write()  # which the report is read from
                    with log.aside("drawing the report"):
                        report.update()
                if asked and not last:
                    return asked
        finally:
            report.update(stopped=not done, quiet=not done)
    return None


def train_on(trainer, out, args, measure, commands):
    """`train` as the command line has it, and with --on-nan rewind again and again: from the last checkpoint, at half the
    learning rate, after NotFinite.

    How often it was halved is part of a checkpoint. Raises UserError, saying what to try, after REWINDS times or at once.
    What else stops a run for a while is given the command that goes on, see program/main.py.
    """
    options = trainer.options
    while True:
        try:
            return train(trainer, out, args.sample_every, args.save_every, args.evaluate_every, measure, commands)
        except NotFinite as error:
            scale = trainer.update.rate_scale / 2
            if args.on_nan != "rewind" or scale < 0.5**REWINDS:
                advice = f"start a new run with less than --learning-rate {options.learning_rate}"
                if args.on_nan == "rewind":
                    advice = f"{REWINDS} times half the learning rate did not help: {advice}"
                else:
                    advice += f", or go on from there at half the rate: {commands[1]} --on-nan rewind"
                raise UserError(f"{error}; the last checkpoint is from before: {advice}") from None
            checkpoints.load(trainer, checkpoints.newest_checkpoint(out)[0])
            trainer.update.rate_scale = scale
            output.warn(f"transgan: {error}; back to step {trainer.step}, at {scale:g} of the learning rate")
        except (MemoryError, OSError, KeyboardInterrupt) as error:
            if any((out / name).exists() for name in CHECKPOINTS):
                shared = isinstance(error, MemoryError) and options.generator == "transgan"
                error.goes_on = commands[1] + shared * f" --accumulate {2 * options.accumulate}"
            raise


# --- 2. Several GPUs --------------------------------------------------------------------------------------------------


def check_gpus(args, options):
    """Raise UserError unless this machine has as many GPUs as --gpus says, and they can share these options' batches."""
    found = ag.xp.cuda.runtime.getDeviceCount() if ag.xp is not np else 0
    if found < args.gpus:
        raise UserError(f"--gpus {args.gpus} asks for more GPUs than the {found} in use here; lower it, or leave it out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of which one line follows
        from cupy.cuda import nccl
    if not nccl.available:
        raise UserError("--gpus needs NVIDIA's NCCL, which CuPy does not find: pip install nvidia-nccl-cu12")
    if options.batch_size % args.gpus or options.gen_batch_size % args.gpus:
        raise UserError(f"--batch-size and --gen-batch-size must divide by --gpus {args.gpus}")
    if options.generator != "transgan":
        raise UserError(f"--gpus cannot be: the batch norm of --generator {options.generator} wants whole batches")


def gather_gpus(args, options, checkpoint):
    """The Group of --gpus N, whose other processes are started here."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=take_part, args=(rank, port, args, options, checkpoint), daemon=True)
                 for rank in range(1, args.gpus)]  # fmt: skip
    for process in processes:
        process.start()
    threading.Thread(target=watch_over, args=(processes,), daemon=True).start()
    multiprocessing.set_start_method("fork", force=True)  # of what CuPy serves with while they meet, and cannot spawn
    return Group(0, args.gpus, port)


def watch_over(processes):
    """End this process as soon as one of these fails: what waits for its GPU's part would wait for ever.

    At its own end, when its main thread is gone, Python ends them.
    """
    while processes:
        connection.wait([process.sentinel for process in processes])
        codes = [(process, process.exitcode) for process in processes]  # read once: others look at them, too
        failed = [code for _, code in codes if code]
        if failed and threading.main_thread().is_alive():
            output.end(f"the process of one of the GPUs has ended ({failed[0]}); go on with --resume", 2)
            os._exit(2)
        processes = [process for process, code in codes if code is None]


def take_part(rank, port, args, options, checkpoint):
    """What the processes of further GPUs do: the same steps as the first, which alone writes and shows anything."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first, with whom this one ends, also when it is killed
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    output.mode = "quiet"
    ag.use_device("gpu")
    ag.xp.cuda.Device(rank).use()
    choose_forms(args, options)
    pictures = datasets.load_pictures(options.dataset, args.data_dir, options.image_size)
    trainer = make_trainer(options, pictures, group=Group(rank, args.gpus, port))
    if checkpoint:
        checkpoints.load(trainer, checkpoint)
    for _ in transgan.train(trainer):
        pass


# --- 3. Running -------------------------------------------------------------------------------------------------------


def choose_forms(args, options):
    """Enter the fast forms of the engine's operations, or none with --plain; returns which are in use, in a word or two."""
    if not args.plain:
        device = fast.install(options.precision)
        augment.install()
        if device == "cpu":
            reading.when_decoded = cpu.keep_freed_memory
        return f"fast forms for the {device.upper()}"
    fast.uninstall()
    if options.precision != "float32":
        raise UserError(f"--plain has no --precision {options.precision}: its products are NumPy's; leave out one of them")
    return "plain forms"


def look_back(args, sampler, load, out):
    """Make the export, the pictures or the scores that are asked for of a Sampler; load: gives its data set's pictures."""
    if args.export:
        checkpoints.export(sampler, args.export)
        output.tell(str(args.export), event="export", path=str(args.export))
    if any(getattr(args, name) for name in looks.KINDS):
        looks.make(args, sampler, load, out)
    if args.begun:
        if not args.begun.is_dir():
            command = options.command(sampler.options)
            output.note(f"{args.begun} is the generator of step {sampler.step} of: {command}")
        return
    features = args.features or ("own" if sampler.options.dataset == "shapes" and not args.inception else "inception")
    scores.evaluate(out, sampler, load, features, args.num_images or 50_000, args.data_dir, args.inception, args.fid_stats)


def run(args, parser):
    """What the command line asks for, as `parser` understood it: returns the exit code. Raises UserError."""
    options.refuse_idle_options(args, parser)
    begun = args.resume or args.evaluate or args.begun
    if args.resume and not os.path.isdir(args.resume):
        raise UserError(f"--resume goes on with the training in a run's folder, and {args.resume} is none; name another")
    checkpoint, saved = checkpoints.newest_checkpoint(begun) if begun else (None, None)
    chosen, out = options.choose_options(args, saved)
    networks = make_networks(chosen, rng=summary.Zeros())  # which refuse what they cannot make before anything is written
    if args.summary:
        tell_summary(chosen, *networks, args.preset)
        return 0
    if not saved and not args.out:
        out = checkpoints.own_folder(out, chosen.dataset)
    try:
        device = ag.use_device(args.device)
    except RuntimeError as error:
        raise UserError(str(error)) from None
    forms = choose_forms(args, chosen)
    load = functools.partial(datasets.load_pictures, chosen.dataset, args.data_dir, chosen.image_size)
    checkpoints.refuse_among_pictures(out, chosen.dataset, trains=not (args.evaluate or args.begun))
    if args.evaluate or args.begun:
        look_back(args, checkpoints.load_sampler(chosen, checkpoint, args.threads), load, out)
        return 0
    if args.gpus > 1:
        check_gpus(args, chosen)
    if args.resume:
        with checkpoints.open_checkpoint(checkpoint) as file:
            if file.step >= chosen.steps:
                raise UserError(f"the run in {args.resume} is finished; ask for more with --steps above {file.step}")
    commands = options.commands(chosen, out, args, parser)
    with checkpoints.owned(out, args.resume, commands[1]):
        return begin(args, chosen, out, checkpoint, device, forms, load, commands)


def begin(args, chosen, out, checkpoint, device, forms, load, commands):
    """Train in the folder `out`, from a checkpoint if there is one, with the pictures of load(): returns the exit code."""
    pictures = load()
    batch = max(chosen.batch_size, chosen.gen_batch_size if chosen.sr_weight else 0)
    if args.resume and len(pictures) < batch:  # which stays as it is
        raise UserError(f"{chosen.dataset} holds {len(pictures)} pictures, and the run's batches are of {batch}; add some, "
                        "or name the folder where they are as --dataset")  # fmt: skip
    group = gather_gpus(args, chosen, checkpoint) if args.gpus > 1 else None
    trainer = make_trainer(chosen, pictures, args.threads, group=group)
    if checkpoint:
        saved = checkpoints.load(trainer, checkpoint)
        if checkpoint.name != CHECKPOINTS[0]:  # a damaged newest would become the previous with the next that is saved
            with contextlib.suppress(FileNotFoundError):
                (out / CHECKPOINTS[0]).replace(out / "checkpoint-damaged.npz")
        if saved.options != chosen:  # first, so that whatever stops the run, it goes on with what was asked for now
            checkpoints.save(trainer, out / CHECKPOINTS[0], keep=False)
        if saved.pictures != trainer.learns_from:
            output.warn(f"transgan: the pictures are not those that {out} has learnt from so far; it goes on with these "
                        f"{len(pictures):,}")  # fmt: skip
    threads = f", {trainer.update.threads} threads" if device == "cpu" else ""
    begun = f"{NAMES[chosen.generator]}-{chosen.size} on {chosen.dataset} {chosen.image_size}x{chosen.image_size}"
    output.tell(output.one_line(f"{begun}, {len(pictures):,} pictures, {device}{threads}, {forms}, into {out}"),
                event="start", options=dataclasses.asdict(chosen), step=trainer.step, pictures=len(pictures), device=device,
                threads=trainer.update.threads, forms=forms, out=str(out))  # fmt: skip
    start = time.monotonic()
    measure = scores.own_scores(trainer, args.num_images or 2000, args.data_dir) if args.evaluate_every else None
    with profile() if args.profile else contextlib.nullcontext() as times:
        asked = train_on(trainer, out, args, measure, commands)
    if times is not None:
        tell_profile(times, trainer.inputs.waited, time.monotonic() - start)
    if asked:
        output.warn(f"stopped after step {trainer.step}, and saved; go on with: {commands[1]}")
        output.tell(None, event="stopped", step=trainer.step, signal=asked, resume=commands[1])
        return 128 + asked
    picture, report = out / "samples" / f"step-{trainer.step:06d}.png", out / "report.html"
    output.tell(output.one_line(f"done: {picture}; all about this run: {report}"), event="picture", path=str(picture))
    output.tell(None, event="report", path=str(report))
    return 0


def tell_summary(chosen, generator, discriminator, preset):
    """Print the networks of these options as a table, below the command line that gives them, above a preset's sources."""
    rows = summary.summary_rows(generator, discriminator)
    named = [{name: x for name, x in zip(summary.COLUMNS, row, strict=True) if x} for row in rows]
    values, stated = dataclasses.asdict(chosen), presets.source_table(preset, chosen) if preset else []
    text = f"{options.long_command(chosen)}\n\n{summary.table(rows)}"
    if stated:
        text += "\n\n" + summary.in_columns([list(stated[0]), *(list(row.values()) for row in stated)], "<<<<<")
    output.tell(text, event="summary", options=values, rows=named, sources=stated)
