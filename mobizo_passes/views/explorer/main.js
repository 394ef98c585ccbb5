// The page: which graphs are shown, what is selected, and the keys.

const KEYS = [
  ["/", "search"], ["f", "fit the drawing to the window"], ["+  −", "zoom"], ["arrow keys", "move the drawing; in the outline: from row to row"],
  ["Enter", "fold or unfold what is selected"], ["Shift Enter", "with all that is inside"], ["0", "fold everything back"],
  ["p", "path from what is selected to the loss"], ["[  ]", "previous and next pass"], ["w", "show frozen weights as nodes"],
  ["o  d", "outline, details"], ["t", "light or dark"], ["Esc", "select nothing"],
];
const byId = id => document.getElementById(id);

class App {
  constructor(data) {
    this.data = data;
    this.options = {
      weights: false, depth: data.depth, onSelect: (pane, block) => this.select(pane, block), onToggle: (pane, block, deep) => this.toggle(pane, block, deep),
    };
    this.graphs = data.graphs.map(each => this.graph(each.name, each.lines, each));
    this.stages = new Map();
    this.details = byId("details");
    this.overlay = "";
    this.changes = [];
    this.panes = [];
    this.outline = new Outline(byId("outline"), this);
    this.search = new Search(byId("search"), byId("matches"), this);
    byId("title").textContent = data.title;
    this.modes = [{ kind: "program", label: "Program" }];
    if (data.passes.length) this.modes.push({ kind: "passes", label: "Passes", pass: 0 });
    this.graphs.slice(1).forEach((graph, index) => this.modes.push({ kind: "beside", label: `Beside ${graph.name}`, index: index + 1 }));
    for (const mode of this.modes)
      byId("modes").append(make("button", { onclick: () => this.enter(mode), "aria-pressed": false }, mode.label));
    this.wire();
    if (innerWidth < 1000) this.side("details", false);
    // In a notebook's cell the drawing comes first.
    if (innerWidth < (window === top ? 800 : 1000)) this.side("outline-side", false);
    this.enter(this.modes.find(each => each.kind === "beside") ?? this.modes[0]);
    this.fromAddress();
  }

  graph(name, ranges, extra) {
    const lines = [];
    for (let at = 0; at < ranges.length; at += 2)
      for (let i = 0; i < ranges[at + 1]; i += 1) lines.push(this.data.lines[ranges[at] + i]);
    const graph = new Graph(name, lines, extra);
    const { frames, stacks, of } = this.data.sources;
    graph.sourceOf = node => (stacks[of[node.name] ?? -1] ?? []).map(each => frames[each]);
    return graph;
  }

  stage(index) {
    if (!this.stages.has(index)) this.stages.set(index, this.graph("", this.data.stages[index]));
    return this.stages.get(index);
  }

  enter(mode) {
    this.mode = mode;
    [...byId("modes").children].forEach((each, index) => each.setAttribute("aria-pressed", this.modes[index] === mode));
    if (mode.kind === "passes") {
      this.showPass(mode.pass);
      return;
    }
    this.changes = [];
    this.show(mode.kind === "beside" ? [this.graphs[0], this.graphs[mode.index]] : [this.graphs[0]]);
  }

  show(graphs) {
    const kept = this.active?.selected;
    const key = kept?.node?.name ?? kept?.id;
    this.panes = graphs.map(graph => {
      graph.pane ??= new Pane(graph, this.options);
      graph.pane.overlays = (graph.extra.overlays ?? []).map(each => new Overlay(each, graph));
      graph.pane.path = new Set();
      return graph.pane;
    });
    byId("panes").replaceChildren(...this.panes.map(each => each.element));
    byId("panes").classList.toggle("single", this.panes.length === 1);
    this.active = this.mode.kind === "passes" ? this.panes.at(-1) : this.panes[0];
    if (this.mode.kind === "passes") openChanges(this.panes, this.changes);
    this.listOverlays();
    for (const pane of this.panes) {
      pane.diff = this.mode.kind === "passes";
      pane.selected = key ? pane.find(key) : null;
      this.paint(pane);
      pane.fit();
    }
    if (this.mode.kind === "passes") showChange(this.panes);
    this.refresh();
  }

