"""The kinds of block that random models are made of. Simple ones stand first: that is where shrinking ends."""

from __future__ import annotations

from mobizo_passes.testing.random_models.builder import BATCH_DIM, TIME_DIM, Builder, Choice, block, flavour, latest


@block
def activation(b: Builder, c: Choice) -> None:
    names = ("torch.tanh", "torch.relu", "F.gelu", "F.silu", "torch.sigmoid", "F.softplus", "F.leaky_relu", "torch.sin")
    v = latest(b, c)
    b.emit(f"{flavour(c, names)}({v.name})", v)


@block
def linear(b: Builder, c: Choice) -> None:
    v = latest(b, c)
    b.emit(f"{b.affine(v.width, c.width, Choice('linear', bias=c.bias))}({v.name})", v, width=c.width)


@block
def lora(b: Builder, c: Choice) -> None:
    """LoRA in several spellings, under names that say what it is and under names that don't."""
    v = latest(b, c)
    x, out, spelling = v.name, c.width, c.flavour % 8
    if spelling == 0:
        layer = b.affine(v.width, out, Choice("lora", lora=True, rank=c.rank, bias=c.bias))
        b.emit(f"{layer}({x})", v, width=out, perturbs=True)
        return
    base = f"{b.define('base', f'nn.Linear({v.width}, {out}, bias={c.bias})')}({x})"
    if spelling in (1, 2, 3):
        bias = c.bias and spelling == 3
        down = b.define("down", f"nn.Linear({v.width}, {c.rank}, bias={bias})")
        up = b.define("up", f"nn.Linear({c.rank}, {out}, bias={bias})")
        low = f"F.dropout({down}({x} * 2.0), 0.1, self.training)" if spelling == 2 else f"{down}({x})"
        b.emit(f"{base} + {up}({low})", v, width=out, perturbs=True)
        return
    down = b.define("down", f"nn.Parameter(torch.empty({c.rank}, {v.width}))")
    up = b.define("up", f"nn.Parameter(torch.empty({out}, {c.rank}))")
    product = (
        f"({x} @ {down}.T) @ {up}.mT / 2",
        f"0.5 * ({x} @ {down}.T @ {up}.T)",
        f"torch.einsum('...r,or->...o', torch.einsum('...i,ri->...r', {x}, {down}), {up})",
        f"F.linear(F.linear({x}, {down}), {up} * 2.0)",
    )[spelling - 4]
    b.emit(f"{base} + {product}", v, width=out, perturbs=True)


@block
def add(b: Builder, c: Choice) -> None:
    v = latest(b, c)
    w = b.partner(v, c)
    b.emit(f"{v.name} {flavour(c, '+-')} {w.name}", v, w)


@block
def gate(b: Builder, c: Choice) -> None:
    v = latest(b, c)
    w = b.partner(v, c)
    b.emit(f"{v.name} * {flavour(c, ('torch.sigmoid', 'torch.tanh'))}({w.name})", v, w)


@block
def norm(b: Builder, c: Choice) -> None:
    v = latest(b, c)
    d = v.width
    kinds = [f"nn.LayerNorm({d})", f"nn.RMSNorm({d}, eps=1e-5)", f"nn.LayerNorm({d}, elementwise_affine=False)"]
    across = [f"nn.GroupNorm(1, {d})", f"nn.GroupNorm({d}, {d})", f"nn.BatchNorm1d({d})"]
    if v.layout == "btd" and c.flavour % 6 > 2:
        n = b.define("norm", across[c.flavour % 3])
        b.emit(f"{n}({v.name}.transpose(1, 2)).transpose(1, 2)", v)
    elif v.layout in ("rows", "bd") and c.flavour % 6 == 3:
        b.emit(f"{b.define('norm', f'nn.BatchNorm1d({d})')}({v.name})", v)
    elif c.flavour % 6 == 4:
        b.emit(f"F.normalize({v.name}, dim=-1, eps=1e-3)", v)
    else:
        b.emit(f"{b.define('norm', flavour(c, kinds))}({v.name})", v)


