// Colors: what is computed how often, FLOPs, bytes, delegates, or whatever data was given with the program.

const CATEGORY_COLORS = 9;

class Overlay {
  // `values` in the order of the graph's nodes: numbers, words or null.
  constructor(spec, graph) {
    this.name = spec.name;
    this.unit = spec.unit ?? "";
    this.combine = spec.combine ?? "max";
    this.values = new Map();
    [...graph.nodes.values()].forEach((node, index) => {
      const value = spec.values[index];
      if (value !== null && value !== undefined) this.values.set(node, value);
    });
    const all = [...this.values.values()];
    this.numeric = all.every(each => typeof each === "number");
    this.categories = this.numeric ? [] : [...new Set(all)];
    this.most = this.numeric ? all.reduce((most, each) => Math.max(most, Math.abs(each)), 0) : 0;
    this.total = this.numeric ? all.reduce((sum, each) => sum + each, 0) : 0;
  }

  // Of a block: one number, or how many nodes each category has.
  of(block) {
    const found = block.members.filter(node => this.values.has(node)).map(node => this.values.get(node));
    if (!this.numeric) {
      const counts = new Map();
      for (const each of found) counts.set(each, (counts.get(each) ?? 0) + 1);
      return counts;
    }
    if (!found.length) return null;
    return this.combine === "sum" ? found.reduce((sum, each) => sum + each, 0) : found.reduce((a, b) => Math.max(a, b));
  }

  color(value) {
    if (this.numeric) {
      const most = this.combine === "sum" ? this.total : this.most;
      const share = most && value !== null ? Math.sqrt(Math.abs(value) / most) : 0;
      return `color-mix(in srgb, var(--hot) ${Math.round(100 * Math.min(share, 1))}%, var(--box))`;
    }
    const fixed = { "once": "var(--once)", "per group": "var(--group)", "not delegated": "var(--bad)" }[value];
    return fixed ?? `var(--c${this.categories.indexOf(value) % CATEGORY_COLORS})`;
  }

  text(value) {
    if (value === null || value === undefined) return "";
    return typeof value === "number" ? quantity(value, this.unit) : `${value}`;
  }

  describe(block) {
    const value = this.of(block);
    if (value instanceof Map) {
      if (block.node) return [...value.keys()].join("");
      return [...value].map(([name, count]) => `${count} × ${name}`).join(", ");
    }
    if (value === null) return "";
    const share = this.combine === "sum" && this.total && !block.node ? ` (${percent(value / this.total)})` : "";
    return this.text(value) + share;
  }
}

// The colors of some overlays; of a comparison, if there are none.
function showLegend(element, overlays) {
  element.replaceChildren();
  const entry = (color, text) => {
    const item = document.createElement("span");
    const swatch = document.createElement("i");
    swatch.style.background = color;
    item.append(swatch, text);
    element.append(item);
  };
  if (!overlays) for (const each of ["removed", "added", "changed"]) entry(`var(--${each})`, each);
  for (const overlay of overlays ?? []) {
    if (!overlay) continue;
    const most = 8;
    if (overlay.numeric) {
      entry("var(--box)", `${overlay.name}: 0`);
      entry("var(--hot)", overlay.combine === "sum" ? `${overlay.text(overlay.total)}, all of it` : overlay.text(overlay.most));
    } else overlay.categories.slice(0, most).forEach(each => entry(overlay.color(each), clip(each, 60)));
    if (overlay.categories.length > most) element.append(`and ${overlay.categories.length - most} more`);
  }
}

function quantity(value, unit) {
  const large = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
  if (unit === "FLOP" || unit === "B") {
    const [scale, prefix] = large.find(each => Math.abs(value) >= each[0]) ?? [1, ""];
    return `${Number((value / scale).toPrecision(3))} ${prefix}${unit}`;
  }
  return `${Number(value.toPrecision(3))}${unit ? ` ${unit}` : ""}`;
}

function percent(share) {
  return share > 0 && share < 0.001 ? "<0.1 %" : `${(100 * share).toFixed(1)} %`;
}
