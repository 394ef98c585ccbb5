"""The picture of a step program: a legible SVG that says what is computed once."""

from __future__ import annotations

import itertools
from pathlib import Path
from xml.etree import ElementTree

import pytest

import mobizo_passes as mz
from mobizo_passes.views.blocks import block_tree
from mobizo_passes.views.picture.layout import Box, lay_out
from mobizo_passes.views.picture.svg import Picture
from mobizo_passes.views.picture.view import View, view_of
from tests.models import CASES
from tests.passes.test_diff import deep

NAMES = [case.name for case in CASES]
SVG = "{http://www.w3.org/2000/svg}"


def view(program: mz.TrainingProgram) -> View:
    return view_of(block_tree(program._methods["step"]))


def shown(program: mz.TrainingProgram, label: str) -> View:
    return next(each for each in view(program).walk() if each.label == label)


def drawn(program: mz.TrainingProgram, path: Path) -> ElementTree.Element:
    return ElementTree.fromstring(program.draw(path).read_text(encoding="utf-8"))


def words(root: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def inside(inner: Box, outer: Box) -> bool:
    return (
        outer.x <= inner.x
        and outer.y <= inner.y
        and inner.x + inner.w <= outer.x + outer.w + 0.01
        and inner.y + inner.h <= outer.y + outer.h + 0.01
    )


def apart(a: Box, b: Box) -> bool:
    return a.x + a.w <= b.x or b.x + b.w <= a.x or a.y + a.h <= b.y or b.y + b.h <= a.y


def every(box: Box) -> list[Box]:
    return [box, *(each for child in box.children for each in every(child))]


@pytest.mark.parametrize("name", NAMES)
def test_boxes_stand_inside_their_frames_and_apart(compiled, name: str) -> None:
    for box in every(lay_out(view(compiled(name)[0]))):
        assert all(inside(child, box) for child in box.children)
        assert all(apart(a, b) for a, b in itertools.combinations(box.children, 2))


@pytest.mark.parametrize("name", NAMES)
def test_arrows_lead_from_box_to_box_and_past_the_others(compiled, name: str) -> None:
    for box in every(lay_out(view(compiled(name)[0]))):
        for (a, b), path in zip(box.view.edges, box.paths, strict=True):
            assert all(p != q for p, q in itertools.pairwise(path))
            ends = [(path[0], box.children[a]), (path[-1], box.children[b])]
            for (x, y), end in ends:
                assert end.x - 0.01 <= x <= end.x + end.w + 0.01
                assert end.y - 0.01 <= y <= end.y + end.h + 0.01
            for other in {*range(len(box.children))} - {a, b}:
                c = box.children[other]
                # The corners of a path; between two of them it bends within the gap of two layers.
                assert not any(c.x < x < c.x + c.w and c.y < y < c.y + c.h for x, y in path)


@pytest.mark.parametrize("name", NAMES)
def test_the_drawing_is_a_document_within_its_bounds(compiled, name: str, tmp_path: Path) -> None:
    program, _, _ = compiled(name)
    root = drawn(program, tmp_path / "step.svg")
    _, _, wide, high = (float(v) for v in root.attrib["viewBox"].split())
    for rect in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(rect.attrib.get(key, 0)) for key in ("x", "y", "width", "height"))
        assert x >= 0
        assert y >= 0
        assert x + w <= wide
        assert y + h <= high
    texts = words(root)
    assert texts[0] or root.find(f"{SVG}title") is not None
    head = next(text for text in texts if "computed once" in text and "FLOP" in text)
    assert head.startswith(f"{program.estimator}: {program.estimator.groups} groups · {len(program.sites)} LoRA site")
    assert f"{program.flops.share_computed_once:.0%} of a forward" in head
    assert {"noise", "perturb", "projected gradients", "update", "the same z", "loss"} <= set(texts)


def test_a_branch_that_is_shared_looks_shared(compiled, tmp_path: Path) -> None:
    root = drawn(compiled("one-branch")[0], tmp_path / "step.svg")
    look = {}
    for group in root.iter(f"{SVG}g"):
        rects, texts = group.findall(f"{SVG}rect"), group.findall(f"{SVG}text")
        look[texts[0].text] = [rect.attrib.get("class") for rect in rects]
    assert look["plain"] == look["stem"] == ["once"]
    assert look["head"] == ["group"]
    # Its frozen map and lora_A are computed once, its lora_B per group.
    assert look["tuned"] == ["frame", "once", "once", "group"]
    assert look["⇉ expand × 8"] == ["expand"]


def test_a_lora_site_shows_its_factors(compiled) -> None:
    site = shown(compiled("mlp")[0], "first")
    assert site.shape == "site"
    assert [[chip.label for chip in row] for row in site.rows()] == [["weight"], ["squeeze", "widen"]]
    assert [chip.repeated for chip in site.chips] == [True, True, False]
    both = shown(compiled("llama-all-linear")[0], "q_proj")
    assert [[chip.label for chip in row] for row in both.rows()] == [["base"], ["A", "B"]]
    assert [chip.expanded for chip in both.chips] == [False, True, True]


def test_repeated_layers_are_drawn_once(tmp_path: Path) -> None:
    short, long = (drawn(deep(n, trained=4), tmp_path / f"{n}.svg") for n in (8, 30))
    assert len(words(short)) == len(words(long))
    assert "layers.0–25  × 26" in words(long)
    assert "layers.27–29" in words(long)
    assert "× 3 layers" in words(long)


def test_a_wrapper_around_all_layers_is_not_drawn(compiled) -> None:
    labels = [child.label for child in view(compiled("llama-qv")[0]).children]
    assert {"layers.0", "layers.1", "embed_tokens", "norm", "lm_head"} <= set(labels)
    assert "model" not in labels


def test_drawings_are_stable_and_hold_no_paths(tmp_path: Path) -> None:
    first, second = (deep(3).draw(tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    assert str(tmp_path).encode() not in first


def test_names_are_escaped(compiled) -> None:
    root = block_tree(compiled("mlp")[0]._methods["step"])
    picture = Picture(root, "A<B> & C", mz.TwoSided(queries=4), 2, 0.5)
    assert "A<B> & C: one training step" in words(ElementTree.fromstring(picture.svg))


@pytest.mark.parametrize("name", ["step.png", "step", "svg"])
def test_another_suffix_is_refused(compiled, tmp_path: Path, name: str) -> None:
    with pytest.raises(mz.InputError, match=rf"drawn as \.svg, \.html or \.json, found '{name}'"):
        compiled("mlp")[0].draw(tmp_path / name)
    assert not list(tmp_path.iterdir())
