// Bar of the page of timelines: zoom, position, legend. Runs after timeline.js and uses its names.
function unpick() {
  tip.hidden = true;
  if (picked.figure) { const figure = picked.figure; picked.figure = null; figure.drawOver(); }
}
let waiting = 0, later = 0;
function drawStale() {
  for (const figure of figures) if (figure.stale) { figure.draw(); figure.stale = false; }
}
function redraw() {
  if (waiting) return;
  waiting = requestAnimationFrame(() => { waiting = 0;
    clearTimeout(later);
    for (const figure of figures) {  // a figure out of sight is drawn when the movement ends
      const r = figure.element.getBoundingClientRect();
      figure.stale = r.bottom < 0 || r.top > innerHeight;
      if (!figure.stale) figure.draw();
    }
    later = setTimeout(drawStale, 80);
    const thumb = at("thumb"), span = view.to - view.from;
    thumb.style.width = 100 * span / full + "%";
    thumb.style.left = `min(${100 * view.from / full}%, calc(100% - 16px))`;
    const digits = Math.min(Math.max(0, 2 - Math.floor(Math.log10(span))), 9);
    at("window").textContent = `${view.from.toFixed(digits)} to ${view.to.toFixed(digits)}${unit}`;
  });
}
function showRange(from, span) {
  const least = Math.min(full, 2 * Math.min(...figures.map(figure => figure.mean)));
  span = Math.min(Math.max(span, least), full);
  view.from = Math.min(Math.max(from, 0), full - span); view.to = view.from + span;
  tip.hidden = true;
  redraw();
}
function zoomBy(factor, time) {
  const span = (view.to - view.from) / factor, share = (time - view.from) / (view.to - view.from);
  showRange(time - share * span, span);
}
function legend() {
  const used = new Set(), tracks = Math.max(...figures.map(figure => figure.tracks));
  const colours = palette(Math.min(tracks, 2));
  for (const figure of figures) for (const row of figure.rows) for (const kind of row.kind) used.add(kind);
  for (const item of [...at("legend").children]) {
    const kinds = item.dataset.kinds.split(" ").filter(Boolean).map(Number);
    if (kinds.length && !kinds.some(kind => used.has(kind))) { item.remove(); continue; }
    const pair = [colours[F][0], colours[used.has(PAIR) ? B : I][0]];
    const shown = item.firstChild.className ? pair : kinds.length ? colours[kinds[0]] : [ink.lane];
    item.firstChild.replaceChildren(...shown.map(colour => {
      const half = document.createElement("b");
      half.style.background = colour;
      return half;
    }));
  }
}
readInk();
const figures = data.timelines.map((t, i) => new Figure(at("figure-" + i), t));
legend();
const middle = () => (view.from + view.to) / 2;
at("in").addEventListener("click", () => zoomBy(2, middle()));
at("out").addEventListener("click", () => zoomBy(0.5, middle()));
at("whole").addEventListener("click", () => showRange(0, full));
const strip = at("strip");
let drag = null;
strip.addEventListener("pointerdown", e => {
  const r = strip.getBoundingClientRect(), time = (e.clientX - r.left) / r.width * full, span = view.to - view.from;
  drag = time >= view.from && time <= view.to ? time - view.from : span / 2;
  strip.setPointerCapture(e.pointerId); showRange(time - drag, span);
});
strip.addEventListener("pointermove", e => { if (drag === null) return;
  const r = strip.getBoundingClientRect();
  showRange((e.clientX - r.left) / r.width * full - drag, view.to - view.from);
});
for (const end of ["pointerup", "pointercancel"]) strip.addEventListener(end, () => { drag = null; });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readInk(); legend(); redraw(); });
addEventListener("scroll", drawStale, {passive: true});
new ResizeObserver(() => { figures.forEach(figure => figure.measure()); redraw(); }).observe(document.body);
