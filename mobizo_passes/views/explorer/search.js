// Find modules, operators, nodes and passes; `op:`, `pass:`, `module:`, `type:` and `name:` search one of them.

const SHOWN = 40;

function searchable(node) {
  return {
    op: node.op, pass: node.pass || (node.kind === "call" ? "capture" : ""), module: node.module || node.path.join("."), type: node.type,
    name: `${node.name} ${node.fqn}`, role: node.kind,
  };
}

function find(pane, text) {
  const words = text.toLowerCase().split(/\s+/).filter(each => each && !each.endsWith(":"));
  if (!words.length) return { nodes: [], blocks: [] };
  const tests = words.map(word => {
    const [, field, rest] = /^(op|pass|module|type|name|role):(.+)$/.exec(word) ?? [];
    return fields => field ? fields[field].toLowerCase().includes(rest) : Object.values(fields).some(each => each.toLowerCase().includes(word));
  });
  const nodes = [...pane.graph.nodes.values()].filter(node => {
    const fields = searchable(node);
    return tests.every(test => test(fields));
  });
  const blocks = [...walk(pane.root)].filter(block => !block.node && block !== pane.root
    && words.every(word => `${block.fqn} ${block.label}`.toLowerCase().includes(word.replace(/^module:/, ""))
      && block.label.toLowerCase().includes(words.at(-1).replace(/^module:/, ""))));
  return { nodes, blocks };
}

class Search {
  constructor(input, list, app) {
    Object.assign(this, { input, list, app, at: -1, targets: [] });
    input.addEventListener("input", () => this.update());
    input.addEventListener("focus", () => this.update());
    input.addEventListener("blur", () => setTimeout(() => this.close(), 200));
    input.addEventListener("keydown", event => this.key(event));
  }

  update() {
    const pane = this.app.active;
    const { nodes, blocks } = find(pane, this.input.value);
    for (const each of this.app.panes) {
      each.matches = new Set(each === pane ? nodes : find(each, this.input.value).nodes);
      each.mark();
    }
    this.targets = [...blocks, ...nodes].slice(0, SHOWN);
    this.at = -1;
    this.list.replaceChildren(...this.targets.map((target, index) => make("li", {
      role: "option", id: `match-${index}`, "aria-selected": false, onmousedown: event => { event.preventDefault(); this.choose(index); },
    }, make("b", {}, target.children ? target.label : target.name), " ",
      make("small", {}, target.children ? `module · ${target.members.length} nodes · ${target.fqn}` : `${target.op} · ${target.module || target.path.join(".")}`))));
    const all = nodes.length + blocks.length;
    const typed = this.input.value.trim() !== "";
    if (all > SHOWN) this.list.append(make("li", { class: "more" }, `and ${all - SHOWN} more`));
    if (typed && !all) this.list.append(make("li", { class: "more" }, "nothing found"));
    this.list.hidden = !typed;
    this.input.setAttribute("aria-expanded", typed);
    if (typed) this.app.say(`${blocks.length} modules and ${nodes.length} nodes found`);
  }

  choose(index) {
    const target = this.targets[index];
    if (!target) return;
    this.mark(index);
    if (target.children) this.app.select(this.app.active, this.app.active.find(target.id), true);
    else this.app.goTo(this.app.active, target);
  }

  mark(index) {
    this.at = index;
    [...this.list.children].forEach((each, place) => each.setAttribute("aria-selected", place === index));
    this.list.children[index]?.scrollIntoView({ block: "nearest" });
    this.input.setAttribute("aria-activedescendant", `match-${index}`);
  }

  key(event) {
    event.stopPropagation();
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step && this.targets.length) {
      event.preventDefault();
      if (this.list.hidden) this.list.hidden = false;
      this.mark((this.at + step + this.targets.length) % this.targets.length);
    } else if (event.key === "Enter" && this.targets.length) {
      // Again and again: from one match to the next.
      event.preventDefault();
      this.choose(this.list.hidden ? (this.at + 1) % this.targets.length : Math.max(this.at, 0));
      this.close();
    } else if (event.key === "Escape") {
      if (this.list.hidden) this.input.value = "";
      this.update();
      this.close();
    }
  }

  close() {
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", false);
  }
}
