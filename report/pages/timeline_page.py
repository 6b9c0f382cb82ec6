"""The look of the page that `draw_html` writes, and the script of its bar: zoom, position, legend.

Plain strings, so that the page is one file that needs no network.
"""

STYLE = r"""
:root { color-scheme: light dark;
  --page: #ffffff; --lane: #eff1f4; --ink: #1b1f27; --soft: #5a6371; --line: #d5d9e0; --grid: #dfe3e9; --focus: #b0127b;
  --tip: #1b1f27; --tip-ink: #ffffff; --button: #f5f6f8; --thumb: #a4abb8; }
@media (prefers-color-scheme: dark) { :root {
  --page: #15181d; --lane: #262b33; --ink: #e8ebf0; --soft: #a3adbb; --line: #3a414c; --grid: #323943; --focus: #ff8ad8;
  --tip: #f3f5f8; --tip-ink: #15181d; --button: #20252c; --thumb: #667081; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px clamp(12px, 3vw, 40px) 48px; max-width: 1680px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
h1 { margin: 0; font-size: 22px; font-weight: 650; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 0; font-size: 16px; font-weight: 650; overflow-wrap: anywhere; }
p { margin: 4px 0 0; max-width: 110ch; overflow-wrap: anywhere; }
.soft, .facts span { color: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 16px; font-size: 13px; }
.legend span { display: inline-flex; align-items: center; gap: 6px; white-space: nowrap; }
.legend i { display: inline-flex; width: 30px; height: 16px; border-radius: 2px; overflow: hidden; }
.legend i.pair { flex-direction: column; } .legend b { flex: 1; }
.moves { position: sticky; top: 0; z-index: 2; display: flex; align-items: center; gap: 8px; margin-top: 8px;
  padding: 7px 0; background: var(--page); border-bottom: 1px solid var(--line); }
button { font: inherit; font-size: 13px; line-height: 1; min-width: 32px; height: 32px; padding: 0 10px;
  white-space: nowrap; color: var(--ink); background: var(--button); border: 1px solid var(--line); border-radius: 6px;
  cursor: pointer; }
button:hover { border-color: var(--soft); }
.strip { position: relative; flex: 1; height: 32px; cursor: pointer; touch-action: none; }
.strip::before, .strip i { content: ""; position: absolute; top: 12px; height: 8px; border-radius: 4px; }
.strip::before { left: 0; right: 0; background: var(--lane); }
.strip i { min-width: 16px; background: var(--thumb); }
.window { min-width: 11ch; text-align: right; font-size: 13px; color: var(--soft); font-variant-numeric: tabular-nums;
  white-space: nowrap; }
section { margin-top: 26px; }
.facts { display: flex; flex-wrap: wrap; gap: 0 20px; font-variant-numeric: tabular-nums; }
.facts b { font-weight: 650; }
.shade, .keys { font-size: 13px; } .keys { max-width: none; }
.figure { position: relative; margin-top: 8px; }
canvas { display: block; width: 100%; }
.figure canvas + canvas { position: absolute; inset: 0; cursor: crosshair; touch-action: pan-y; border-radius: 3px; }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 3px; }
.tip { position: absolute; z-index: 3; top: 0; left: 0; max-width: min(360px, 90vw); padding: 5px 9px;
  border-radius: 5px; background: var(--tip); color: var(--tip-ink); font-size: 13px; line-height: 1.4;
  pointer-events: none; }
.tip b { display: block; } .tip[hidden] { display: none; }
details { margin-top: 4px; font-size: 13px; } summary { color: var(--soft); cursor: pointer; width: max-content; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 2px 14px 2px 0; text-align: right; font-weight: 400; white-space: nowrap; }
.words th:first-child, .words th:nth-child(2), .words td:nth-child(2) { text-align: left; }
thead th { color: var(--soft); border-bottom: 1px solid var(--line); }
.spoken { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
@media (max-width: 600px) { body { padding-top: 16px; } h1 { font-size: 19px; } .keys { display: none; }
  .legend { gap: 2px 12px; } .window { min-width: 0; } }
@media print { .moves, .keys, details { display: none; } }
"""

CONTROLS = r"""
function forget() {
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
    for (const figure of figures) {  // what is out of sight can wait until the movement ends
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
function look(from, span) {
  const least = Math.min(full, 2 * Math.min(...figures.map(figure => figure.mean)));
  span = Math.min(Math.max(span, least), full);
  view.from = Math.min(Math.max(from, 0), full - span); view.to = view.from + span;
  tip.hidden = true;
  redraw();
}
function zoomBy(factor, time) {
  const span = (view.to - view.from) / factor, share = (time - view.from) / (view.to - view.from);
  look(time - share * span, span);
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
at("whole").addEventListener("click", () => look(0, full));
const strip = at("strip");
let drag = null;
strip.addEventListener("pointerdown", e => {
  const r = strip.getBoundingClientRect(), time = (e.clientX - r.left) / r.width * full, span = view.to - view.from;
  drag = time >= view.from && time <= view.to ? time - view.from : span / 2;
  strip.setPointerCapture(e.pointerId); look(time - drag, span);
});
strip.addEventListener("pointermove", e => { if (drag === null) return;
  const r = strip.getBoundingClientRect(); look((e.clientX - r.left) / r.width * full - drag, view.to - view.from); });
for (const end of ["pointerup", "pointercancel"]) strip.addEventListener(end, () => { drag = null; });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readInk(); legend(); redraw(); });
addEventListener("scroll", drawStale, {passive: true});
new ResizeObserver(() => { figures.forEach(figure => figure.measure()); redraw(); }).observe(document.body);
"""
