"""Errors of the lowering stage: each says what was expected, what was found and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class LoweringError(Exception):
    """Base of every error that `lowering` raises on purpose."""


class UnknownTarget(LoweringError):
    """The target name is not in the registry."""

    def __init__(self, target: str, known: Iterable[str]) -> None:
        self.target = target
        self.known = tuple(sorted(known))
        super().__init__(f"unknown target {target!r}: known targets are {', '.join(self.known)}")


class TargetNameTaken(LoweringError):
    """A target is registered under a name that another one has."""

    def __init__(self, target: str) -> None:
        self.target = target
        super().__init__(f"a target called {target!r} is registered already: give the new one a name of its own")


class OptionNameTaken(LoweringError):
    """A target is registered with an option that is called as a keyword that `lower` has for every target."""

    def __init__(self, option: str, target: str) -> None:
        self.option = option
        self.target = target
        super().__init__(
            f"target {target!r} has an option called {option!r}, which is a keyword of `lower` already: give the "
            "option another name"
        )


class UnknownOption(LoweringError):
    """A keyword of `lower` that the target does not understand."""

    def __init__(self, option: str, target: str, known: Iterable[str]) -> None:
        self.option = option
        self.target = target
        self.known = tuple(sorted(known))
        super().__init__(
            f"target {target!r} has no option {option!r}: its options are {', '.join(self.known)}; leave it out, or "
            "lower for another target"
        )


class InvalidOption(LoweringError):
    """A value that an option of the target does not have."""

    def __init__(self, option: str, value: object, target: str, choices: Iterable[str]) -> None:
        self.option = option
        self.value = value
        self.target = target
        self.choices = tuple(choices)
        super().__init__(
            f"{option}={value!r} is not possible for target {target!r}: expected one of {', '.join(self.choices)}"
        )


class TargetUnavailable(LoweringError):
    """The target is known, but something it needs is not installed here."""

    def __init__(self, target: str, missing: str, remedy: str) -> None:
        self.target = target
        self.missing = missing
        self.remedy = remedy
        super().__init__(f"target {target!r} cannot be used here: {missing}; {remedy}")


class InvalidCalibration(LoweringError):
    """The batches for measuring a quantized program's ranges, or its gradients, are missing, unwanted or do not fit
    the program."""

    def __init__(self, problem: str, argument: str = "calibration") -> None:
        self.problem = problem
        super().__init__(f"{argument}=: {problem}")


def _place(node: str, module: str, line: str) -> str:
    """A node with its module and source line, as far as they are known."""
    return f"node {node!r}" + (f" of module {module!r}" if module else "") + (f", {line}" if line else "")


class OperatorNotTaken(LoweringError):
    """An operator in the midst of the model that the target's delegate does not take: it would cut the model in two."""

    def __init__(self, method: str, node: str, operator: str, gives: str, module: str, line: str, reason: str) -> None:
        self.method = method
        self.node = node
        self.operator = operator
        super().__init__(
            f"method {method!r}: {operator} ({_place(node, module, line)}; gives {gives}) stands between matrix "
            f"products, and the delegate does not take it: {reason}; write that part of the model with other "
            "operators, or lower for target 'xnnpack' or 'portable'"
        )


class KernelMissing(LoweringError):
    """An operator that no delegate took, and for which ExecuTorch's runtime has no kernel of its own."""

    def __init__(self, method: str, node: str, operator: str, module: str, line: str) -> None:
        self.method = method
        self.node = node
        self.operator = operator
        super().__init__(
            f"method {method!r}: {operator} ({_place(node, module, line)}) is taken by no delegate of this target, and "
            "ExecuTorch's runtime has no kernel for it; write that part of the model with other operators"
        )


class InvalidProgram(LoweringError):
    """The program breaks the contract between the transform and the lowering stage."""


class LoweringFailed(LoweringError):
    """A stage of lowering failed; names the method, the stage and, where one is to blame, the node."""

    def __init__(self, method: str, stage: str, reason: str, node: str | None = None) -> None:
        self.method = method
        self.stage = stage
        self.node = node
        self.reason = reason
        at = f" at node {node!r}" if node else ""
        super().__init__(f"lowering of method {method!r} failed in {stage}{at}: {reason}")


class FrozenInput(LoweringError):
    """An input of a method (adapter, batch, ...) did not survive lowering as an input."""

    def __init__(self, method: str, name: str, detail: str) -> None:
        self.method = method
        self.name = name
        super().__init__(
            f"method {method!r}: input {name!r} is no longer an input of the lowered program ({detail}); "
            "a program lowered so would ignore what the driver passes; do not use it and report the model"
        )


class UnknownAdapterForm(LoweringError):
    """`adapter` is neither "external" nor "internal"."""

    def __init__(self, form: object) -> None:
        self.form = form
        super().__init__(
            f"adapter={form!r} is unknown: expected 'external' (passed in and returned) or 'internal' (held inside)"
        )