  showPass(index) {
    const { passes } = this.data;
    if (index < 0 || index >= passes.length) return;
    this.mode.pass = index;
    const one = passes[index];
    // Fresh graphs: what is marked and open belongs to this pass alone.
    const before = this.graph(`before ${one.name}`, this.data.stages[one.before]);
    const after = this.graph(`after ${one.name}`, this.data.stages[one.after]);
    this.changes = compareStages(before, after);
    this.show(this.changes.length ? [before, after] : [after]);
    this.say(`${one.name}: ${this.changes.length} nodes differ`);
  }

  // A drawing that has no such data, as a lowered program of what is computed once, shows its own first.
  paint(pane) {
    pane.overlay = pane.overlays.find(each => each.name === this.overlay) ?? pane.overlays[0] ?? null;
    pane.redraw();
  }

  listOverlays() {
    const names = [...new Set(this.panes.flatMap(pane => pane.overlays.map(each => each.name)))];
    if (!names.includes(this.overlay)) this.overlay = names[0] ?? "";
    byId("overlay").replaceChildren(...names.map(each => new Option(each, each, false, each === this.overlay)));
    byId("overlay").parentElement.hidden = !names.length;
  }

  select(pane, block, center = false) {
    this.active = pane;
    pane.path = new Set();
    pane.selected = block;
    if (block) {
      pane.reveal(block);
      // A parameter is selected for what it does to the loss.
      if (block.node && block.node.kind !== "call") this.showPath(pane, block.node, false);
      if (center) pane.center(block);
    }
    for (const other of this.panes) if (other !== pane) this.follow(pane, other, block);
    this.say(block ? describe(block) : "nothing selected");
    this.refresh();
  }

  // The same node or module in the other drawing.
  follow(pane, other, block) {
    other.path = new Set();
    other.selected = block ? counterpart(block, pane, other) : null;
    if (other.selected) {
      other.reveal(other.selected);
      other.center(other.selected);
    }
    other.mark();
  }

  goTo(pane, node) {
    if (WEIGHTS.has(node.kind) && !this.options.weights) this.showWeights(true);
    this.select(pane, pane.find(node.name), true);
  }

  showPath(pane, node, refresh = true) {
    const { loss } = pane.graph;
    pane.path = loss ? pane.graph.between(node, loss) : new Set();
    if (pane.path.size < 2) pane.path = new Set();
    this.say(pane.path.size ? `${pane.path.size} nodes between %${node.name} and the loss` : `the loss does not depend on %${node.name}`);
    if (refresh) this.refresh();
  }

  toggle(pane, block, deep = false) {
    this.active = pane;
    pane.toggle(block, deep);
    for (const other of this.panes) {
      const same = other === pane ? null : counterpart(block, pane, other);
      if (same && !same.node && pane.isOpen(block) !== other.isOpen(same)) other.toggle(same, deep);
    }
    this.say(`${block.label} ${pane.isOpen(block) ? "unfolded" : "folded"}`);
    this.refresh();
  }

  refresh() {
    for (const pane of this.panes) {
      pane.element.classList.toggle("active", pane === this.active && this.panes.length > 1);
      pane.mark();
    }
    this.outline.draw();
    showDetails(this);
    showLegend(byId("legend"), this.mode.kind === "passes" ? null : [...new Map(this.panes.map(each => [each.overlay?.name, each.overlay])).values()]);
  }

  say(text) {
    byId("status").textContent = text;
  }

  side(id, on = document.body.classList.contains(`no-${id}`)) {
    document.body.classList.toggle(`no-${id}`, !on);
    byId(id === "details" ? "toggle-details" : "toggle-outline").setAttribute("aria-pressed", on);
  }

  showWeights(on) {
    this.options.weights = on;
    byId("weights").setAttribute("aria-pressed", on);
    for (const pane of this.panes) {
      pane.rebuild();
      pane.draw();
    }
    this.refresh();
  }

  foldAll() {
    for (const pane of this.panes) {
      pane.openFirst();
      pane.redraw();
      pane.fit();
    }
    this.refresh();
  }