@block
def pool(b: Builder, c: Choice) -> None:
    v = b.pick(c, "btd", "tbd")
    if v is None:
        return
    t = TIME_DIM[v.layout]
    step = {0: "[:, {}]", 1: "[{}]"}[BATCH_DIM[v.layout]]
    ways = (f".mean({t})", step.format(-1), f".amax({t})", step.format(0), f".sum({t})", f".logsumexp({t})",
            f".std({t}, correction=0)", f".max({t}).values")  # fmt: skip
    b.emit(f"{v.name}{flavour(c, ways)}", v, layout="bd", time=1)


@block
def fold(b: Builder, c: Choice) -> None:
    """[B, T, D] to rows and back."""
    v = b.pick(c, "btd", "rows")
    if v is None:
        return
    if v.layout == "rows":
        back = (f".reshape({b.batch}, {v.time}, {v.width})", f".unflatten(0, ({b.batch}, {v.time}))")
        b.emit(f"{v.name}{flavour(c, back)}", v, layout="btd")
    else:
        there = (f".reshape({b.batch * v.time}, {v.width})", ".flatten(0, 1)")
        b.emit(f"{v.name}{flavour(c, there)}", v, layout="rows")


@block
def time_first(b: Builder, c: Choice) -> None:
    """[B, T, D] to [T, B, D] and back."""
    v = b.pick(c, "btd", "tbd")
    if v is not None:
        b.emit(f"{v.name}{flavour(c, ('.transpose(0, 1)', '.permute(1, 0, 2)'))}", v,
               layout="tbd" if v.layout == "btd" else "btd")  # fmt: skip


@block
def mix_time(b: Builder, c: Choice) -> None:
    """A linear layer over time, as an MLP-mixer has it."""
    v = b.pick(c, "btd", least=4 if c.lora else 1)
    if v is not None:
        layer = b.affine(v.time, v.time, c)
        b.emit(f"{layer}({v.name}.transpose(1, 2)).transpose(1, 2)", v, perturbs=c.lora)


@block
def concat(b: Builder, c: Choice) -> None:
    v = latest(b, c)
    w = b.partner(v, c)
    layer = b.affine(2 * v.width, c.width, c)
    b.emit(f"{layer}(torch.cat([{v.name}, {w.name}], -1))", v, w, width=c.width, perturbs=c.lora)


@block
def split(b: Builder, c: Choice) -> None:
    v = latest(b, c)
    ways = [f"torch.cat({v.name}.split([1, {v.width - 1}], -1)[::-1], -1)",
            f"torch.cat({v.name}.chunk(2, -1)[::-1], -1)"]  # fmt: skip
    if v.layout in TIME_DIM:
        t = TIME_DIM[v.layout]
        ways += [f"torch.stack({v.name}.unbind({t})[::-1], {t})", f"{v.name}.flip({t})"]
    b.emit(flavour(c, ways), v)


@block
def halves(b: Builder, c: Choice) -> None:
    """Two batches, one after the other, in one layer, and taken apart again."""
    v = latest(b, c)
    d = BATCH_DIM[v.layout]
    layer = b.affine(v.width, c.width, c)
    both = f"{layer}(torch.cat([{v.name}, torch.tanh({v.name})], {d}))"
    ways = [f"torch.sub(*{both}.chunk(2, {d}))", f"torch.stack({both}.chunk(2, {d})).mean(0)"]
    b.emit(flavour(c, ways), v, width=c.width, perturbs=c.lora)