class WeightsStayInside(LoweringError):
    """The target's delegate keeps weights in a form of its own, so they can't be in a file outside of the program."""

    def __init__(self, target: str, able: Iterable[str]) -> None:
        self.target = target
        self.able = tuple(sorted(able))
        super().__init__(
            f"target {target!r} cannot have weights outside of the program: its delegate holds them in a form of its "
            f"own; leave external weights out, or lower for {' or '.join(self.able)}"
        )


class WeightsFileUnusable(LoweringError):
    """A weights file (.ptd) that a program cannot be lowered against."""

    def __init__(self, path: object, problem: str) -> None:
        self.path = path
        super().__init__(
            f"{path} {problem}: give the .ptd of a program that was lowered from the same model, for the same target "
            "and with external weights"
        )


class StateLost(LoweringError):
    """An adapter tensor inside the program did not survive lowering as a buffer: initialized, read and written."""

    def __init__(self, method: str, name: str, detail: str) -> None:
        self.method = method
        self.name = name
        super().__init__(
            f"method {method!r}: the adapter tensor {name!r} inside the program {detail}; a program lowered so would "
            "not train: lower with adapter='external', or for the portable target, and report the model"
        )


class MethodMismatch(LoweringError):
    """A lowered method's inputs or outputs differ from what the manifest promises."""

    def __init__(self, method: str, what: str, expected: object, found: object) -> None:
        self.method = method
        self.what = what
        self.expected = expected
        self.found = found
        super().__init__(
            f"method {method!r}: {what} differ: the manifest says {expected}, the lowered program has {found}"
        )


class RuleBroken(LoweringError):
    """A serialized delegate holds something that the target's runtime is known to get wrong."""

    def __init__(self, target: str, method: str, where: str, rule: str) -> None:
        self.target = target
        self.method = method
        self.where = where
        self.rule = rule
        super().__init__(
            f"method {method!r}: {where} breaks a rule of target {target!r}: {rule}; the program is withheld: "
            "lower for another target and report the model"
        )


class OutputNotOurs(LoweringError):
    """A name that a program's files need is taken by something that `lower` did not write, and does not replace."""

    def __init__(self, path: object, problem: str) -> None:
        self.path = path
        super().__init__(f"{path} {problem} and will not be replaced: move it away, or choose another name")


class NonFiniteExample(LoweringError):
    """The training program itself, run in eager PyTorch on its example inputs, gives a number that is not finite."""

    def __init__(self, method: str, output: str, count: int, total: int, *, lowering: bool = True) -> None:
        self.method = method
        self.output = output
        self.count = count
        self.total = total
        advice = (
            "or give transform other example inputs; check=False (--no-check) lowers it all the same"
            if lowering
            else "or check it on other inputs"
        )
        super().__init__(
            f"method {method!r}: in eager PyTorch, on the {'example ' if lowering else ''}inputs and before any "
            f"update, {count} of {total} values of output {output!r} are not finite, so it could not train: look for "
            f"examples without a label, masks without a place and numbers beyond the dtype's range, {advice}"
        )

    def in_a_test(self) -> NonFiniteExample:
        """The same, of inputs that a test chose."""
        return NonFiniteExample(self.method, self.output, self.count, self.total, lowering=False)


class SelfCheckFailed(LoweringError):
    """The lowered program does not give what its eager form gives: on the example inputs, and so it is withheld, or on
    those of a test (`lowering.testing.check_lowered`).

    `output` is None where the runtime failed, and `deviation` the largest absolute difference otherwise, at `place`.
    """

    def __init__(
        self,
        method: str,
        problem: str,
        output: str | None,
        deviation: float,
        place: tuple[int, ...] = (),
        *,
        lowering: bool = True,
    ) -> None:
        self.method = method
        self.problem = problem
        self.output = output
        self.deviation = deviation
        self.place = place
        remedy = "another target and report the model, or write the part at fault with other operators"
        super().__init__(
            f"method {method!r}, self-check on the example inputs: {problem}; the program is withheld: lower for "
            f"{remedy}; check=False (--no-check) skips this check"
            if lowering
            else f"method {method!r}, beside its eager form: {problem}; lower for {remedy}"
        )

    def in_a_test(self) -> SelfCheckFailed:
        """The same, of inputs that a test chose."""
        return SelfCheckFailed(self.method, self.problem, self.output, self.deviation, self.place, lowering=False)

    @classmethod
    def differs(
        cls,
        method: str,
        output: str,
        deviation: float,
        tolerance: float,
        place: tuple[int, ...],
        expected: Tensor,
        found: Tensor,
        beside: str,
    ) -> SelfCheckFailed:
        """An output that is further from what it is compared with than rounding explains."""
        at = f"[{', '.join(map(str, place))}]" if place else ""
        problem = (
            f"output {output!r} is {found[place].item():.9g} at {output}{at}, {beside} is "
            f"{expected[place].item():.9g}: {deviation:.3g} apart, where rounding explains {tolerance:.2g}"
        )
        return cls(method, problem, output, deviation, place)

    @classmethod
    def broke(cls, method: str, failure: str, log: Iterable[str]) -> SelfCheckFailed:
        """The runtime could not load or run the method."""
        said = "; ".join([failure, *list(log)[:3]])
        return cls(method, f"the runtime fails ({said})", None, float("inf"))
