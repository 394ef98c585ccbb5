"""Blocks whose parameters are no weights of linear layers: experts, and adapters other than LoRA."""

from __future__ import annotations

from dataclasses import replace

from mobizo_passes.testing.random_models.builder import Builder, Choice, block, flavour, latest


@block
def experts(b: Builder, c: Choice) -> None:
    """A mixture by token: all experts weighted, the best ones alone, or their weights gathered as transformers does."""
    v = latest(b, c)
    count, best, way = 2 + c.rank % 2, 1 + c.other % 2, c.flavour % 5
    router = b.affine(v.width, count, Choice("linear", lora=c.lora and c.bias, rank=c.rank, bias=c.bias))
    scores = b.let(f"torch.softmax({router}({v.name}), -1)")
    top = b.let(f"{scores}.topk({best}, -1)") if way else ""
    if way == 4:
        weights = b.define("experts", f"nn.Parameter(torch.empty({count}, {c.width}, {v.width}))")
        rows = b.let(f"{v.name}.reshape(-1, {v.width}).repeat_interleave({best}, 0)")
        each = b.let(f"torch.bmm({weights}[{top}.indices.reshape(-1)], {rows}.unsqueeze(-1)).squeeze(-1)")
        chosen = f"({each} * {top}.values.reshape(-1, 1)).reshape(-1, {best}, {c.width}).sum(1)"
        b.emit(f"{chosen}.reshape(*{v.name}.shape[:-1], {c.width})", v, width=c.width, perturbs=c.lora and c.bias)
        return
    layers = [b.affine(v.width, c.width, c) for _ in range(count)]
    gates = scores
    if way == 1:
        gates = b.let(f"torch.zeros_like({scores}).scatter(-1, {top}.indices, {top}.values)")
    elif way == 2:
        gates = b.let(f"{scores} * ({scores} >= {top}.values[..., -1:])")
    elif way == 3:
        gates = b.let(f"(F.one_hot({top}.indices, {count}) * {top}.values.unsqueeze(-1)).sum(-2)")
    if c.other > 1:
        stacked = f"torch.stack([{', '.join(f'{layer}({v.name})' for layer in layers)}], -1)"
        b.emit(f"({stacked} * {gates}.unsqueeze(-2)).sum(-1)", v, width=c.width, perturbs=c.lora)
    else:
        terms = (f"{layer}({v.name}) * {gates}[..., {i}, None]" for i, layer in enumerate(layers))
        b.emit(" + ".join(terms), v, width=c.width, perturbs=c.lora)


@block
def scaling(b: Builder, c: Choice) -> None:
    """IA³: a vector times features, before or after a layer, or in two dimensions at once; or one number for all."""
    v = latest(b, c)
    kind = c.flavour % 4
    shape = (str(v.width), f"1, {v.width}", "1", "()")[kind]
    scale = b.define("scale", f"nn.Parameter(torch.empty({shape}))")
    scaled = f"{v.name} * (1 + {scale})"
    if c.bias:
        b.emit(f"{b.affine(v.width, c.width, c)}({scaled})", v, width=c.width, perturbs=c.lora)
    else:
        b.emit(scaled, v)


@block
def vectors(b: Builder, c: Choice) -> None:
    """VeRA: vectors between and behind factors that two layers may share."""
    v = latest(b, c)
    down = b.define("shared_a", f"nn.Parameter(torch.empty({c.rank}, {v.width}))")
    up = b.define("shared_b", f"nn.Parameter(torch.empty({v.width}, {c.rank}))")
    value = v.name
    for _ in range(1 + c.lora):
        inner = b.define("vera_d", f"nn.Parameter(torch.empty({c.rank}))")
        outer = b.define("vera_b", f"nn.Parameter(torch.empty({v.width}))")
        base = b.affine(v.width, v.width, Choice("linear", bias=c.bias))
        ways = (f"{outer} * F.linear({inner} * F.linear({value}, {down}), {up})",
                f"F.linear({value}, ({outer}[:, None] * {up}) @ ({inner}[:, None] * {down}))",
                f"F.linear({value}, {outer}.diag() @ {up} @ {inner}.diag() @ {down})")  # fmt: skip
        value = b.let(f"{base}({value}) + {flavour(c, ways)}")
    b.emit(f"torch.tanh({value})", v)


@block
def weight_of_weights(b: Builder, c: Choice) -> None:
    """LoKr, DoRA and OFT: a weight that is computed from weights meets the batch."""
    v = latest(b, c)
    weight = b.define("weight", f"nn.Parameter(torch.empty({c.width}, {v.width}))")
    other = b.define("other", f"nn.Parameter(torch.empty({c.width}, {v.width}))")
    ways = (f"{weight} * {other}", f"{weight} + torch.kron({other}[:, :1], {other}[:1])",
            f"F.normalize({weight} + {other}, dim=1) * {other}[:, :1]", f"torch.cat([{weight}[:2], {other}[2:]])",
            f"torch.linalg.vector_norm({other}, dim=0) * {weight}", f"{weight}.masked_fill({other} > 0, 0.0)",
            f"torch.softmax({weight}, 0)", f"{weight}[torch.tensor({list(range(c.width))[::-1]})]")  # fmt: skip
    b.emit(f"F.linear({v.name}, {flavour(c, ways)})", v, width=c.width)


@block
def prompt(b: Builder, c: Choice) -> None:
    """Virtual tokens in front of the others, or positions added to them."""
    v = b.pick(c, "btd")
    if v is None:
        return
    count = 1 + c.rank % 2
    if c.bias:
        table = b.define("positions", f"nn.Parameter(torch.empty({v.time}, {v.width}))")
        b.emit(f"{v.name} + {flavour(c, (table, f'{table}[None]', f'{table}.unsqueeze(0).expand_as({v.name})'))}", v)
        return
    shape = (f"{count}, {v.width}", f"1, {count}, {v.width}")[c.flavour % 2]
    tokens = b.define("prompt", f"nn.Parameter(torch.empty({shape}))")
    ways = (f"{tokens}.expand({b.batch}, {count}, {v.width})", f"{tokens}.repeat({b.batch}, 1, 1)")
    b.emit(f"torch.cat([{flavour(replace(c, flavour=c.other), ways)}, {v.name}], 1)", v, time=v.time + count)


@block
def one_row(b: Builder, c: Choice) -> None:
    """A weight that is read in part, or through a table."""
    v = latest(b, c)
    table = b.define("table", f"nn.Parameter(torch.empty(3, {v.width}))")
    first = f"({v.name} > 0).sum(-1) % 3"
    ways = (f"{v.name} + {table}[1]", f"{v.name} + F.embedding({first}, {table})", f"{v.name} * {table}.mean(0)",
            f"{v.name} @ {table}.T @ {table}", f"{v.name} + {table}[{first}]",
            f"{v.name} - {table}.amax(0)")  # fmt: skip
    if v.layout == "btd" and c.flavour % 6 == 5:
        b.emit(f"torch.baddbmm({v.name}, {v.name}, ({table}.T @ {table}).repeat({b.batch}, 1, 1))", v)
    else:
        b.emit(flavour(c, ways), v)