@block
def cut(b: Builder, c: Choice) -> None:
    """A part of the time steps."""
    v = b.pick(c, "btd", "tbd", least=2)
    if v is None:
        return
    lead = ":, " if v.layout == "btd" else ""
    way, time = (("1:", v.time - 1), (":-1", v.time - 1), ("::2", (v.time + 1) // 2), ("-2:", 2))[c.flavour % 4]
    b.emit(f"{v.name}[{lead}{way}]", v, time=time)


@block
def shared(b: Builder, c: Choice) -> None:
    """Calls a layer once more, or a new one twice."""
    v = latest(b, c)
    found = [m for m in b.modules if m[1] == v.width]
    if found:
        name, _, fan_out, perturbs = found[-1 - c.other % len(found)]
        b.emit(f"{name}({v.name})", v, width=fan_out, perturbs=perturbs)
    else:
        layer = b.affine(v.width, v.width, c)
        b.emit(f"{layer}(torch.tanh({layer}({v.name})))", v, perturbs=c.lora)


@block
def softmax(b: Builder, c: Choice) -> None:
    """Softmax over features or time, weighting another value."""
    v = latest(b, c)
    w = b.partner(v, c)
    dim = TIME_DIM[v.layout] if v.layout in TIME_DIM and c.lora else -1
    b.emit(f"{flavour(c, ('torch.softmax', 'torch.log_softmax'))}({v.name}, {dim}) * {w.name}", v, w)


@block
def cumulate(b: Builder, c: Choice) -> None:
    v = b.pick(c, "btd", "tbd")
    if v is not None:
        b.emit(f"{v.name}.cumsum({TIME_DIM[v.layout]})", v)


@block
def mask(b: Builder, c: Choice) -> None:
    v = latest(b, c)
    w = b.partner(v, c)
    ways = (f"{v.name}.masked_fill({w.name} > 0.5, 0.0)", f"torch.where({w.name} > 0, {v.name}, 0.1 * {v.name})",
            f"torch.maximum({v.name}, {w.name})", f"{v.name}.clamp(-1.0, 1.0)",
            f"{v.name} * ({w.name} > 0)")  # fmt: skip
    way = flavour(c, ways)
    b.emit(way, v, *(() if ".clamp(" in way else (w,)))


@block
def conv(b: Builder, c: Choice) -> None:
    """Convolution over time."""
    v = b.pick(c, "btd")
    if v is None:
        return
    options = ("3, padding=1", "1", "3, padding=2, dilation=2", "3, padding='same'")
    if c.flavour % 5 == 4:
        layer = b.define("conv", f"nn.Conv1d({v.width}, {v.width}, 3, padding=1, groups={v.width})")
        b.emit(f"{layer}({v.name}.transpose(1, 2)).transpose(1, 2)", v)
        return
    layer = b.define("conv", f"nn.Conv1d({v.width}, {c.width}, {flavour(c, options)}, bias={c.bias})")
    b.emit(f"{layer}({v.name}.transpose(1, 2)).transpose(1, 2)", v, width=c.width)


@block
def attention(b: Builder, c: Choice) -> None:
    """Attention by hand, over 2-D scores or over heads, causal or not; and PyTorch's own."""
    v = b.pick(c, "btd")
    if v is None:
        return
    w = b.partner(v, c)
    q, k, t = v.name, w.name, v.time
    causal = f".masked_fill(torch.ones({t}, {t}, dtype=torch.bool).triu(1), float('-inf'))" if c.lora else ""
    way = c.flavour % 4
    if way == 0:
        b.emit(f"torch.softmax(({q} @ {k}.transpose(1, 2)){causal}, -1) @ {k}", v, w)
    elif way == 1:
        b.emit(f"F.scaled_dot_product_attention({q}, {k}, {k}, is_causal={c.lora})", v, w)
    elif way == 2:
        b.emit(f"torch.softmax((torch.bmm({q}, {k}.mT) * 0.5){causal}, 2).bmm({k})", v, w)
    else:
        heads = 2 if v.width % 2 == 0 else 1
        split_heads = f".unflatten(-1, ({heads}, {v.width // heads})).transpose(1, 2)"
        b.emit(f"F.scaled_dot_product_attention({q}{split_heads}, {k}{split_heads}, {k}{split_heads}, "
               f"is_causal={c.lora}).transpose(1, 2).flatten(2)", v, w)  # fmt: skip


@block
def stack(b: Builder, c: Choice) -> None:
    v = latest(b, c)
    w = b.partner(v, c)
    dim = c.width % (2 if v.layout in ("rows", "bd") else 3)
    reduce = flavour(c, ("mean", "amax", "sum"))
    b.emit(f"torch.stack([{v.name}, {w.name}], {dim}).{reduce}({dim})", v, w)


@block
def einsum(b: Builder, c: Choice) -> None:
    v = latest(b, c)
    w = b.partner(v, c)
    if v.layout == "btd" and c.flavour % 2:
        b.emit(f"torch.einsum('btd,bsd,bse->bte', {v.name}, {w.name}, {w.name})", v, w)
    else:
        weight = b.define("weight", f"nn.Parameter(torch.empty({c.width}, {v.width}))")
        b.emit(f"torch.einsum('...i,oi->...o', {v.name}, {weight})", v, width=c.width)


@block
def gather(b: Builder, c: Choice) -> None:
    """Picks time steps: fixed ones, ranked ones, or those another value points at."""
    v = b.pick(c, "btd")
    if v is None:
        return
    w = b.partner(v, c)
    order = list(range(v.time))[::-1] if c.bias else [0] * v.time
    way = c.flavour % 5
    if way == 0:
        b.emit(f"{v.name}[:, torch.tensor({order})]", v)
    elif way == 1:
        b.emit(f"{v.name}.index_select(1, torch.tensor({order}))", v)
    elif way == 2:
        b.emit(f"{v.name}.sort(1).values", v)
    elif way == 3:
        b.emit(f"{v.name}.gather(1, {w.name}.argsort(1))", v, w)
    else:
        b.emit(f"{v.name}.gather(1, {w.name}.argmax(1, keepdim=True))", v, w, time=1)


@block
def roll_time(b: Builder, c: Choice) -> None:
    """The step before, or zeros in front of the first."""
    v = b.pick(c, "btd")
    if v is not None:
        way = flavour(c, (f"F.pad({v.name}, (0, 0, 1, 0))[:, :-1]", f"{v.name}.roll(1, 1)"))
        b.emit(way, v)


@block
def broadcast(b: Builder, c: Choice) -> None:
    """A value per example, given back to every time step."""
    v = b.pick(c, "btd")
    if v is None:
        return
    w = next((w for w in reversed(b.values) if w.layout == "bd" and w.width == v.width), v)
    way = f"[:, None].expand(-1, {v.time}, -1)" if c.bias else ".unsqueeze(1)"
    b.emit(f"{v.name} * {w.name}{way if w is not v else '.amax(1, keepdim=True)'}", v, w)


def couple(b: Builder, c: Choice) -> None:
    """Mixes the examples of the batch; not among the blocks, because a model has one at most."""
    v = latest(b, c)
    d = BATCH_DIM[v.layout]
    ways = [f"{v.name} - {v.name}.mean({d}, keepdim=True)", f"{v.name}.roll(1, {d})", f"torch.softmax({v.name}, {d})",
            f"{v.name}.sort({d}).values", f"{v.name}.flip({d})", f"{v.name}.cumsum({d})",
            f"{v.name} / (1 + {v.name}.abs().max())"]  # fmt: skip
    if v.layout in ("rows", "bd"):
        ways += [f"F.batch_norm({v.name}, None, None, training=True)", f"{v.name} @ {v.name}.T @ {v.name}"]
    if v.layout == "btd":
        ways += [f"F.scaled_dot_product_attention(*[{v.name}.transpose(0, 1)] * 3).transpose(0, 1)",
                 f"{v.name}[torch.tensor({list(range(b.batch))[::-1]})]"]  # fmt: skip
    b.emit(flavour(c, ways), v, couples=True)
