// Mouse, pen and fingers on a drawing: drag to pan, wheel or pinch to zoom, click to select, double click to unfold.

function listen(pane) {
  const { svg: surface } = pane;
  const fingers = new Map();
  let moved = 0;
  const place = event => {
    const box = surface.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  };
  surface.addEventListener("wheel", event => {
    event.preventDefault();
    const { x, y } = place(event);
    pane.zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), x, y);
  }, { passive: false });
  surface.addEventListener("pointerdown", event => {
    fingers.set(event.pointerId, place(event));
    moved = 0;
  });
  surface.addEventListener("pointermove", event => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    const now = place(event);
    moved += Math.abs(now.x - before.x) + Math.abs(now.y - before.y);
    // Only a real drag captures the pointer: a click must reach what is under it.
    if (moved > 4 && !surface.hasPointerCapture(event.pointerId)) surface.setPointerCapture(event.pointerId);
    const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
    if (other) {
      const span = Math.hypot(before.x - other.x, before.y - other.y);
      pane.zoom(Math.hypot(now.x - other.x, now.y - other.y) / Math.max(span, 1), (now.x + other.x) / 2, (now.y + other.y) / 2);
    } else pane.pan(now.x - before.x, now.y - before.y);
    fingers.set(event.pointerId, now);
  });
  for (const name of ["pointerup", "pointercancel", "pointerleave"])
    surface.addEventListener(name, event => fingers.delete(event.pointerId));
  surface.addEventListener("click", event => {
    if (moved > 4) return;
    const group = event.target.closest(".block");
    const block = group ? pane.root.withId(group.dataset.id) : null;
    pane.options.onSelect(pane, block);
    if (block && event.target.closest("[data-knob]")) pane.options.onToggle(pane, block, event.shiftKey);
  });
  surface.addEventListener("dblclick", event => {
    const block = pane.root.withId(event.target.closest(".block")?.dataset.id ?? "");
    if (block?.parent && !event.target.closest("[data-knob]")) pane.options.onToggle(pane, block, event.shiftKey);
  });
}
