"""A training as the program runs it: threads, parts of a batch, GPUs and a second start make the same steps."""

import subprocess
import sys
import threading
import tracemalloc
import types
from concurrent import futures
from pathlib import Path

import numpy as np  # isort: skip
import pytest
from PIL import Image

import autograd as ag
import data
import fast
import transgan
from autograd import Tensor
from data import UserError
from look import summary
from paper.test_published import COUNTS, count
from program import checkpoints, update
from program.run import check_gpus
from program.support import (
    POLICY,
    TRAIN,
    assert_same_state,
    parsed,
    run_main,
    small_trainer,
    state_of,
)
from program.trainer import make_networks
from test_transgan import close, normal, on_cpu
from test_transgan import small_trainer as plain_trainer


def test_the_papers_sizes_of_pictures():
    """48x48 starts from 12x12 in three stages, 64x64 from 8x8 in four, of 5, 3, 3, 2 blocks for XL; patches make 8x8."""
    for preset, start, depths, widths, parameters in (
        ("cifar10-S", 8, (5, 2, 2), (384, 96, 24), COUNTS["S"]),
        ("stl10-XL", 12, (5, 4, 2), (1024, 256, 64), None),
        ("celeba-XL", 8, (5, 3, 3, 2), (1024, 256, 64, 16), 132_925_171),  # the published file's
    ):
        options = parsed("--preset", preset)
        size, side = transgan.SIZES[options.size], options.image_size
        assert transgan.stage_depths(options.size, side) == depths
        generator = transgan.Generator(side, size.embed_dim, depths, summary.Zeros())
        assert generator.start == start
        positions = [stage.position.shape for stage in generator.stages]
        assert positions == [(1, (start * 2**k) ** 2, width) for k, width in enumerate(widths)]
        assert [len(stage.blocks) for stage in generator.stages] == list(depths)
        discriminator = transgan.Discriminator(
            side, options.patch_size, size.disc_embed_dim, size.disc_depth, summary.Zeros()
        )
        assert discriminator.position.shape == (1, 65, 384)
        totals = [row[5] for row in summary.summary_rows(generator, discriminator) if row[1] == "total"]
        assert totals == [count(generator), count(discriminator)]
        assert parameters in (totals[0], None)
    assert transgan.stage_depths("M", 64) == (5, 2, 2, 2)
    assert transgan.stage_depths("S", 64) == (5, 2, 2)  # 384 / 64 = 6 does not divide among four heads


def test_summary_counts_multiply_adds_as_a_forward_pass_makes_them(monkeypatch):
    made, matmul = [], ag.matmul

    def counting(a, b):
        product = matmul(a, b)
        made.append(product.size * a.shape[-1])
        return product

    monkeypatch.setattr(ag, "matmul", counting)
    generator, discriminator = make_networks(parsed("--dataset", "shapes"), rng=summary.Zeros())
    totals = [row[6] for row in summary.summary_rows(generator, discriminator) if row[1] == "total"]
    for total, network, shape in zip(totals, (generator, discriminator), ((1, 128), (1, 3, 16, 16)), strict=True):
        made.clear()
        with ag.no_grad():
            network(Tensor(ag.xp.zeros(shape, np.float32)))
        assert sum(made) == total


