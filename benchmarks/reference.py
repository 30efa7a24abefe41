"""TransGAN and its training in PyTorch, by our parameters' names: a second reading of the same facts.

Ours is held against it by benchmarks/test_parity.py, and timed beside it by benchmarks/step.py.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

import autograd as ag
import transgan


def parameters(parameters):
    """Our parameters as PyTorch leaves on the same device; linear weights in PyTorch's (outputs, inputs)."""
    device = "cpu" if ag.xp is np else "cuda"
    leaves = {}
    for name, p in parameters.items():
        array = ag.to_numpy(p)
        array = array.T if is_matrix(name, array) else array
        leaves[name] = torch.tensor(np.ascontiguousarray(array), device=device, requires_grad=True)
    return leaves


def is_matrix(name, array):
    return name.endswith("weight") and array.ndim == 2


def linear(p, name, x):
    return F.linear(x, p[name + ".weight"], p.get(name + ".bias"))


def norm(p, name, x):
    return F.layer_norm(x, x.shape[-1:], p[name + ".weight"], p[name + ".bias"], 1e-5)


def block(p, name, x, fused, mask=None):
    (batch, tokens, width), num_heads = x.shape, transgan.NUM_HEADS
    qkv = linear(p, name + ".attention.qkv", norm(p, name + ".norm1", x))
    q, k, v = qkv.reshape(batch, tokens, 3, num_heads, width // num_heads).permute(2, 0, 3, 1, 4).unbind(0)
    if fused:
        out = F.scaled_dot_product_attention(q, k, v, mask)
    else:
        scores = (q @ k.transpose(-2, -1)) * (width // num_heads) ** -0.5
        out = (scores if mask is None else scores.masked_fill(~mask, -1e9)).softmax(dim=-1) @ v
    x = x + linear(p, name + ".attention.projection", out.transpose(1, 2).reshape(batch, tokens, width))
    hidden = F.gelu(linear(p, name + ".mlp.expand", norm(p, name + ".norm2", x)))
    return x + linear(p, name + ".mlp.reduce", hidden)


def diff_augment(x, policy, draws):
    """All pictures at once, by indices into a copy with a margin of 1, in the order of `policy`; draws as ours."""
    side, batch = x.shape[-1], torch.arange(len(x), device=x.device)[:, None, None]
    pixel = torch.arange(side, device=x.device)
    brightness, saturation, contrast = draws[:, :3].T[..., None, None, None]  # (B, 1, 1, 1) each
    down, right, row, column = draws[:, 3:].long().T[..., None]  # (B, 1) each
    for name in policy.split(","):
        if name == "color":
            x = x + brightness
            x = torch.lerp(x.mean(dim=1, keepdim=True).expand_as(x), x, saturation)
            x = torch.lerp(x.mean(dim=(1, 2, 3), keepdim=True).expand_as(x), x, contrast)
        elif name == "translation":
            rows, columns = ((pixel - shift + 1).clamp(0, side + 1) for shift in (down, right))  # (B, side) each
            padded = F.pad(x, [1] * 4).permute(0, 2, 3, 1)
            x = padded[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        else:
            size = (side + 1) // 2
            starts = (row - size // 2, column - size // 2)
            rows, columns = ((pixel >= start) & (pixel < start + size) for start in starts)
            x = x * ~(rows[:, None, :, None] & columns[:, None, None, :])
    return x


def discriminator_loss(discriminate, real, fake, loss, mix):
    on_real, on_fake = discriminate(real), discriminate(fake)
    if loss == "hinge":
        return F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()
    if loss == "standard":
        one = torch.ones_like(on_real)
        cross_entropy = F.binary_cross_entropy_with_logits
        return cross_entropy(on_real, one) + cross_entropy(on_fake, 0 * one)
    x = (mix * real + (1 - mix) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(discriminate(x).sum(), x, create_graph=True)
    penalty = 10 * ((slope.flatten(1).norm(2, dim=1) - 1) ** 2).mean()
    return on_fake.mean() - on_real.mean() + penalty + 1e-3 * on_real.mean() ** 2


def generator_loss(on_fake, loss):
    if loss == "standard":
        return F.binary_cross_entropy_with_logits(on_fake, torch.ones_like(on_fake))
    return -on_fake.mean()


class Trainer(transgan.Trainer):
    """A trainer's twin, from the same first weights: networks, losses, gradients and Adam are PyTorch's.

    What a step needs from outside, and the order of what is done in it, it has from transgan.Trainer. fused: attention is
    PyTorch's fused one wherever that will do, which has no second derivative. Raises ValueError for other windows of
    locality than one in the last stage.
    """

    def __init__(self, trainer, fused=False):
        options = trainer.options
        if options.locality != "none" and (options.locality_stages, options.locality_shape) != (1, "window"):
            raise ValueError("in PyTorch, locality is windows in the last stage")
        self.options, self.generator, self.batches = options, trainer.generator, trainer.batches
        if options.sr_weight:
            self.co_batches = trainer.co_batches
        self.fused, self.mask = fused, None
        self.depths = transgan.stage_depths(options.size, options.image_size)
        self.g, self.d = parameters(trainer.gen_parameters), parameters(trainer.disc_parameters)
        self.average = {name: p.detach().clone() for name, p in self.g.items()}
        self.adams = [torch.optim.Adam(p.values(), betas=(0.0, options.beta2), eps=1e-8) for p in (self.g, self.d)]
        self.step, self.norms = 0, []

    def array(self, values):
        return torch.as_tensor(values, dtype=self.g["to_rgb.bias"].dtype, device=self.g["to_rgb.bias"].device)

    def set_window(self):
        """So many pixels either way in the last stage."""
        half_width, pixel = transgan.half_width_at(self.options, self.step), torch.arange(self.options.image_size)
        place = torch.cartesian_prod(pixel, pixel).double()
        near = torch.cdist(place, place, p=math.inf) <= (half_width or math.inf)
        self.mask = near.to(self.g["to_rgb.bias"].device) if half_width else None

    def generate(self, z, small=None, parameters=None):
        """Pictures from noise, or, of three stages, from small pictures through the last two; the mask is for the last."""
        p, first = parameters or self.g, 0 if small is None else 1
        if first:
            x = linear(p, "from_rgb", small.flatten(2).transpose(1, 2))
        else:
            x = linear(p, "project", z).reshape(len(z), -1, z.shape[1])
        for k, depth in list(enumerate(self.depths))[first:]:
            if k > first:
                batch, tokens, width = x.shape
                side = math.isqrt(tokens)
                x = F.pixel_shuffle(x.transpose(1, 2).reshape(batch, width, side, side), 2).flatten(2).transpose(1, 2)
            x = x + p[f"stages.{k}.position"]
            for i in range(depth):
                x = block(p, f"stages.{k}.blocks.{i}", x, self.fused, self.mask if k == len(self.depths) - 1 else None)
        x = linear(p, "to_rgb", x)
        side = math.isqrt(x.shape[1])
        return x.transpose(1, 2).reshape(len(x), 3, side, side)

    def sample(self, z):
        """Pictures of the averaged generator from noise (n, Z), 64 at a time: NumPy (n, 3, H, W)."""
        with torch.no_grad():
            parts = [self.generate(part, parameters=self.average) for part in self.array(z).split(64)]
        return torch.cat(parts).cpu().numpy()

    def discriminate(self, x, draws, fused=False):
        if self.options.diff_aug != "none":
            x = diff_augment(x, self.options.diff_aug, draws)
        side, p = self.options.patch_size, self.d
        x = F.unfold(x, side, stride=side).transpose(1, 2)  # (B, N, 3 side^2), channel by channel as ours
        x = linear(p, "embed", x)
        x = torch.cat([p["cls"].expand(len(x), -1, -1), x], dim=1) + p["position"]
        for i in range(transgan.SIZES[self.options.size].disc_depth):
            x = block(p, f"blocks.{i}", x, fused)
        return linear(p, "head", norm(p, "norm", x)[:, 0])[:, 0]

    def judge(self, x, draws):
        """`discriminate` where first derivatives are enough."""
        return self.discriminate(x, draws, self.fused)

    def descend(self, loss, parameters, adam, rate):
        for p, gradient in zip(parameters.values(), torch.autograd.grad(loss, parameters.values()), strict=True):
            p.grad = gradient
        self.norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), transgan.MAX_NORM))
        adam.param_groups[0]["lr"] = rate
        adam.step()
        adam.zero_grad()
        return loss.item()

    def discriminator_step(self, inputs, rate):
        real, z, mix, draws = (self.array(x) for x in inputs)
        with torch.no_grad():
            fake = self.generate(z)
        rows = iter(draws.swapaxes(0, 1))
        loss = discriminator_loss(lambda x: self.discriminate(x, next(rows)), real, fake, self.options.loss, mix)
        return {"disc_loss": self.descend(loss, self.d, self.adams[1], rate)}

    def generator_step(self, inputs, rate):
        z, draws, *real = (self.array(x) for x in inputs)
        loss = generator_loss(self.judge(self.generate(z), draws), self.options.loss)
        for pictures in real:
            small = F.avg_pool2d(pictures, 2 ** (len(self.depths) - 2))
            loss = loss + self.options.sr_weight * F.mse_loss(self.generate(None, small), pictures)
        loss = self.descend(loss, self.g, self.adams[0], rate)
        with torch.no_grad():
            for name, p in self.g.items():
                self.average[name].lerp_(p, 1 - self.options.ema_decay)
        return {"gen_loss": loss}
