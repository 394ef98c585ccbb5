"""The explorer: one file with all of a program in it, driven in a real browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mobizo_passes as mz
from mobizo_passes.views.explorer import LayoutLibraryMissing, NodeData, layout_library
from tests.models import llama, llama_inputs

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SWITCHES = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "hide-scrollbars",
)  # fmt: skip
MODELS = ("llama-qv", "conv-head", "called-twice")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed (apt-get install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: it is in mobizo[test]")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in (*SWITCHES, f"user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)) as driver:
        yield driver


@pytest.fixture
def page(browser: Any, compiled: Any, tmp_path: Path) -> Iterator[Any]:
    """Open a model's page in the browser; at the end, it has said nothing on its console."""

    def opened(name: str, wide: int = 1600, **options: Any) -> Any:
        path = compiled(name)[0].draw(tmp_path / "step.html", **options)
        screen = {"width": wide, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.get(path.as_uri())
        return browser

    yield opened
    assert browser.get_log("browser") == []


def read(path: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)
    assert found
    return json.loads(found[1])


def expanded(data: dict[str, Any], ranges: list[int]) -> list[str]:
    pairs = zip(ranges[::2], ranges[1::2], strict=True)
    return [data["lines"][first + i] for first, count in pairs for i in range(count)]


def unpadded(text: str) -> list[str]:
    return [re.sub(r" {2,}# ", "  # ", line) for line in text.splitlines() if line]


def select(browser: Any, name: str) -> None:
    browser.execute_script("app.goTo(app.active, app.active.graph.nodes.get(arguments[0]))", name)


def press(browser: Any, *keys: str) -> None:
    from selenium.webdriver import Keys

    for key in keys:
        browser.switch_to.active_element.send_keys(getattr(Keys, key, key))


def test_the_page_holds_the_program_and_every_stage_of_it_and_loads_nothing(compiled: Any, tmp_path: Path) -> None:
    program, _, _ = compiled("llama-qv")
    path = program.draw(tmp_path / "step.html")
    text = path.read_text("utf-8")
    assert not re.search(r"<(link|img|iframe)\b|\bsrc=|@import|url\((?!#)|fetch\(", text)
    assert set(re.findall(r"https?://[^\s\"<)]+", text)) == {"http://www.w3.org/2000/svg"}
    assert str(Path(__file__).parents[2]) not in text
    data = read(path)
    assert expanded(data, data["graphs"][0]["lines"]) == unpadded(str(program))
    for record, shown in zip(program.history, data["passes"], strict=True):
        assert (record.name, record.rewrites) == (shown["name"], shown["rewrites"])
        assert expanded(data, data["stages"][shown["before"]]) == unpadded(record.before)
        assert expanded(data, data["stages"][shown["after"]]) == unpadded(record.after)
        assert shown["doc"].strip()
    site = next(node for node in program.to_networkx() if node.startswith("mp_lora"))
    stack = data["sources"]["stacks"][data["sources"]["of"][site]]
    assert re.match(r"tests/models\.py:\d+ in forward: |peft/", data["sources"]["frames"][stack[0]])
    assert path.read_bytes() == program.draw(tmp_path / "again.html").read_bytes()


def test_data_and_graphs_that_do_not_fit_are_refused(compiled: Any, tmp_path: Path) -> None:
    program, _, _ = compiled("mlp")
    path = tmp_path / "step.html"
    for options, message in (
        ({"data": {"ms": NodeData({"nowhere": 1.0})}}, "data 'ms' names 1 nodes that the program has not, such as 'no"),
        ({"beside": 3}, "beside must be a training program, a lowered program or a networkx.DiGraph, found int"),
    ):
        with pytest.raises(mz.InputError, match=message):
            program.draw(path, **options)
    with pytest.raises(mz.InputError, match=r"belong to an \.html or \.json drawing, found 'step\.svg'"):
        program.draw(tmp_path / "step.svg", beside=program)
    with pytest.raises(mz.InputError, match="combine must be 'sum' or 'max', found 'mean'"):
        NodeData({}, combine="mean")
    with pytest.raises(mz.InputError, match="numbers or words, found both"):
        NodeData({"a": 1, "b": "x"})


def test_a_missing_layout_library_says_how_to_get_it(compiled: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(layout_library, "FOLDER", tmp_path / "vendor")
    with pytest.raises(LayoutLibraryMissing, match=r"python -m mobizo_passes\.views\.explorer\.layout_library"):
        compiled("mlp")[0].draw(tmp_path / "step.html")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(layout_library.LibraryUnavailable, match=r"npm, which is not on the PATH"):
        layout_library.fetch()
    (tmp_path / "dagre.tgz").write_bytes(b"something else")
    with pytest.raises(layout_library.LibraryUnavailable, match=r"has the hash sha512-.* expected sha512-"):
        layout_library._unpack(tmp_path / "dagre.tgz")


# Boxes that overlap others, or stand outside of the one around them.
MISPLACED = """
const found = [];
const apart = (a, b) => a.x + a.w <= b.x || b.x + b.w <= a.x || a.y + a.h <= b.y || b.y + b.h <= a.y;
const within = (a, b) => a.x >= b.x && a.y >= b.y && a.x + a.w <= b.x + b.w + .1 && a.y + a.h <= b.y + b.h + .1;
const box = block => ({ id: block.id, ...app.active.drawn.get(block), w: block.w, h: block.h });
for (const block of app.active.drawn.keys()) {
  const boxes = app.active.isOpen(block) ? block.children.map(box) : [];
  boxes.forEach((a, i) => {
    if (!within(a, box(block))) found.push(a.id);
    for (const b of boxes.slice(i + 1)) if (!apart(a, b)) found.push(`${a.id} ${b.id}`);
  });
}
return found;
"""
# Blocks whose children can't be put in an order in which every edge leads forward.
CIRCLES = """
const found = [];
for (const block of walk(app.active.root)) {
  const before = block.children.map(() => 0);
  for (const { to } of block.edges) before[to] += 1;
  const ready = [...before.keys()].filter(each => !before[each]);
  for (const next of ready)
    for (const { from, to } of block.edges) if (from === next && !(before[to] -= 1)) ready.push(to);
  if (ready.length < block.children.length) found.push(block.id);
}
return found;
"""
# Controls that are not wholly inside of the window.
CUT_OFF = """
const boxes = [...document.querySelectorAll("header button, header input, header select")].map(
  each => each.getBoundingClientRect());
return boxes.filter(each => each.width && (each.left < 0 || each.right > innerWidth)).length;
"""
UNFOLD_ALL = "const all = app.active.root; app.toggle(app.active, all, true); app.toggle(app.active, all, true)"
MARKED = """
return app.panes.map(
  pane => [...pane.graph.nodes.values()].filter(each => each.mark === arguments[0]).map(each => each.op));
"""


@pytest.mark.parametrize("name", MODELS)
def test_it_is_whole_at_every_width_and_unfolded_down_to_nodes(page: Any, name: str) -> None:
    for wide in (360, 1024, 1600):
        browser = page(name, wide)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= wide
        assert browser.execute_script(CUT_OFF) == 0
    browser.execute_script(UNFOLD_ALL)
    assert browser.execute_script(MISPLACED) == []
    assert browser.execute_script(CIRCLES) == []
    shown, nodes = browser.execute_script(
        "return [[...app.active.drawn.keys()].filter(each => each.node).length, app.active.root.members.length]"
    )
    assert shown == nodes > 0


def test_clicks_keys_and_search_lead_from_modules_to_nodes(page: Any) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    browser = page("llama-qv")
    details = browser.find_element(By.ID, "details")
    folded = browser.find_element(By.CSS_SELECTOR, '.block[data-id$="/layers.0"]')
    ActionChains(browser).double_click(folded.find_element(By.TAG_NAME, "text")).perform()
    assert browser.find_elements(By.CSS_SELECTOR, '.block[data-id$="/layers.0/self_attn"]')
    row = browser.find_element(By.CSS_SELECTOR, '[role=treeitem][data-id$="/layers.0"]')
    assert row.get_attribute("aria-expanded") == row.get_attribute("aria-selected") == "true"

    press(browser, "/")
    press(browser, "op:mp_lora layers.1.self_attn.v", "ENTER")
    assert "mobizo.mp_lora" in details.text
    assert "self_attn.v_proj.lora_B" in details.text
    assert "tests/models.py" in details.text or "peft/tuners/lora/layer.py" in details.text
    assert len(browser.find_elements(By.CSS_SELECTOR, ".is-match")) == 1
    assert browser.find_elements(By.CSS_SELECTOR, ".is-input")

    weight = browser.execute_script(
        "return [...app.active.graph.nodes.values()].find(each => each.kind === 'adapter').name"
    )
    select(browser, weight)
    on_path = "return [...app.active.path].map(each => each.name)"
    path = browser.execute_script(on_path)
    loss = browser.execute_script("return app.active.graph.loss.name")
    assert path[0] == weight
    assert loss in path
    assert browser.find_elements(By.CSS_SELECTOR, ".edge.is-path")

    browser.find_element(By.CSS_SELECTOR, "[role=treeitem][tabindex='0']").send_keys("")
    browser.execute_script("document.querySelector('[role=treeitem]').focus()")
    press(browser, "HOME", "ARROW_RIGHT", "ARROW_DOWN")
    focused = browser.switch_to.active_element
    assert focused.get_attribute("aria-selected") == "true"
    press(browser, "t")
    assert browser.execute_script("return getComputedStyle(document.documentElement).colorScheme") == "dark"
    select(browser, "model_layers_0_input_layernorm_weight")
    assert browser.find_elements(By.CSS_SELECTOR, ".node.parameter.is-selected")
    press(browser, "w")
    assert not browser.find_elements(By.CSS_SELECTOR, ".node.parameter")
    press(browser, "?")
    assert browser.find_element(By.ID, "keys").is_displayed()


def test_thirty_layers_are_one_file_that_is_searched_and_unfolded(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOBIZO_CHECK", raising=False)  # it would take most of the time
    program = mz.transform(llama(layers=30), llama_inputs(), estimator=mz.TwoSided(queries=2))
    path = program.draw(tmp_path / "step.html")
    assert path.stat().st_size <= 3e6
    browser.get(path.as_uri())
    assert browser.execute_script("return document.documentElement.dataset.ready")
    shown = browser.execute_script("return [...app.active.drawn.keys()].map(each => each.note)")
    assert "28 alike" in shown, "the first and the last layer read and give other things"
    press(browser, "/")
    press(browser, "op:mp_lora layers.17.self_attn.q", "ENTER")
    selected = browser.execute_script("return app.active.selected.node.module")
    assert "layers.17.self_attn.q_proj" in selected
    assert browser.execute_script(MISPLACED) == []
    assert browser.get_log("browser") == []


def test_a_notebook_shows_it_to_a_depth(browser: Any, compiled: Any, tmp_path: Path) -> None:
    program = compiled("llama-qv")[0]
    for depth, shown in ((0, 0), (1, 1), (3, 3)):
        cell = tmp_path / f"{depth}.html"
        cell.write_text(f"<!DOCTYPE html><body>{program.show(depth=depth)._repr_html_()}</body>", encoding="utf-8")
        browser.get(cell.as_uri())
        browser.switch_to.frame(0)
        depths = browser.execute_script("return [...app.active.drawn.keys()].map(each => each.depth)")
        assert max(depths) == max(shown, 1)
    assert browser.get_log("browser") == []


def test_passes_are_seen_before_and_after(page: Any, compiled: Any) -> None:
    from selenium.webdriver.common.by import By

    browser = page("llama-qv")
    browser.find_element(By.XPATH, "//button[text()='Passes']").click()
    names = [record.name for record in compiled("llama-qv")[0].history]
    assert [row.text.split()[0] for row in browser.find_elements(By.CSS_SELECTOR, ".passes li")] == names
    browser.find_element(By.ID, f"pass-{names.index('insert-mp-lora')}").click()
    details = browser.find_element(By.ID, "details").text
    assert "MP-LoRA" in details
    assert "BEFORE" in details
    assert browser.execute_script(MARKED, "removed") == [["aten.linear"] * 4, []]
    assert browser.execute_script(MARKED, "added")[1].count("mobizo.mp_lora") == 4
    press(browser, "]")
    assert browser.execute_script("return app.mode.pass") == names.index("insert-mp-lora") + 1


def test_two_programs_side_by_side_are_selected_and_unfolded_together(page: Any, compiled: Any, lowered: Any) -> None:
    other, _, _ = compiled("llama-qv", estimator=mz.OneSided(queries=2))
    browser = page("llama-qv", beside=other, data={"ms": NodeData({"mp_lora": 2.5}, "ms", "sum")})
    select(browser, "mp_lora_1")
    both = browser.execute_script("return app.panes.map(pane => [pane.graph.name, pane.selected.node.name])")
    assert [name for _, name in both] == ["mp_lora_1", "mp_lora_1"]
    assert "OneSided" in both[1][0]
    seen = "return app.panes[0].overlays.map(each => each.name)"
    assert browser.execute_script(seen) == ["computed", "FLOPs", "bytes of values", "made by", "ms"]

    browser = page("llama-qv", beside=lowered)
    browser.execute_script("app.active = app.panes[1]")
    select(browser, "topk")
    details = browser.execute_script("return document.getElementById('details').innerText")
    assert "not delegated" in details
    assert "dtype: no int64 kernels" in details