@pytest.mark.parametrize(
    "options",
    [
        *({"loss": loss} for loss in transgan.LOSSES),
        *({"accumulate": 2, "loss": loss} for loss in ("wgangp-eps", "hinge")),
        {"diff_aug": "none"},
        {"diff_aug": "color,cutout"},
        {"sr_weight": 0.0},
        {"locality": "none"},
        {"locality": "1:500,2:1200", "locality_stages": 2},
        {"locality": "1:500,2:1200", "locality_shape": "band"},
        {"disc_steps": 1, "beta2": 0.9, "ema_decay": 0.5, "seed": 3},
    ],
    ids=str,
)
def test_resuming_is_exact_to_the_bit(options, small, tmp_path):
    """Also in the middle of an epoch: 40 pictures make 6 batches, and a step uses 2 of them."""
    unbroken, first, second = (small_trainer(**options) for _ in range(3))
    for trainer in (unbroken, first):
        trainer.update.rate_scale = 0.25
    losses = [unbroken.train_step() for _ in range(6)]
    for _ in range(2):
        first.train_step()
    checkpoints.save(first, tmp_path / "checkpoint.npz")
    checkpoints.load(second, tmp_path / "checkpoint.npz")
    assert (second.step, second.update.rate_scale) == (2, 0.25)
    for expected in losses[2:]:
        for name, value in second.train_step().items():
            assert (value is None and expected[name] is None) or float(value) == float(expected[name])
    assert_same_state(state_of(second), state_of(unbroken))
    assert not list(tmp_path.glob("*.part"))


@on_cpu
@pytest.mark.parametrize("loss", transgan.LOSSES)
def test_threads_share_a_batch_without_changing_the_step(loss, small):
    runs = []
    for threads in (1, 2, 4):
        trainer = small_trainer(threads, np.float64, loss=loss)
        assert trainer.update.threads == threads
        for _ in range(3):
            trainer.train_step()
        runs.append(state_of(trainer))
    assert_same_state(runs[0], runs[1], 1e-9)
    assert_same_state(runs[0], runs[2], 1e-9)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("loss", transgan.LOSSES)
def test_accumulating_gives_the_gradients_of_the_whole_batch(loss, threads, small):
    """Also those of the loss's (mean D(real))^2, which is no sum over the parts, and with fewer samples than parts."""
    runs = []
    for accumulate in (1, 2, 4, 10**9):
        trainer = small_trainer(threads, np.float64, loss=loss, accumulate=accumulate, diff_aug=POLICY)
        losses = [float(x) for _ in range(3) for x in trainer.train_step().values() if x is not None]
        runs.append(state_of(trainer) | {"losses": np.array(losses)})
    for run in runs[1:]:
        assert_same_state(runs[0], run, 1e-9)


def test_the_next_steps_data_is_prepared_while_this_one_works(small):
    trainer, asked = small_trainer(), []
    ahead, inputs = trainer.inputs, trainer.inputs.inputs
    ahead.inputs = lambda step: asked.append(step) or inputs(step)
    for _ in range(3):
        trainer.train_step()
        ahead.waiting.result()
    assert asked == [0, 1, 2, 3]
    waited, trainer.step = ahead.waited, 5  # as after going back or on to a checkpoint
    trainer.train_step()
    ahead.waiting.result()
    assert asked == [0, 1, 2, 3, 5, 6]
    assert ahead.waited > waited > 0


class Meeting:
    """What several threads share in place of NCCL: whoever calls hands over an array and gets everybody's."""

    def __init__(self, size):
        self.arrays, self.barrier = [None] * size, threading.Barrier(size, timeout=60)

    def communicator(self, size, rank, host, port):
        assert (size, host) == (len(self.arrays), "127.0.0.1")

        def exchange(x):
            self.barrier.wait()
            self.arrays[rank] = x.copy()
            self.barrier.wait()
            return self.arrays

        def all_gather(x, everybody, count):
            assert count == x.size
            everybody[...] = np.stack(exchange(x))

        def all_reduce(x, total):
            total[...] = sum(exchange(x))

        return types.SimpleNamespace(all_gather=all_gather, all_reduce=all_reduce)


