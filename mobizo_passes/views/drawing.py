"""Drawings of a training program: a picture as .svg, the explorer as .html, Model Explorer's files as .json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import networkx

from mobizo_passes.errors import InputError
from mobizo_passes.markup import code, counted, details, table
from mobizo_passes.views.explorer import explore, layout
from mobizo_passes.views.model_explorer import write
from mobizo_passes.views.picture import check_suffix, draw

if TYPE_CHECKING:
    from mobizo_passes.graph.flops import Flops
    from mobizo_passes.graph.ir import Ir
    from mobizo_passes.sites.select import Sites
    from mobizo_passes.views.explorer import NodeData
    from mobizo_passes.views.history import History
    from mobizo_passes.zo.estimators import Estimator
    from mobizo_passes.zo.optimizers import Optimizer

# A notebook stores what it shows.
_LONGEST_TEXT = 300


class Drawable(Protocol):
    """What is read of a `TrainingProgram`, which itself calls this module."""

    model: dict[str, Any]
    estimator: Estimator
    optimizer: Optimizer
    history: History
    sites: Sites
    notes: tuple[str, ...]
    _methods: dict[str, Ir]

    @property
    def flops(self) -> Flops: ...
    @property
    def captured(self) -> Ir: ...


def check_path(path: Path) -> None:
    """Raise `InputError` for a suffix that is no drawing's, `LayoutLibraryMissing` for a page that can't be written."""
    check_suffix(path)
    if path.suffix.lower() == ".html":
        layout()


def draw_program(program: Drawable, path: Path, beside: Any, data: Mapping[str, NodeData] | None) -> Path:
    """Write one of the three; see `TrainingProgram.draw`."""
    check_path(path)
    estimator, optimizer = program.estimator, program.optimizer
    if path.suffix.lower() == ".svg":
        if beside is not None or data:
            raise InputError(f"beside and data belong to an .html or .json drawing, found '{path.name}'")
        draw(
            program._methods["step"],
            path,
            name=program.model["name"],
            estimator=estimator,
            update="" if estimator.projected and optimizer.plain else optimizer.formula,
            sites=len(program.sites),
            share=program.flops.share_computed_once,
        )
        return path
    if path.suffix.lower() == ".json":
        write(path, title(program), program._methods["step"], _beside(beside), data)
    else:
        path.write_text(page(program, beside, data), encoding="utf-8")
    return path


def page(program: Drawable, beside: Any, data: Mapping[str, NodeData] | None, depth: int | None = None) -> str:
    """Return the explorer's page; see `TrainingProgram.show`."""
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int) or depth < 0):
        raise InputError(f"depth must be a number of levels or None, found {depth!r}")
    return explore(
        title=title(program),
        facts=[*facts(program), *program.notes],
        step=program._methods["step"],
        captured=program.captured,
        history=program.history,
        beside=_beside(beside),
        data=data,
        depth=depth,
    )


def program_html(program: Drawable) -> str:
    """Return a program for a notebook: facts, and, folded, its sites, its passes and, if that is short, its text."""
    history, sites, text = program.history, program.sites, str(program)
    shown = [table(repr(program), (), [(each,) for each in [*facts(program), *program.notes]])]
    shown.append(details("sites", sites._repr_html_()))
    shown.append(details("passes", history._repr_html_()))
    if text.count("\n") <= _LONGEST_TEXT:
        shown.append(details("step", code(text)))
    return "".join(shown)


def title(program: Drawable) -> str:
    """Return what a drawing shows, in a few words."""
    return f"{program.model['name']}: one training step"


def facts(program: Drawable) -> list[str]:
    """Return what is to be known of a program, one line each."""
    estimator, flops = program.estimator, program.flops
    return [
        f"{estimator}: {estimator.groups} groups",
        counted(len(program.sites), "LoRA site"),
        f"{_amount(flops.total)} in a step, {flops.share_computed_once:.0%} of a forward computed once",
        f"update: {program.optimizer.formula}",
    ]


def _beside(other: Any) -> tuple[str, Ir | networkx.DiGraph] | None:
    """What is shown of another program, and its name."""
    if other is None:
        return None
    # `TrainingProgram` itself would close a circle of imports.
    methods = getattr(other, "_methods", None)
    if methods is not None and "step" in methods:
        return f"{other.model['name']}, {other.estimator}", methods["step"]
    if isinstance(other, networkx.DiGraph):
        return str(other.graph.get("name", "")) or "the other graph", other
    graph = other.to_networkx() if hasattr(other, "to_networkx") else None
    if not isinstance(graph, networkx.DiGraph):
        raise InputError(
            f"beside must be a training program, a lowered program or a networkx.DiGraph, found {type(other).__name__}"
        )
    target = getattr(getattr(other, "report", None), "target", "")
    return f"lowered for {target}" if target else type(other).__name__, graph


def _amount(flops: int) -> str:
    scale, unit = next((u for u in ((1e9, "GFLOP"), (1e6, "MFLOP")) if flops >= u[0]), (1e3, "kFLOP"))
    return f"{flops / scale:.3g} {unit}"
