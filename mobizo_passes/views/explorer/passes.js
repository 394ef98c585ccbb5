// Stepping through the passes: the program before and after each, what changed, and what the pass says of itself.

const DIFF_LINES = 200;

// What a pass did to nodes, by their names: a node keeps its name when a pass changes it.
function compareStages(before, after) {
  const lines = [];
  for (const node of before.nodes.values()) node.mark = "";
  for (const node of after.nodes.values()) {
    const old = before.nodes.get(node.name);
    node.mark = !old ? "added" : old.line !== node.line ? "changed" : "";
    if (old) old.mark = node.mark;
    if (node.mark === "added") lines.push({ sign: "+", node, text: node.line });
    else if (node.mark) lines.push({ sign: "~", node, text: changedText(old.line, node.line) });
  }
  for (const node of before.nodes.values())
    if (!after.nodes.has(node.name)) {
      node.mark = "removed";
      lines.push({ sign: "−", node, text: node.line });
    }
  return lines.sort((a, b) => a.node.place - b.node.place);
}

function changedText(old, now) {
  const [, name, was, rest] = /^(%[\w.]+): (.*?) = (.*)$/s.exec(old);
  const [, , is, other] = /^(%[\w.]+): (.*?) = (.*)$/s.exec(now);
  return rest === other ? `${name}: ${was} → ${is} = ${other}` : `${old}\n  → ${now}`;
}

// Open what changed first, in all drawings alike, and no more than can be looked at.
function openChanges(panes, changes, most = 60) {
  const seen = new Set();
  let shown = 0;
  for (const { node } of changes) {
    // One of several layers that changed alike is enough.
    const kind = `${node.path.map(each => each.replace(/\.\d+$/, ".*")).join(".")} ${node.op} ${node.mark}`;
    if (seen.has(kind) || shown >= most) continue;
    seen.add(kind);
    const block = panes.map(pane => pane.root.of(node)).find(each => each);
    for (let each = block?.parent; each; each = each.parent) {
      if (panes.every(pane => pane.open.has(each.id))) continue;
      shown += each.children.length;
      panes.forEach(pane => pane.open.add(each.id));
    }
  }
}

// Put the first change in view, and beside it what stands at its place in the other drawing.
function showChange(panes) {
  const last = panes.at(-1);
  const [first] = [...last.drawn.keys()].filter(block => !last.isOpen(block) && block.members.some(node => node.mark));
  for (const pane of panes) {
    const block = first && (pane === last ? first : counterpart(first, last, pane));
    if (block && pane.drawn.has(block)) pane.putAt(block);
  }
}

function passDetails(app) {
  const { passes } = app.data;
  const at = app.mode.pass;
  const one = passes[at];
  const list = make("ol", { class: "passes", role: "listbox", "aria-label": "Passes", tabindex: "0" });
  passes.forEach((each, index) => list.append(make("li", {
    role: "option", id: `pass-${index}`, "aria-selected": index === at, onclick: () => app.showPass(index),
  }, make("span", {}, each.name), make("small", {}, `${each.rewrites}`))));
  list.setAttribute("aria-activedescendant", `pass-${at}`);
  list.addEventListener("keydown", event => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    app.showPass(at + step);
    app.details.querySelector(".passes").focus();
  });
  const counts = ["−", "~", "+"].map(sign => app.changes.filter(each => each.sign === sign).length);
  const diff = make("div", { class: "diff" });
  for (const { sign, node, text } of app.changes.slice(0, DIFF_LINES)) {
    const pane = app.panes[sign === "−" ? 0 : app.panes.length - 1];
    diff.append(make("button", { class: { "−": "removed", "+": "added", "~": "changed" }[sign],
      onclick: () => app.goTo(pane, node) }, `${sign} ${text}`));
  }
  if (app.changes.length > DIFF_LINES) diff.append(make("p", {}, `and ${app.changes.length - DIFF_LINES} more`));
  return [
    make("div", { class: "stepper" },
      make("button", { title: "Previous pass ([)", onclick: () => app.showPass(at - 1), ...(at ? {} : { disabled: "" }) }, "◂ Previous"),
      make("span", {}, `pass ${at + 1} of ${passes.length}`),
      make("button", { title: "Next pass (])", onclick: () => app.showPass(at + 1), ...(at < passes.length - 1 ? {} : { disabled: "" }) }, "Next ▸")),
    list,
    make("h2", {}, one.name),
    make("p", {}, `${one.rewrites} rewrites: ${counts[0]} nodes removed, ${counts[1]} changed, ${counts[2]} added.`),
    one.doc ? make("pre", { class: "doc" }, one.doc) : null,
    make("details", app.changes.length < 60 ? { open: "" } : {}, make("summary", {}, "Line by line"), diff),
  ].filter(each => each);
}