@on_cpu
@pytest.mark.parametrize("loss", transgan.LOSSES)
@pytest.mark.parametrize("size, accumulate, threads", [(2, 1, 1), (3, 2, 2)])
def test_several_gpus_make_the_steps_of_one(loss, size, accumulate, threads, small, monkeypatch):
    """The arithmetic of --gpus, in threads that meet where the processes of GPUs do; NCCL itself takes no part."""
    options = {"loss": loss, "gen_batch_size": 6, "diff_aug": POLICY, "accumulate": accumulate}
    single = small_trainer(1, np.float64, **options)
    losses = [single.train_step() for _ in range(3)]
    meeting = Meeting(size)
    distributed = types.SimpleNamespace(init_process_group=meeting.communicator)
    monkeypatch.setitem(sys.modules, "cupyx", types.SimpleNamespace(distributed=distributed))

    def train(rank):
        trainer = small_trainer(threads, np.float64, **options)
        trainer.update.group = update.Group(rank, size, 0)
        return [trainer.train_step() for _ in range(3)], state_of(trainer)

    with futures.ThreadPoolExecutor(size) as pool:
        for found, state in pool.map(train, range(size)):
            assert_same_state(state, state_of(single), 1e-9)
            for a, b in zip(found, losses, strict=True):
                assert {k: float(x) for k, x in a.items() if x is not None} == pytest.approx(
                    {k: float(x) for k, x in b.items() if x is not None}, rel=1e-9
                )


def test_what_served_while_gpus_met_is_stopped_when_they_have(monkeypatch):
    stopped = []
    store = types.SimpleNamespace(_process="serves", stop=lambda: stopped.append(store._process))
    distributed = types.SimpleNamespace(init_process_group=lambda *_, **options: types.SimpleNamespace(_store=store))
    monkeypatch.setitem(sys.modules, "cupyx", types.SimpleNamespace(distributed=distributed))
    update.Group(0, 2, 0)
    assert (stopped, store._process) == (["serves"], None)


WAITS = """
import atexit, sys, threading, time
atexit.register(time.sleep, 1)  # the last that is done
import multiprocessing
from program import run
context, codes, waits = multiprocessing.get_context("spawn"), sys.argv[1], sys.argv[2]
processes = [context.Process(target=[sys.exit, time.sleep][code > "3"], args=(int(code),), daemon=True) for code in codes]
for process in processes:
    process.start()
threading.Thread(target=run.watch_over, args=(processes,), daemon=True).start()
if waits == "killed":
    processes[1].terminate()
processes[0].join()
time.sleep(60 * (waits != "ends"))
"""


@pytest.mark.parametrize(
    ("codes", "waits", "why"), [("03", "waits", "3"), ("09", "killed", "-15"), ("00", "ends", None), ("09", "ends", None)]
)
def test_a_run_ends_when_the_process_of_another_gpu_fails(codes, waits, why):
    """While it waits, as for a GPU; one that is done is no failure, nor is one that is ended at the run's own end."""
    root, command = Path(update.__file__).parent.parent, [sys.executable, "-c", WAITS, codes, waits]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=50)
    assert done.returncode == (2 if why else 0), done.stderr
    assert (f"one of the GPUs has ended ({why}); go on with --resume" in done.stderr) == (done.returncode == 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="about Linux")
def test_a_run_ends_so_where_nobody_can_be_told():
    root = Path(update.__file__).parent.parent
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", WAITS, "3", "waits"]
        assert subprocess.run(command, cwd=root, stderr=full, timeout=50).returncode == 2


def test_without_nccl_several_gpus_are_refused(monkeypatch):
    runtime = types.SimpleNamespace(getDeviceCount=lambda: 2)
    cuda = types.SimpleNamespace(runtime=runtime, nccl=types.SimpleNamespace(available=False))
    monkeypatch.setattr(ag, "xp", types.SimpleNamespace(cuda=cuda))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    with pytest.raises(UserError, match="--gpus needs NVIDIA's NCCL"):
        check_gpus(types.SimpleNamespace(gpus=2), transgan.Options())


@on_cpu
def test_accumulating_saves_memory(small):
    peaks = []
    for accumulate in (1, 8):
        trainer = small_trainer(1, image_size=16, batch_size=32, gen_batch_size=32, accumulate=accumulate)
        trainer.train_step()
        tracemalloc.start()
        trainer.train_step()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] / 4


