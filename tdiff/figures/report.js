"use strict";
// The report's behaviour: choosing nodes of the tree, its zoom, and the walk of a root draw through the leaves.
(() => {
  const id = (name) => document.getElementById(name);
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  document.documentElement.classList.add("js");

  // --- the tree ---

  const buttons = all(".node-button");
  const buttonOf = new Map(buttons.map((button) => [button.dataset.node, button]));
  const levels = new Map();
  for (const button of buttons) {
    const level = levels.get(button.dataset.depth) ?? [];
    levels.set(button.dataset.depth, [...level, button]);
  }

  function lineage(button) {
    const above = buttonOf.get(button.dataset.parent);
    return above ? [...lineage(above), button] : [button];
  }

  /** Makes a node the one that Tab reaches. */
  function reach(button) {
    for (const other of buttons) other.tabIndex = other === button ? 0 : -1;
  }

  function show(node, told = true) {
    const button = buttonOf.get(node);
    if (!button) return;
    const path = new Set(lineage(button));
    for (const other of buttons) {
      other.setAttribute("aria-expanded", String(other === button));
      other.classList.toggle("on-path", path.has(other));
      id(`branch-${other.dataset.node}`)?.classList.toggle("on-path", path.has(other));
      id(`node-${other.dataset.node}`).classList.toggle("open", other === button);
    }
    reach(button);
    if (told) id("said").textContent = `${button.getAttribute("aria-label")}. Shown in the panel.`;
  }

  function besides(button, step) {
    const level = levels.get(button.dataset.depth);
    return level[level.indexOf(button) + step];
  }

  const moves = {
    ArrowUp: (button) => buttonOf.get(button.dataset.parent),
    ArrowDown: (button) => buttonOf.get(button.dataset.left) ?? buttonOf.get(button.dataset.right),
    ArrowLeft: (button) => besides(button, -1),
    ArrowRight: (button) => besides(button, 1),
    Home: () => buttons[0],
    End: () => buttons[buttons.length - 1],
  };

  for (const button of buttons) {
    button.addEventListener("click", () => {
      show(button.dataset.node);
      history.replaceState(null, "", `#node-${button.dataset.node}`);
      const narrow = id("panel").offsetTop >= id("box").offsetTop + id("box").offsetHeight;
      if (narrow) id("panel").scrollIntoView({ block: "nearest" });
      else id("panel").scrollTop = 0;
    });
    button.addEventListener("keydown", (event) => {
      if (!(event.key in moves) || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      const target = moves[event.key](button);
      if (!target) return;
      reach(target);
      target.focus();
    });
  }

  function followHash() {
    const node = location.hash.match(/^#node-(\d+)$/)?.[1];
    if (!buttonOf.has(node)) return false;
    show(node);
    return true;
  }
  window.addEventListener("hashchange", () => {
    if (followHash()) id(location.hash.slice(1) + "-title").focus();
  });
  if (!followHash()) show(buttons[0].dataset.node, false);

  // --- its zoom ---

  const box = id("box");
  const space = id("space");
  const most = 2;
  let scale = 1;

  function fitting() {
    return Math.min(1.4, (box.clientWidth - 1) / Number(space.dataset.width));
  }
  function zoom(to) {
    const centre = (box.scrollLeft + box.clientWidth / 2) / scale;
    scale = Math.min(most, Math.max(Math.min(fitting(), 0.25), to));
    space.style.setProperty("--scale", scale);
    box.scrollLeft = centre * scale - box.clientWidth / 2;
  }
  id("smaller").addEventListener("click", () => zoom(scale / 1.25));
  id("larger").addEventListener("click", () => zoom(scale * 1.25));
  id("fit").addEventListener("click", () => zoom(fitting()));
  // What does not fit in legible letters scrolls, from the root's place on.
  zoom(Math.max(fitting(), 0.7));
  const root = buttons[0];
  box.scrollLeft = (root.offsetLeft + root.offsetWidth / 2) * scale - box.clientWidth / 2;

  // --- the same image in two places ---

  for (const copy of all("img[data-copy]")) {
    const original = id(copy.dataset.copy);
    for (const name of ["src", "width", "height"]) copy.setAttribute(name, original.getAttribute(name));
    copy.style.width = original.style.width;
  }

  // --- the walk ---

  const slider = id("leaf");
  if (slider) {
    const draws = all(".draw");
    const chosen = () => Number(document.querySelector("input[name=draw]:checked").value);

    function paint(canvas, image, leaf) {
      const tile = Number(image.dataset.tile);
      const step = tile + Number(image.dataset.gap);
      canvas.width = canvas.height = tile;
      const context = canvas.getContext("2d");
      context.imageSmoothingEnabled = false;
      context.drawImage(image, leaf * step, 0, tile, tile, 0, 0, tile, tile);
    }

    function walk() {
      const leaf = Number(slider.value);
      const draw = draws[chosen()];
      for (const other of draws) other.classList.toggle("open", other === draw);
      const share = all("li b", draw)[leaf].textContent;
      draw.querySelector(".rows").style.setProperty("--at", leaf);
      id("at").textContent = `leaf ${leaf} · ${share}`;
      slider.setAttribute("aria-valuetext", `leaf ${leaf}, probability ${share}`);
      for (const canvas of all("canvas[data-model]")) {
        const image = draw.querySelector(`img[data-model=${canvas.dataset.model}]`);
        canvas.setAttribute("aria-label", `${canvas.dataset.name}, draw ${chosen() + 1}, leaf ${leaf}`);
        if (image.complete) paint(canvas, image, leaf);
        else image.addEventListener("load", walk, { once: true });
      }
      const labels = all("li", draw);
      labels.forEach((label, k) => label.classList.toggle("at", k === leaf));
      const { offsetLeft: from, offsetWidth: width } = labels[leaf];
      draw.scrollLeft = Math.min(from, Math.max(from + width - draw.clientWidth, draw.scrollLeft));
    }

    slider.addEventListener("input", walk);
    for (const input of all("input[name=draw]")) input.addEventListener("change", walk);
    for (const draw of draws) {
      draw.addEventListener("click", (event) => {
        const rows = draw.querySelector(".rows").getBoundingClientRect();
        const leaf = Math.floor(((event.clientX - rows.left) / rows.width) * (Number(slider.max) + 1));
        slider.value = leaf;
        walk();
      });
    }
    walk();
  }

  // --- paper ---

  let closed = [];
  window.addEventListener("beforeprint", () => {
    closed = all("details:not([open])");
    for (const details of closed) details.open = true;
  });
  window.addEventListener("afterprint", () => {
    for (const details of closed) details.open = false;
  });
})();