  theme() {
    const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  }

  // `step.html#linear_3` opens on that node.
  fromAddress() {
    const name = decodeURIComponent(location.hash.slice(1));
    const node = this.active.graph.nodes.get(name);
    if (node) this.goTo(this.active, node);
  }

  help() {
    byId("keys").replaceChildren(make("h2", { id: "keys-title" }, "Keys"),
      facts(KEYS), make("form", { method: "dialog" }, make("button", {}, "Close")));
    byId("keys").showModal();
  }

  wire() {
    const each = action => () => this.panes.forEach(action);
    const actions = {
      fit: each(pane => pane.fit()), "zoom-in": each(pane => pane.zoom(1.3)), "zoom-out": each(pane => pane.zoom(1 / 1.3)),
      fold: () => this.foldAll(), weights: () => this.showWeights(!this.options.weights), theme: () => this.theme(), help: () => this.help(),
      "toggle-outline": () => this.side("outline-side"), "toggle-details": () => this.side("details"),
    };
    for (const [id, action] of Object.entries(actions)) byId(id).addEventListener("click", action);
    byId("overlay").addEventListener("change", event => {
      this.overlay = event.target.value;
      this.panes.forEach(pane => this.paint(pane));
      this.refresh();
    });
    addEventListener("hashchange", () => this.fromAddress());
    addEventListener("keydown", event => this.key(event, actions));
  }

  key(event, actions) {
    const busy = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) || byId("keys").open;
    if (busy || event.ctrlKey || event.metaKey || event.altKey) return;
    const pane = this.active, chosen = pane.selected;
    const keys = {
      "/": () => byId("search").focus(), f: actions.fit, "+": actions["zoom-in"], "=": actions["zoom-in"], "-": actions["zoom-out"],
      0: actions.fold, w: actions.weights, t: actions.theme, "?": actions.help, o: actions["toggle-outline"], d: actions["toggle-details"],
      ArrowLeft: () => pane.pan(60, 0), ArrowRight: () => pane.pan(-60, 0), ArrowUp: () => pane.pan(0, 60), ArrowDown: () => pane.pan(0, -60),
      Escape: () => this.select(pane, null), p: () => chosen?.node && this.showPath(pane, chosen.node),
      "[": () => this.mode.kind === "passes" && this.showPass(this.mode.pass - 1),
      "]": () => this.mode.kind === "passes" && this.showPass(this.mode.pass + 1),
      Enter: () => event.target.tagName !== "BUTTON" && chosen && !chosen.node && this.toggle(pane, chosen, event.shiftKey),
    };
    if (!keys[event.key] || (event.key === "Enter" && event.target.tagName === "BUTTON")) return;
    event.preventDefault();
    keys[event.key]();
  }
}

// By name; where names differ, as before and after lowering, by module, operator and order.
function counterpart(block, pane, other) {
  const { node } = block;
  if (node) {
    const same = other.graph.nodes.get(node.name) ?? orderedNodes(other.graph).get(orderedKeys(pane.graph).get(node));
    return (same && other.root.of(same)) ?? (block.parent.parent ? counterpart(block.parent, pane, other) : null);
  }
  return other.root.withId(block.id) ?? [...walk(other.root)].find(each => !each.node && each.fqn && each.fqn === block.fqn) ?? null;
}

function orderedKeys(graph) {
  if (!graph.keys) {
    const counts = new Map();
    graph.keys = new Map();
    for (const node of graph.nodes.values()) {
      const kind = `${node.path.join(".")} ${node.label.replace(/_copy$/, "")}`;
      counts.set(kind, (counts.get(kind) ?? 0) + 1);
      graph.keys.set(node, `${kind} ${counts.get(kind)}`);
    }
  }
  return graph.keys;
}

function orderedNodes(graph) {
  graph.byKey ??= new Map([...orderedKeys(graph)].map(([node, key]) => [key, node]));
  return graph.byKey;
}

const app = new App(JSON.parse(byId("data").textContent));
document.documentElement.dataset.ready = `${Math.round(performance.now())}`;