def test_resuming_restores_the_window(small, tmp_path):
    first = small_trainer(1, image_size=16, locality="1:800,3:1600", steps=4)
    first.train_step()
    checkpoints.save(first, tmp_path / "checkpoint.npz")
    second = small_trainer(1, image_size=16, locality="1:800,3:1600", steps=4)
    checkpoints.load(second, tmp_path / "checkpoint.npz")
    for _ in range(2):
        first.train_step()
        second.train_step()
    assert second.half_width == 3
    assert_same_state(state_of(first), state_of(second))


def test_locality_is_explained_by_a_picture(small, tmp_path):
    assert run_main(*TRAIN, "--image-size", 16, "--out", tmp_path / "run", "--locality", "2:22,4:60") == 0
    grid = np.asarray(Image.open(tmp_path / "run" / "locality.png")).astype(int)[::6, ::6]
    assert grid.shape == (2 * 17 + 1, 3 * 17 + 1, 3)
    for row, i in np.ndindex(2, 3):
        picture = grid[1 + 17 * row : 17 + 17 * row, 1 + 17 * i : 17 + 17 * i]
        seen = transgan.window_mask(16, (2, 4, 256)[i], ("window", "band")[row])[8 * 16 + 8].reshape(16, 16)
        np.testing.assert_array_equal(picture[..., 0] > 100, seen)
        assert picture[8, 8].tolist() == [255, 51, 51]


