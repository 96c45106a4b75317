"use strict";
// Draws the figures, switches their views, and follows the reader's colour scheme. Colours are names that the style sheet knows.
(() => {
  const figures = JSON.parse(document.getElementById("figure-data").textContent);
  const root = document.documentElement;
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const config = { displayModeBar: false, displaylogo: false, responsive: true, showTips: false };
  const shown = {};

  function colour(name) {
    const [token, opacity] = name.slice(1).split("/");
    const value = getComputedStyle(root).getPropertyValue(`--${token}`).trim();
    if (opacity === undefined) return value;
    const [r, g, b] = [1, 3, 5].map((i) => parseInt(value.slice(i, i + 2), 16));
    return `rgba(${r},${g},${b},${opacity})`;
  }

  // Only what a key calls a colour is looked up, so that a layer named "@c0" keeps its name.
  function themed(value, isColour) {
    if (typeof value === "string") return isColour && value[0] === "@" ? colour(value) : value;
    if (Array.isArray(value)) return value.map((item) => themed(item, isColour));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item, /color/.test(key))]));
  }

  function draw(id, width) {
    const view = figures[id][shown[id] ?? 0];
    const layout = themed(view.layout, false);
    if (width) layout.width = width;
    const data = themed(view.data, false);
    key(id, data, layout);
    document.getElementById(`plot-${id}`).style.height = `${layout.height}px`;
    if (touch) layout.dragmode = false; // a finger scrolls the page
    return Plotly.react(document.getElementById(`plot-${id}`), data, layout, config);
  }

  // The key to the colours, as buttons that hide and show: plotly's own takes room from the plot.
  function key(id, data, layout) {
    const list = document.getElementById(`key-${id}`);
    list.replaceChildren();
    if (!layout.showlegend) return;
    layout.showlegend = false;
    const plot = document.getElementById(`plot-${id}`);
    for (const trace of data.filter((one) => one.showlegend !== false)) {
      const button = document.createElement("button");
      const swatch = document.createElement("span");
      swatch.className = "swatch";
      const colour = trace.line?.color ?? trace.marker.color, [ink, gap] = { dash: [4, 3], dot: [2, 2] }[trace.line?.dash] ?? [1, 0];
      swatch.style.background = `repeating-linear-gradient(90deg, ${colour} 0 ${ink}px, transparent ${ink}px ${ink + gap}px)`;
      button.append(swatch, trace.meta);
      button.setAttribute("aria-pressed", "true");
      button.addEventListener("click", () => {
        const hide = button.getAttribute("aria-pressed") === "true";
        button.setAttribute("aria-pressed", String(!hide));
        const of = data.flatMap((one, i) => (one === trace || (trace.legendgroup && one.legendgroup === trace.legendgroup) ? [i] : []));
        Plotly.restyle(plot, { visible: !hide }, of);
      });
      list.append(button);
    }
  }

  const drawAll = (width) => Promise.all(Object.keys(figures).map((id) => draw(id, width)));

  for (const list of document.querySelectorAll("[role=tablist]")) {
    const tabs = [...list.querySelectorAll("[role=tab]")];
    const select = (chosen, focus) => {
      for (const tab of tabs) {
        tab.setAttribute("aria-selected", tab === chosen);
        tab.tabIndex = tab === chosen ? 0 : -1;
      }
      shown[list.dataset.figure] = tabs.indexOf(chosen);
      draw(list.dataset.figure);
      if (focus) chosen.focus();
    };
    tabs.forEach((tab, place) => {
      tab.addEventListener("click", () => select(tab));
      tab.addEventListener("keydown", (event) => {
        const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (by) select(tabs[(place + by + tabs.length) % tabs.length], true);
      });
    });
  }

  scheme.addEventListener("change", () => drawAll());

  // Paper is light and narrow, and shows what is folded.
  let unfolded = [];
  addEventListener("beforeprint", () => {
    root.dataset.paper = "";
    unfolded = [...document.querySelectorAll("details:not([open])")];
    for (const details of unfolded) details.open = true;
    drawAll(660);
  });
  addEventListener("afterprint", () => {
    delete root.dataset.paper;
    for (const details of unfolded) details.open = false;
    drawAll();
  });

  drawAll().then(() => { root.dataset.drawn = ""; });
})();
