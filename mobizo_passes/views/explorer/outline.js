// The drawing as an ARIA tree: everything that the picture shows, for keyboards and screen readers.

class Outline {
  constructor(element, app) {
    this.element = element;
    this.app = app;
    element.addEventListener("keydown", event => this.key(event));
    element.addEventListener("click", event => {
      const item = event.target.closest("[role=treeitem]");
      if (!item) return;
      const block = this.pane.root.withId(item.dataset.id);
      if (event.target.closest(".twist")) app.toggle(this.pane, block, event.shiftKey);
      else app.select(this.pane, block, true);
    });
  }

  get pane() {
    return this.app.active;
  }

  draw() {
    const focused = this.element.contains(document.activeElement);
    const chosen = this.pane.selected;
    this.element.replaceChildren(...this.items(this.pane.root, 1));
    const current = this.item(chosen) ?? this.element.firstElementChild;
    if (current) current.tabIndex = 0;
    if (focused) current?.focus({ preventScroll: true });
    if (current && chosen) current.firstElementChild.scrollIntoView({ block: "nearest" });
  }

  items(block, level) {
    return block.children.map((child, index) => {
      const item = document.createElement("li");
      item.setAttribute("role", "treeitem");
      item.setAttribute("aria-level", level);
      item.setAttribute("aria-setsize", block.children.length);
      item.setAttribute("aria-posinset", index + 1);
      item.setAttribute("aria-selected", child === this.pane.selected);
      item.tabIndex = -1;
      item.dataset.id = child.id;
      const row = document.createElement("span");
      row.className = "row";
      const twist = document.createElement("span");
      twist.className = "twist";
      twist.setAttribute("aria-hidden", "true");
      const name = document.createElement("span");
      name.className = "label";
      name.textContent = child.node ? nodeLabel(child.node, child) : child.label;
      const note = document.createElement("span");
      note.className = "note";
      note.textContent = child.node ? child.node.type : [child.note, child.members.length].filter(each => each).join(" · ");
      row.append(twist, name, " ", note);
      item.append(row);
      item.setAttribute("aria-label", describe(child));
      if (!child.node) {
        const open = this.pane.isOpen(child);
        item.setAttribute("aria-expanded", open);
        twist.textContent = open ? "▾" : "▸";
        if (open) {
          const group = document.createElement("ul");
          group.setAttribute("role", "group");
          group.append(...this.items(child, level + 1));
          item.append(group);
        }
      }
      return item;
    });
  }

  item(block) {
    return block ? this.element.querySelector(`[data-id="${CSS.escape(block.id)}"]`) : null;
  }

  key(event) {
    const items = [...this.element.querySelectorAll("[role=treeitem]")];
    const at = items.indexOf(document.activeElement);
    const item = items[at];
    if (!item || event.ctrlKey || event.metaKey || event.altKey) return;
    const block = this.pane.root.withId(item.dataset.id);
    const open = item.getAttribute("aria-expanded");
    const go = target => target && this.app.select(this.pane, this.pane.root.withId(target.dataset.id), true);
    const keys = {
      ArrowDown: () => go(items[at + 1]),
      ArrowUp: () => go(items[at - 1]),
      Home: () => go(items[0]),
      End: () => go(items.at(-1)),
      ArrowRight: () => open === "false" ? this.app.toggle(this.pane, block) : open === "true" && go(items[at + 1]),
      ArrowLeft: () => open === "true" ? this.app.toggle(this.pane, block) : go(item.parentElement.closest("[role=treeitem]")),
      Enter: () => !block.node ? this.app.toggle(this.pane, block) : this.app.select(this.pane, block, true),
      " ": () => this.app.select(this.pane, block, true),
    };
    if (!keys[event.key]) return;
    event.preventDefault();
    event.stopPropagation();
    keys[event.key]();
  }
}

// What a screen reader says of a block.
function describe(block) {
  const { node } = block;
  if (!node) return `${block.label}, ${block.note ? `${block.note}, ` : ""}${block.members.length} nodes`;
  const count = (list, word) => `${list.length} ${word}${list.length === 1 ? "" : "s"}`;
  return `${nodeLabel(node, block)}, ${node.name}, ${node.type}, ${count(node.inputs, "input")}, ${count(node.users, "user")}`;
}