def test_half_the_rate_is_half_the_rate(small):
    halved, lower = small_trainer(1, learning_rate=2e-3), small_trainer(1, learning_rate=1e-3)
    halved.update.rate_scale = 0.5
    for trainer in (halved, lower):
        trainer.train_step()
    assert_same_state(state_of(halved), state_of(lower))


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_what_is_restored_comes_from_the_second_stages_resolution(stages):
    generator = transgan.Generator(8, 128, (1,) * stages, np.random.default_rng(0), 2, np.float64, co_training=True)
    real, side = ag.xp.asarray(normal(3, (2, 3, 8, 8))[0]), 2 * generator.start
    small = real.reshape(2, 3, side, 8 // side, side, 8 // side).mean(axis=(3, 5))
    restored = generator.super_resolve(Tensor(small)).data
    close(transgan.super_resolution_error(generator, real), ((restored - real) ** 2).mean(axis=(1, 2, 3)))


def test_co_training_learns_to_restore_pictures(small):
    """Eighty steps take away three quarters of the error; without co-training's gradient none would go."""
    trainer = plain_trainer(steps=80, disc_steps=1, learning_rate=3e-3, sr_weight=50.0, diff_aug="none")
    errors = [float(trainer.train_step()["sr_loss"]) for _ in range(80)]
    assert np.mean(errors[-10:]) < 0.25 * errors[0]
    real = data.scale(trainer.batches.pictures)
    small_pictures = ag.to_numpy(transgan.downsample(ag.xp.asarray(real), 2))
    restored = trainer.restore(small_pictures)
    assert restored.shape == real.shape


def test_no_two_streams_of_random_numbers_are_the_same():
    streams = [(purpose, seed, number) for purpose in data.PURPOSES
               for seed in (0, 1, 2) for number in (0, 1, 2)]  # fmt: skip
    assert len({data.random_stream(*stream).random() for stream in streams}) == len(streams)


def test_a_steps_draws_follow_from_the_seed(small, monkeypatch):
    drawn, stream = [], data.random_stream
    monkeypatch.setattr(data, "random_stream", lambda *key: drawn.append(key) or stream(*key))
    trainer = plain_trainer(seed=3)
    for _ in range(2):
        trainer.train_step()
    own = [("weights", 3), ("shapes", 0, 8), ("step", 3, 0), ("step", 3, 1)]
    assert [key for key in drawn if "order" not in key[0]] == own
    assert {("order", 3, 0), ("co-training order", 3, 0)} <= set(drawn)


def test_about_every_second_picture_is_mirrored():
    pictures = np.arange(2000 * 3 * 2 * 3, dtype=np.float32).reshape(2000, 3, 2, 3)
    given = pictures.copy()
    made = transgan.flip(given, np.random.default_rng(0))
    assert made is given
    mirrored = (made == pictures[..., ::-1]).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(made[~mirrored], pictures[~mirrored])
    assert mirrored.mean() == pytest.approx(0.5, abs=0.05)


def test_each_picture_of_a_step_has_its_own_random_numbers(small, monkeypatch):
    """Noise, mixing weights, draws and mirrors: none is one for a whole batch, and all come from the step's own stream."""
    trainer = plain_trainer(batch_size=20, gen_batch_size=20, diff_aug="color", sr_weight=1.0)
    disc_inputs, gen_inputs = trainer.inputs(3)
    (real, *first), (_, *second), (*last, restored) = *disc_inputs, gen_inputs
    assert [x.shape for x in first] == [(20, 64), (20, 1, 1, 1), (20, 3, transgan.DRAWS)]
    assert [x.shape for x in last] == [(20, 64), (20, transgan.DRAWS)]
    numbers = np.concatenate([x[..., :3].ravel() for x in (*first, *second, *last)])
    assert len(np.unique(numbers)) == len(numbers)
    assert 0 <= first[1].min() < 0.2 < 0.8 < first[1].max() <= 1
    for made, whole in ((real, trainer.batches[6]), (restored, trainer.co_batches[3])):
        kept = (made == whole).all(axis=(1, 2, 3))
        np.testing.assert_array_equal(made, np.where(kept[:, None, None, None], whole, whole[..., ::-1]))
        assert 0 < kept.sum() < len(kept)

    def all_inputs():
        disc_inputs, gen_inputs = trainer.inputs(3)
        return [x for inputs in (*disc_inputs, gen_inputs) for x in inputs]

    stream = data.random_stream
    before, again = all_inputs(), all_inputs()
    monkeypatch.setattr(data, "random_stream", lambda purpose, seed, *n: stream(purpose, seed + (purpose == "step"), *n))
    for a, b, other in zip(before, again, all_inputs(), strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != other).any()


def test_training_brings_generated_pictures_closer():
    """Fifty steps on drawn shapes take away a quarter of the distance to them that untrained pictures have."""
    fast.install()
    trainer = plain_trainer(image_size=16, patch_size=4, batch_size=16, gen_batch_size=16, learning_rate=5e-4, steps=50,
                            ema_decay=0.9, sr_weight=0.0, diff_aug="none", locality="none")  # fmt: skip
    z = trainer.noise(40, np.random.default_rng(0))
    real = data.scale(trainer.batches.pictures)
    before = transgan.sliced_wasserstein(trainer.sample(z), real)
    for _ in transgan.train(trainer):
        pass
    fast.uninstall()
    assert transgan.sliced_wasserstein(trainer.sample(z), real) < 0.75 * before


def test_the_window_grows_with_the_schedule_and_goes(small):
    trainer = plain_trainer(image_size=16, locality="1:320,3:640,5:960", steps=5, disc_steps=1, locality_stages=2)
    assert transgan.locality_phases(trainer.options) == [(1, 1.0), (3, 2.0), (5, 3.0)]
    seen = []
    for _ in range(5):
        trainer.train_step()
        seen.append([None if mask is None else int(ag.to_numpy(mask)[0].sum()) for mask in trainer.generator.masks])
    assert seen == [[None, 4, 4], [None, 16, 16], [None, 36, 36], [None] * 3, [None] * 3]
    published = transgan.locality_phases(transgan.Options())
    assert published == [(h, pytest.approx(e / 1600 * 500_000)) for h, e in ((4, 22), (6, 32), (8, 42), (10, 60))]
