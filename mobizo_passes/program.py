"""The result of a transform: a training-step program that can be run, read, checked and lowered."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mobizo_passes import manifest as _manifest
from mobizo_passes.capture.inputs import Inputs, LossFn, bind_inputs
from mobizo_passes.capture.scalars import drawn, seed_tensor
from mobizo_passes.dialects import CORE
from mobizo_passes.errors import InputError
from mobizo_passes.graph.facts import role
from mobizo_passes.graph.flops import Flops, count_flops
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.neutral import neutral
from mobizo_passes.graph.passes import PassRecord, checking, run_passes
from mobizo_passes.graph.text import to_text
from mobizo_passes.markup import Frame
from mobizo_passes.passes.gather_labels import check_label_counts
from mobizo_passes.pipelines import core, internal
from mobizo_passes.reference import StepResult
from mobizo_passes.sites.peft import AdapterFile
from mobizo_passes.sites.select import Sites
from mobizo_passes.views.diff import graph_diff
from mobizo_passes.views.history import History
from mobizo_passes.zo.estimators import Estimator
from mobizo_passes.zo.optimizers import Optimizer

if TYPE_CHECKING:
    import networkx

    from mobizo_passes.views.explorer import NodeData

METHODS = ("step", "apply", "loss", "logits", "gradients")


class TrainingProgram:
    """A compiled training step: the methods step, apply, loss and logits as pure functions of tensors.

    `notes` says what `transform` did with the model that its user may not expect; `adapter_files` what is written when
    the trained adapter is saved.
    """

    def __init__(
        self,
        *,
        methods: Mapping[str, Ir],
        captured: Ir,
        history: Sequence[PassRecord],
        sites: Sites,
        gradients: Ir | None,
        estimator: Estimator,
        optimizer: Optimizer,
        noise: str,
        trainable: str,
        adapter: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        inputs: Inputs,
        loss: LossFn | None,
        labels: Mapping[str, Any],
        model: Mapping[str, Any],
        files: Sequence[AdapterFile],
        verifier: Any,
        notes: Sequence[str] = (),
    ) -> None:
        self._methods = dict(methods)
        self._captured = captured
        self._gradients = gradients
        self._adapter = dict(adapter)
        self._frozen = dict(frozen)
        self._verifier = verifier
        self.history = History(history)
        self.sites = sites
        self.estimator = estimator
        self.optimizer = optimizer
        self.noise = noise
        self.trainable = trainable
        self.inputs = inputs
        self.loss_fn = loss
        self.labels = dict(labels)
        self.model = dict(model)
        self.adapter_files = tuple(files)
        self.notes = tuple(notes)

    # Reading -----------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return to_text(self._methods["step"])

    def __repr__(self) -> str:
        optimizer = "" if self.optimizer.plain else f"{self.optimizer}, "
        return (
            f"TrainingProgram({self.model['name']}, {len(self.sites)} sites, {self.estimator}, "
            f"{optimizer}methods={', '.join(self._methods)})"
        )

    @property
    def captured(self) -> Ir:
        """The model and its loss as they were captured, with the adapter as inputs; not to be changed."""
        return self._captured

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods; `logits` is absent if the model returns only a loss."""
        return tuple(self._methods)

    @property
    def flops(self) -> Flops:
        """FLOPs of one step, split into computed once and computed per group."""
        return count_flops(self._methods["step"], self.estimator.groups)

    def text(self, method: str = "step", *, facts: bool = False, sources: bool = False) -> str:
        """Return one method's readable graph, which `parse` reads back; raises `InputError` for an unknown method.

        With `facts`, comments also say what passes have noted: what is expanded, where the batch lies, whose noise.
        With `sources`, the line of the model stands above the nodes that come from it.
        """
        return to_text(self._ir(method), facts, sources)

    def diff(self, pass_name: str, *, width: int | None = None, everything: bool = False) -> str:
        """Return what a pass changed, one line a node: ``-`` before, ``+`` after, ``~`` another type only.

        Layers that changed as the one above did are counted; `everything` writes them out. Lines are cut to `width`
        characters if given. Raises `InputError` for an unknown pass.
        """
        for record in self.history:
            if record.name == pass_name:
                return graph_diff(record.before, record.after, pass_name, width=width, everything=everything)
        raise InputError(f"no pass '{pass_name}' ran; these did: {', '.join(r.name for r in self.history)}")

    def to_networkx(self) -> networkx.DiGraph:
        """Return the step program as a graph: attributes op, shape, dtype, origin, pass, expanded, flops."""
        from mobizo_passes.views.networkx_graph import to_networkx

        return to_networkx(self._methods["step"])

    def blocks(self, depth: int | None = None) -> networkx.DiGraph:
        """Return the step program at module level: one graph node per block, `depth` modules deep (None: all).

        Attributes: name, kind, computed ("once", "per group" or "both"), flops, expanded_flops, expanded_share, nodes,
        members, frontier, perturbed; see `mobizo_passes.views.blocks`.
        """
        from mobizo_passes.views.blocks import block_graph, block_tree

        return block_graph(block_tree(self._methods["step"]), depth)

    def draw(
        self, path: str | os.PathLike[str], *, beside: Any = None, data: Mapping[str, NodeData] | None = None
    ) -> Path:
        """Draw the step program, what is computed once and what once per group, and return the file.

        An .svg shows modules, repeated layers once. An .html is the explorer (docs/explorer.md), from modules to nodes.
        A .json is a graph for Google's Model Explorer, with files of node data beside it.

        Args:
            path: ends in .svg, .html or .json.
            beside: not for an .svg: a second program, a `lowering.Lowered`, or a graph as `to_networkx` gives.
            data: not for an .svg: more to color nodes by, title -> `NodeData`.

        Raises:
            InputError: another suffix, nothing that can stand beside, or data about nodes that the program has not.
            LayoutLibraryMissing: the package was built without the explorer's layout library.
        """
        from mobizo_passes.views.drawing import draw_program

        return draw_program(self, Path(path), beside, data)

    def show(
        self,
        depth: int | None = None,
        *,
        beside: Any = None,
        data: Mapping[str, NodeData] | None = None,
        height: int = 640,
    ) -> Frame:
        """Return the explorer for a notebook, which shows it where this is the last value of a cell.

        `depth` levels of modules are unfolded at first, None: what holds nearly everything. `height` is in pixels;
        `beside`, `data` and errors are those of `draw`. The page is stored with the notebook: 0.2 MB and more.
        """
        from mobizo_passes.views.drawing import page, title

        return Frame(page(self, beside, data, depth), height, title(self))

    def _repr_html_(self) -> str:
        from mobizo_passes.views.drawing import program_html

        return program_html(self)

    @functools.cached_property
    def exported_program(self) -> torch.export.ExportedProgram:
        """The readable step program (with `mobizo::` operators) as a valid `ExportedProgram`."""
        return self._methods["step"].to_exported_program(self._verifier)

    def internalized(self) -> torch.export.ExportedProgram:
        """The readable step with the adapter inside, as mutated buffers (the paper's form): a fresh one each time.

        ``internalized().module()`` takes batch, seed, lr and eps, returns loss, losses and projected gradients, and
        starts from the initial adapter; each call goes on from the one before, to the same bits as `step`.
        """
        return self._adapter_in(self._methods["step"], "internal").to_exported_program(self._verifier)

    def core(self, method: str, adapter: str = "external") -> torch.export.ExportedProgram:
        """Return one method in core ATen, for lowering.

        With `adapter` "internal" the step holds its adapter inside, as mutated buffers; the other methods are the same.
        Raises `InputError` for an unknown method or form.
        """
        return self.core_ir(method, adapter).to_exported_program(self._verifier)

    @neutral()
    def core_ir(self, method: str, adapter: str = "external") -> Ir:
        """Return one method's `Ir` after the last passes; see `core`."""
        ir = run_passes(self._ir(method).clone(), core())
        ir = self._adapter_in(ir, adapter) if method == "step" else ir
        if checking():
            CORE.check(ir, f"method '{method}' in core ATen", values=True)
        return ir

    def manifest(self, adapter: str = "external") -> dict[str, Any]:
        """Return the target-independent part of the manifest, as plain JSON values; `adapter` as for `core`."""
        step = self._adapter_in(self._methods["step"], adapter)
        return _manifest.describe(
            model=self.model,
            estimator=self.estimator.manifest(),
            optimizer=None if self.optimizer.plain else self.optimizer.manifest(),
            noise=self.noise,
            trainable=self.trainable,
            adapter=self._adapter,
            frozen=self._frozen,
            files=self.adapter_files,
            labels=self.labels,
            methods={**self._methods, "step": step},
            form=adapter,
        )

    def _adapter_in(self, step: Ir, form: str) -> Ir:
        if form not in ("external", "internal"):
            raise InputError(f"adapter must be 'external' or 'internal', found {form!r}")
        if form == "internal" and not (self.estimator.projected and self.optimizer.plain):
            raise InputError(
                f"adapter='internal' needs an adapter that its projected gradients alone tell: {self.estimator} with "
                f"{self.optimizer} has none; lower with adapter='external'"
            )
        return run_passes(step.clone(), internal(self._adapter)) if form == "internal" else step

    # State -------------------------------------------------------------------------------------------------------

    def initial_adapter(self) -> dict[str, Tensor]:
        """Return copies of the trainable tensors as they were at transform, FQN -> float32 tensor."""
        return {fqn: value.clone() for fqn, value in self._adapter.items()}

    def initial_optimizer(self) -> dict[str, Tensor]:
        """Return the optimizer's state before the first step, name -> tensor; empty for an optimizer without one."""
        return self.optimizer.state(self._adapter)

    def frozen_adapter(self) -> dict[str, Tensor]:
        """Return the tensors that are saved with the adapter and not trained, as every lora_A, FQN -> tensor."""
        return {fqn: value.clone() for fqn, value in self._frozen.items()}

    def frozen_state(self) -> dict[str, Tensor]:
        """Return the frozen weights that the step reads, FQN -> tensor (not copied)."""
        ir = self._methods["step"]
        return {role(n).name: ir.state[role(n).name] for n in ir.placeholders("parameter", "buffer")}

    # Running eagerly ---------------------------------------------------------------------------------------------

    @neutral()
    def step(
        self,
        adapter: Mapping[str, Tensor],
        example_inputs: Any,
        *,
        lr: float,
        seed: int | None = None,
        eps: float | None = None,
        optimizer: Mapping[str, Tensor] | None = None,
    ) -> StepResult:
        """Run one step eagerly; what is passed in is not changed.

        `example_inputs` has the structure and shapes of those given to `transform`; `optimizer` is the optimizer's
        state, at first `initial_optimizer`. A step of exact gradients takes neither seed nor epsilon, one of
        directional derivatives no epsilon. Raises `InputError` if an input, an adapter or state tensor, or the number
        of labels does not fit.
        """
        scalars = {"lr": torch.tensor([lr]), **drawn(self.estimator, seed, eps)}
        batch = self._labelled(example_inputs)
        state = self._state(optimizer)
        out = self._methods["step"].run({**self._named(adapter), **state, **batch, **scalars})
        new, after = ({name: out[name] for name in names} for names in (self._adapter, state))
        if not self.estimator.projected:
            return StepResult(out["loss"], out["loss"][None], torch.zeros(0), new, after)
        return StepResult(out["loss"], out["losses"], out["projected_gradients"], new, after)

    @neutral()
    def apply(
        self,
        adapter: Mapping[str, Tensor],
        *,
        seed: int,
        lr: float,
        projected_gradients: Tensor,
        optimizer: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the adapter after a step whose projected gradients, float32 [q], are known, without the model.

        The optimizer's new state, if it has one, is in the result too, by its names. Raises `InputError` for a program
        of exact gradients, which no few numbers tell.
        """
        if not self.estimator.projected:
            raise InputError(
                f"a program of {self.estimator} has no apply: its steps are not known from projected gradients; run "
                "step on the batch again, or keep the adapter"
            )
        inputs = {"seed": seed_tensor(seed), "lr": torch.tensor([lr]), "projected_gradients": projected_gradients}
        return self._methods["apply"].run({**self._named(adapter), **self._state(optimizer), **inputs})

    @neutral()
    def gradients(self, adapter: Mapping[str, Tensor], example_inputs: Any) -> dict[str, Tensor]:
        """Return the exact gradient of the loss in each adapter tensor, FQN -> tensor.

        Raises `InputError` for a program of another estimator than `Exact`.
        """
        if self._gradients is None:
            raise InputError(f"a program of {self.estimator} has no gradients; transform with estimator=mz.Exact()")
        batch = self._labelled(example_inputs)
        out = self._gradients.run({**self._named(adapter), **batch})
        return {fqn: out[fqn] for fqn in self._adapter}

    @neutral()
    def loss(self, adapter: Mapping[str, Tensor], example_inputs: Any) -> Tensor:
        """Return the unperturbed loss, float32 []."""
        batch = self._labelled(example_inputs)
        return self._methods["loss"].run({**self._named(adapter), **batch})["loss"].mean()

    @neutral()
    def logits(self, adapter: Mapping[str, Tensor], example_inputs: Any) -> Tensor:
        """Return the model's logits; raises `InputError` if the model returns only a loss."""
        return self._ir("logits").run({**self._named(adapter), **self._batch(example_inputs)})["logits"]

    def run(self, method: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one method eagerly on tensors by their names in the manifest; the adapter is always passed in.

        Raises `InputError` if there is no such method, or an input is missing or of another dtype or shape.
        """
        return self._ir(method).run(inputs)

    def example_batch(self) -> dict[str, Tensor]:
        """Return copies of the example inputs, by name."""
        return {name: value.clone() for name, value in self.inputs.tensors.items()}

    def _ir(self, method: str) -> Ir:
        if method not in self._methods:
            raise InputError(f"no method '{method}'; this program has {', '.join(self._methods)}")
        return self._methods[method]

    def _named(self, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
        missing, extra = set(self._adapter) - set(adapter), set(adapter) - set(self._adapter)
        if missing or extra:
            found = [f"missing {', '.join(sorted(missing))}"] if missing else []
            found += [f"unknown {', '.join(sorted(extra))}"] if extra else []
            raise InputError(f"the adapter does not fit the program: {'; '.join(found)}")
        return dict(adapter)

    def _state(self, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        expected = self.initial_optimizer()
        if given is None and expected:
            raise InputError(
                f"{self.optimizer} has a state: pass optimizer=, at first program.initial_optimizer(), then the "
                "`optimizer` of the step before"
            )
        given = given or {}
        if set(given) != set(expected):
            names = sorted(set(given) ^ set(expected))
            raise InputError(f"the optimizer's state does not fit the program: missing or unknown {', '.join(names)}")
        return dict(given)

    def _labelled(self, example_inputs: Any) -> dict[str, Tensor]:
        batch = self._batch(example_inputs)
        check_label_counts(self._captured, batch, self.labels.get("max_labels"))
        return batch

    def _batch(self, example_inputs: Any) -> dict[str, Tensor]:
        return bind_inputs(self.inputs, example_inputs)
