"""Weights outside of the program: which ones, in which file, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lowering
from lowering.executorch_compat.programs import rewritten
from lowering.executorch_compat.tags import is_tagged
from lowering.lowered import Lowered
from lowering.passes.values.fold_constants import FoldConstants
from lowering.passes.values.split_shared_weights import SplitSharedWeights
from lowering.passes.values.tag_weights import TagWeights
from lowering.targets import TARGETS
from tests.lowering.passkit import Fn, export, rewrite
from tests.lowering.small import Program

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))


def marked(program: torch.export.ExportedProgram) -> set[str]:
    """FQNs (or, for constants that passes made, names) of the marked placeholders."""
    targets = {spec.arg.name: str(spec.target) for spec in program.graph_signature.input_specs}
    return {targets[node.name] for node in program.graph.nodes if is_tagged(node)}


def weights(_, x):
    return x * _.weight + _.other


WEIGHT, OTHER = torch.rand(16), torch.rand(6, 1)


def test_weights_are_marked_and_the_numbers_stay():
    result = rewrite(Fn(weights, weight=WEIGHT, other=OTHER), (X,), TagWeights())
    assert result.rewrites == {"tag-weights": 2}
    assert marked(result.after) == {"weight", "other"}
    assert marked(result.before) == set()
    assert result.error == 0


def test_the_adapter_is_not_a_weight():
    result = rewrite(Fn(weights, weight=WEIGHT, other=OTHER), (X,), TagWeights(frozenset({"other"})))
    assert marked(result.after) == {"weight"}


def test_inputs_written_buffers_and_constants_of_the_compiler_are_not_weights():
    def counts(self, x):
        self.seen.add_(1)
        return x * torch.tensor([2.0, 3.0]).repeat(8) + self.seen

    program = export(Fn(counts, seen=torch.zeros(1)), (X,))
    assert program.constants
    assert program.graph_signature.buffers_to_mutate
    after, (record,) = rewritten(program, (TagWeights(),))
    assert (record.rewrites, marked(after)) == (0, set())


FOLDED = {
    "transposed": (lambda w, a: w.t(), True),
    "scaled": (lambda w, a: (w * 3).exp(), True),
    "larger": (lambda w, a: torch.cat([w, w * 2]), False),
    "cut": (lambda w, a: w[:4] * 1.5, False),
    "merged with the adapter": (lambda w, a: w + a, False),
}


@pytest.mark.parametrize("name", FOLDED)
def test_what_is_folded_from_weights_alone_is_one_if_it_is_as_large(name: str):
    fold, expected = FOLDED[name]
    model = Fn(lambda self, x: F.linear(x, fold(self.w, self.a)), w=torch.rand(16, 16), a=torch.rand(16, 16))
    result = rewrite(model, (X,), TagWeights(frozenset({"a"})), FoldConstants())
    assert result.rewrites["fold-constants"] == 1
    assert len(marked(result.after)) == expected


def test_the_copy_of_a_shared_weight_is_marked_as_the_weight_is():
    def tied(self, ids):
        return F.linear(F.embedding(ids, self.w), self.w)

    ids = torch.tensor([[1, 2]])
    for adapter, count in ((frozenset(), 2), (frozenset({"w"}), 0)):
        program = export(Fn(tied, w=torch.rand(8, 16)), (ids,))
        after, _ = rewritten(program, (TagWeights(adapter), SplitSharedWeights()))
        assert len(marked(after)) == count


@pytest.fixture(scope="module")
def program() -> Program:
    return Program()


@pytest.fixture(scope="module", params=["xnnpack", "portable"])
def lowered(request: pytest.FixtureRequest, program: Program) -> Lowered:
    return lowering.lower(program, target=request.param, external_weights=True)


@pytest.fixture(scope="module")
def saved(lowered: Lowered, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lowered.save(tmp_path_factory.mktemp("saved") / "model.pte")


def test_every_weight_is_in_the_weights_file_once_and_nowhere_else(program: Program, saved: Path):
    inside, outside = saved.read_bytes(), saved.with_suffix(".ptd").read_bytes()
    weights = {name: each.numpy().tobytes() for name, each in program.weights().items()}
    assert {name: (inside.count(each), outside.count(each)) for name, each in weights.items()} == dict.fromkeys(
        weights, (0, 1)
    )
    factors = [each.numpy().tobytes() for each in program.frozen_adapter().values()]
    assert [(each in inside, each in outside) for each in factors] == [(True, False)] * len(factors)


def test_the_manifest_has_the_file_s_hash_and_size(lowered: Lowered, saved: Path):
    spec = lowered.manifest.weights_file
    data = saved.with_suffix(".ptd").read_bytes()
    assert spec is not None
    assert (spec.file, spec.sha256, spec.bytes) == (None, hashlib.sha256(data).hexdigest(), len(data))
    assert sorted(path.name for path in saved.parent.iterdir()) == ["model.json", "model.ptd", "model.pte"]
    assert lowered.report.weights_file_bytes == len(data)
    assert "weights file 0.1 MB" in str(lowered.report)


@pytest.mark.parametrize("method", ["step", "apply", "loss", "logits"])
def test_methods_agree_with_eager(program: Program, saved: Path, method: str):
    from executorch.runtime import Runtime

    loaded = Runtime.get().load_program(saved, data_path=saved.with_suffix(".ptd")).load_method(method)
    assert loaded is not None
    found = loaded.execute(list(program.inputs(method).values()))
    for f, e in zip(found, program.expected(method), strict=True):
        tolerance = 2e-3 if method == "step" else 1e-5  # a projected gradient is a difference of losses over 2 eps
        assert float((f - e).abs().max()) <= tolerance * float(e.abs().max())


def test_the_same_program_has_the_same_identity_in_both_forms(program: Program, lowered: Lowered):
    """A journal of one form goes on in the other."""
    inside = lowering.lower(program, target=lowered.manifest.target)
    assert inside.manifest.program_id == lowered.manifest.program_id
    assert inside.manifest.weights_file is None


@pytest.mark.parametrize("there", [False, True])
def test_a_failed_save_leaves_the_folder_as_it_was(
    lowered: Lowered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
):
    if there:
        lowered.save(tmp_path / "model.pte")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(self, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(type(lowered.executorch), "write_to_file", fail)
    with pytest.raises(OSError, match="disk full"):
        lowered.save(tmp_path / "model.pte")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("target", ["vulkan", "qnn"])
def test_targets_that_hold_their_weights_inside_say_so(program: Program, target: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(TARGETS[target], "require", lambda: None)
    message = f"'{target}'.*lower for portable or xnnpack"
    with pytest.raises(lowering.WeightsStayInside, match=message):
        lowering.lower(program, target=target, external_weights=True)
    with pytest.raises(lowering.WeightsStayInside, match=message):
        lowering.lower(program, target=target, weights_file="base.ptd")


def test_unusable_weights_files_are_told_apart(program: Program, saved: Path, tmp_path: Path):
    whole, path = saved.with_suffix(".ptd").read_bytes(), tmp_path / "base.ptd"

    def refused(message: str) -> None:
        with pytest.raises(lowering.WeightsFileUnusable, match=message):
            lowering.lower(program, target="portable", weights_file=path)

    refused("cannot be read")
    path.write_bytes(saved.read_bytes())
    refused(r"is not a \.ptd file")
    path.write_bytes(whole[:30])
    refused(r"is not a \.ptd file")
    path.write_bytes(whole[:-1])
    refused("is truncated")


def test_a_file_with_none_of_the_weights_or_with_damaged_ones_is_refused(
    program: Program, lowered: Lowered, saved: Path, tmp_path: Path
):
    target, path = lowered.manifest.target, tmp_path / "base.ptd"
    other = Program(1)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.5).add_(0.1)
    lowering.lower(other, target=target, external_weights=True).save(tmp_path / "base.pte")
    with pytest.raises(lowering.WeightsFileUnusable, match="has none of this program's"):
        lowering.lower(program, target=target, weights_file=path)
    data = bytearray(saved.with_suffix(".ptd").read_bytes())
    data[data.index(program.model.state_dict()["blocks.0.up.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(lowering.WeightsFileUnusable, match="is damaged"):
        lowering.lower(program, target=target, weights_file=path)
