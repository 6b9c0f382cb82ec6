"use strict";
// Draws each timeline of the page that `report/pages/timeline.py: draw_html` writes; its docstring describes the data.
// Canvas, because half a million boxes as elements of a page would stop a browser. Where boxes get too narrow, a column
// of pixels shows the share of each kind.
const data = JSON.parse(document.getElementById("data").textContent);
const F = 0, I = 1, W = 2, B = 3, PAIR = 4;  // 4 is a pair with a B, 5 a pair with an I
const NAMES = ["F", "I", "W", "B"], STACK = [F, B, I, W];
// First and last shade of each kind. Any two of the eight, and the idle lane of either theme, can be told apart with
// normal, protan, deutan and tritan sight (least distance in OKLab 0.09, after Machado's matrices).
const SHADES = [["#124b97", "#4475bc"], ["#b9a325", "#ecd96f"], ["#1fa395", "#84d6ca"], ["#8a3f1d", "#be5c29"]];
const NARROW = 1.5;  // pixels: boxes narrower than this on average are drawn as shares
const full = Math.max(...data.timelines.map(t => t.step), 0) || 1;
const view = {from: 0, to: full};
const picked = {figure: null, rank: 0, index: -1, part: 0, time: 0};
const unit = data.unit ? " " + data.unit : "";
const at = id => document.getElementById(id);
const tip = at("tip"), spoken = at("spoken");
let ink = {};

function readInk() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["page", "lane", "ink", "soft", "line", "grid", "focus"])
    ink[name] = style.getPropertyValue("--" + name).trim();
}
function channels(hex) { return [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16)); }
function mix(a, b, share) {
  const x = channels(a), y = channels(b);
  return "#" + x.map((v, i) => Math.round(v + (y[i] - v) * share).toString(16).padStart(2, "0")).join("");
}
function textOn(hex) {
  const [r, g, b] = channels(hex).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.2 ? "#14171c" : "#ffffff";
}
function palette(tracks) {  // [kind][track]; a lone track takes the last shade
  return SHADES.map(([a, b]) => Array.from({length: tracks}, (_, i) => mix(a, b, tracks > 1 ? i / (tracks - 1) : 1)));
}
function decode(t, rank) {
  const bytes = Uint8Array.from(atob(t.spans[rank]), c => c.charCodeAt(0)), n = t.actions[rank];
  const row = {n, kind: new Uint8Array(n), mb: [new Uint32Array(n), new Uint32Array(n)],
    chunk: [new Uint16Array(n), new Uint16Array(n)], start: new Float64Array(n), end: new Float64Array(n)};
  let place = 0, clock = 0;
  const next = new Map();
  const number = () => {
    let value = 0, scale = 1, byte;
    do { byte = bytes[place++]; value += (byte & 127) * scale; scale *= 128; } while (byte > 127);
    return value;
  };
  const signed = () => { const v = number(); return v % 2 ? -(v + 1) / 2 : v / 2; };
  const microbatch = (kind, chunk) => {  // written as the difference from the one that would follow
    const key = (kind === F ? 0 : kind === W ? 1 : 2) + 3 * chunk, value = (next.get(key) || 0) + signed();
    next.set(key, value + 1);
    return value;
  };
  for (let i = 0; i < n; i++) {
    const code = number(), kind = code % 6, rest = Math.floor(code / 6);
    row.kind[i] = kind;
    row.chunk[0][i] = rest % t.chunks;
    row.chunk[1][i] = Math.floor(rest / t.chunks);
    row.mb[0][i] = microbatch(kind >= PAIR ? F : kind, row.chunk[0][i]);
    if (kind >= PAIR) row.mb[1][i] = microbatch(B, row.chunk[1][i]);
    clock += signed();
    row.start[i] = clock * t.tick;
    clock += number();
    row.end[i] = clock * t.tick;
  }
  return row;
}
function partKind(row, i, part) {
  const kind = row.kind[i];
  return kind < PAIR ? kind : part === 0 ? F : kind === PAIR ? B : I;
}
function partCount(row, i) { return row.kind[i] < PAIR ? 1 : 2; }

class Figure {
  constructor(element, t) {
    this.element = element; this.t = t;
    [this.base, this.over] = element.querySelectorAll("canvas");
    this.rows = t.spans.map((_, rank) => decode(t, rank));
    const spans = t.actions.reduce((a, b) => a + b, 0);
    let busy = 0;
    for (const row of this.rows) for (let i = 0; i < row.n; i++) busy += row.end[i] - row.start[i];
    this.mean = busy / Math.max(spans, 1) || full;
    this.tracks = t.origins ? t.origins.length : t.chunks;
    this.origin = new Map();
    if (t.origins) this.rows.forEach((row, rank) => { for (let i = 0; i < row.n; i++)
      if (partKind(row, i, 0) === F && this.stage(rank, i, 0) === 0)
        this.origin.set(row.mb[0][i], t.origins.indexOf(rank)); });
    this.digits = String(this.rows.reduce((most, row) => row.mb[0].reduce((a, b) => Math.max(a, b), most), 0)).length;
    this.colours = palette(this.tracks);
    this.inks = this.colours.map(shades => shades.map(textOn));
    this.listen();
  }
  stage(rank, i, part) { return this.t.placement[rank][this.rows[rank].chunk[part][i]]; }
  track(rank, i, part) {
    const row = this.rows[rank];
    return this.t.origins ? this.origin.get(row.mb[part][i]) || 0 : row.chunk[part][i];
  }
  measure() {
    const ranks = this.rows.length, width = this.element.clientWidth, small = width < 620;
    this.small = small;
    this.left = small ? 30 : 64; this.right = small ? 88 : 150;
    this.plot = Math.max(width - this.left - this.right, 40);
    const roomy = ranks <= 8 ? 34 : ranks <= 16 ? 28 : ranks <= 32 ? 24 : 20;
    this.row = Math.max(3, Math.min(roomy, Math.floor(2600 / ranks)));
    this.top = 20;
    this.bottom = this.top + ranks * this.row;
    const height = this.bottom + 26, dpr = Math.min(window.devicePixelRatio || 1, 12000 / height);
    for (const canvas of [this.base, this.over]) {
      canvas.width = Math.round(width * dpr); canvas.height = Math.round(height * dpr);
      canvas.style.height = height + "px";
    }
    this.dpr = dpr; this.width = width; this.height = height;
  }
  x(time) { return this.left + (time - view.from) / (view.to - view.from) * this.plot; }
  time(x) { return view.from + (x - this.left) / this.plot * (view.to - view.from); }
  snap(x) { return Math.round(x * this.dpr) / this.dpr; }
  context(canvas) {
    const c = canvas.getContext("2d");
    c.setTransform(this.dpr, 0, 0, this.dpr, 0, 0);
    c.clearRect(0, 0, this.width, this.height);
    return c;
  }
  firstEndingAfter(row, time) {
    let low = 0, high = row.n;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (row.end[middle] > time) high = middle; else low = middle + 1;
    }
    return low;
  }
  get shares() { return this.mean / (view.to - view.from) * this.plot < NARROW; }
  draw() {
    const c = this.context(this.base), end = Math.min(this.x(this.t.step), this.left + this.plot), inset = this.inset;
    c.fillStyle = ink.lane;
    if (end > this.left) this.rows.forEach((_, rank) =>
      c.fillRect(this.left, this.top + rank * this.row + inset, end - this.left, this.row - 2 * inset));
    this.drawAxis(c);
    c.save();
    c.beginPath(); c.rect(this.left, 0, this.plot, this.bottom); c.clip();
    this.rows.forEach((row, rank) => this.shares ? this.drawShares(c, row, rank) : this.drawBoxes(c, row, rank));
    c.restore();
    this.drawLabels(c);
    this.drawOver();
  }
  get inset() { return this.row >= 12 ? 1.5 : this.row >= 6 ? 0.5 : 0; }
  // The rectangle of one action, or of one part of a pair: the forward above, the backward below.
  box(rank, i, part) {
    const row = this.rows[rank], x = this.snap(this.x(row.start[i])), end = this.snap(this.x(row.end[i]));
    const y = this.top + rank * this.row + this.inset, h = this.row - 2 * this.inset;
    const w = end - x > 4 ? end - x - 1 : end - x > 2 ? end - x - 0.5 : Math.max(end - x, 0.5);
    return partCount(row, i) === 1 ? [x, y, w, h] : [x, y + part * h / 2, w, h / 2];
  }
  drawBoxes(c, row, rank) {
    c.textAlign = "center"; c.textBaseline = "middle";
    for (let i = this.firstEndingAfter(row, view.from); i < row.n && row.start[i] < view.to; i++) {
      const parts = partCount(row, i);
      for (let part = 0; part < parts; part++) {
        const [x, y, w, h] = this.box(rank, i, part), kind = partKind(row, i, part), track = this.track(rank, i, part);
        c.fillStyle = this.colours[kind][track];
        c.fillRect(x, y, w, h);
        const size = Math.min(12, h - 1.5), number = String(row.mb[part][i]), letter = size * 0.62;
        if (size < 7.5 || w < number.length * letter + 2) continue;
        // A box that reaches out of the picture is labelled in the middle of its visible part.
        const from = Math.max(x, this.left), to = Math.min(x + w, this.left + this.plot);
        const label = w >= this.digits * letter + letter + 6 ? NAMES[kind] + number : number;
        if (to - from < label.length * letter) continue;
        c.fillStyle = this.inks[kind][track];
        c.font = `${size}px system-ui, sans-serif`;
        c.fillText(label, (from + to) / 2, y + h / 2 + 0.5);
      }
    }
  }
  // Fills each column with every kind's share of its time, forwards on top; what is left at the bottom is idle.
  drawShares(c, row, rank) {
    // A column holds several actions: with fewer of them neighbouring columns would flicker between kinds.
    const size = Math.max(2, Math.round(4 * this.mean / (view.to - view.from) * this.plot));
    const bins = Math.ceil(this.plot / size), shades = Math.min(this.tracks, 2), groups = 4 * shades;
    const sums = new Float64Array(bins * groups), scale = this.plot / (view.to - view.from) / size;
    for (let i = this.firstEndingAfter(row, view.from); i < row.n && row.start[i] < view.to; i++) {
      const from = Math.max((row.start[i] - view.from) * scale, 0);
      const to = Math.min((row.end[i] - view.from) * scale, bins);
      const parts = partCount(row, i);
      for (let part = 0; part < parts; part++) {
        const light = shades > 1 && this.track(rank, i, part) >= this.tracks / 2 ? 1 : 0;
        const group = partKind(row, i, part) * shades + light;
        for (let bin = Math.floor(from); bin < to; bin++)
          sums[bin * groups + group] += (Math.min(to, bin + 1) - Math.max(from, bin)) / parts;
      }
    }
    const top = this.top + rank * this.row + this.inset, height = this.row - 2 * this.inset;
    const reached = new Float64Array(bins);
    for (const kind of STACK) for (let shade = 0; shade < shades; shade++) {
      c.fillStyle = this.colours[kind][shade ? this.tracks - 1 : 0];
      for (let bin = 0; bin < bins; bin++) {
        const share = sums[bin * groups + kind * shades + shade];
        if (share > 0) {
          c.fillRect(this.left + bin * size, top + reached[bin] * height, size, share * height);
          reached[bin] += share;
        }
      }
    }
  }
  drawAxis(c) {
    const span = view.to - view.from, rough = span / Math.max(this.plot / 90, 2);
    const power = 10 ** Math.floor(Math.log10(rough)), step = [1, 2, 5, 10].find(m => m * power >= rough) * power;
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    c.font = "12px system-ui, sans-serif"; c.textBaseline = "top";
    for (let k = Math.ceil(view.from / step - 1e-9); k * step <= view.to * (1 + 1e-12); k++) {
      const x = this.snap(this.x(k * step));
      c.fillStyle = ink.grid; c.fillRect(x, this.top, 1, this.bottom - this.top + 4);
      c.fillStyle = ink.soft; c.textAlign = "center";
      c.fillText((k * step).toFixed(digits), x, this.bottom + 7);
    }
    c.fillStyle = ink.soft; c.textAlign = "right";
    c.fillText(data.unit || "time", this.width, this.bottom + 7);
  }
  drawLabels(c) {
    const every = Math.ceil(13 / this.row), size = Math.min(13, Math.max(10, this.row - 4));
    c.textBaseline = "middle"; c.fillStyle = ink.soft; c.font = "12px system-ui, sans-serif"; c.textAlign = "right";
    const peakAt = this.width, shareAt = this.width - (this.small ? 36 : 42), bubbleAt = shareAt - 54;
    if (this.shares) {
      c.textAlign = "left";
      const long = "Each column shows its kinds' shares of time; zoom in to see the actions";
      c.fillText(this.small ? "Shares of time; zoom in for boxes" : long, this.left, 9);
      c.textAlign = "right";
    }
    c.fillText("bubble", shareAt, 9); c.fillText("peak", peakAt, 9);
    c.font = `${size}px system-ui, sans-serif`;
    this.rows.forEach((_, rank) => {
      if (rank % every) return;
      const y = this.top + (rank + 0.5) * this.row + 0.5;
      c.fillStyle = ink.soft; c.textAlign = "right";
      c.fillText(this.small ? String(rank) : "rank " + rank, this.left - 8, y);
      c.fillStyle = ink.ink;
      if (!this.small) c.fillText(this.t.bubble[rank][0], bubbleAt, y);
      c.fillText(this.t.bubble[rank][1], shareAt, y);
      c.fillText(String(this.t.peak[rank]), peakAt, y);
    });
  }
  drawOver() {
    const c = this.context(this.over);
    if (picked.figure !== this || picked.index < 0) return;
    const row = this.rows[picked.rank], mb = row.mb[picked.part][picked.index];
    c.beginPath(); c.rect(this.left - 2, 0, this.plot + 4, this.bottom + 2); c.clip();
    c.lineWidth = 1.5; c.strokeStyle = ink.focus;
    if (!this.shares) this.rows.forEach((other, rank) => {  // the other actions of this micro-batch
      for (let i = this.firstEndingAfter(other, view.from); i < other.n && other.start[i] < view.to; i++)
        for (let part = 0; part < partCount(other, i); part++)
          if (other.mb[part][i] === mb) { const [x, y, w, h] = this.box(rank, i, part);
            c.strokeRect(x + 0.75, y + 0.75, Math.max(w - 1.5, 0), h - 1.5); }
    });
    const [x, y, w] = this.box(picked.rank, picked.index, 0);
    c.lineWidth = 3;
    c.strokeRect(x - 1, y - 1, w + 2, this.row - 2 * this.inset + 2);
  }
  // Sets `picked` to the action at a point, with index -1 where the rank is idle; false outside of the rows.
  pick(x, y) {
    const rank = Math.floor((y - this.top) / this.row), time = this.time(x);
    const inside = x >= this.left && x <= this.left + this.plot && time <= this.t.step;
    if (rank < 0 || rank >= this.rows.length || !inside) return false;
    const row = this.rows[rank], i = this.firstEndingAfter(row, time), hit = i < row.n && row.start[i] <= time;
    const below = (y - this.top) / this.row - rank >= 0.5;
    const part = hit && below ? partCount(row, i) - 1 : 0;
    Object.assign(picked, {figure: this, rank, time, index: hit ? i : -1, part});
    return true;
  }
  describe() {
    const {rank, index, time} = picked, row = this.rows[rank], number = t => t.toFixed(data.decimals);
    const times = (a, b) => `${number(a)} to ${number(b)}${unit}, ${number(b - a)}${unit} long`;
    if (index < 0) {
      const i = this.firstEndingAfter(row, time);
      return [`rank ${rank} idle`, times(i ? row.end[i - 1] : 0, i < row.n ? row.start[i] : this.t.step)];
    }
    const name = part => NAMES[partKind(row, index, part)] + row.mb[part][index] +
      ` of stage ${this.stage(rank, index, part)}`;
    const action = partCount(row, index) === 1 ? name(0) : `pair of ${name(0)} and ${name(1)}`;
    return [action, `rank ${rank}, ${times(row.start[index], row.end[index])}`];
  }
  showTip(x, y, aloud) {
    const [action, times] = this.describe();
    tip.replaceChildren(Object.assign(document.createElement("b"), {textContent: action}), times);
    tip.hidden = false;
    const frame = this.over.getBoundingClientRect(), room = document.documentElement.clientWidth;
    const left = Math.min(Math.max(frame.left + x - tip.offsetWidth / 2, 6), room - tip.offsetWidth - 6);
    const above = frame.top + y - tip.offsetHeight - 16, top = above > 4 ? above : frame.top + y + 22;
    tip.style.transform = `translate(${left + scrollX}px, ${top + scrollY}px)`;
    if (aloud) spoken.textContent = `${action}, ${times}`;
    figures.forEach(figure => figure.drawOver());
  }
  listen() {
    const over = this.over, down = new Map();
    let moved = false, grip = null;
    const place = e => { const r = over.getBoundingClientRect(); return [e.clientX - r.left, e.clientY - r.top]; };
    const show = e => { const [x, y] = place(e); if (this.pick(x, y)) this.showTip(x, y, false); else unpick(); };
    over.addEventListener("pointerdown", e => {
      down.set(e.pointerId, place(e)[0]); moved = down.size > 1; grip = {...view, xs: [...down.values()]};
      over.setPointerCapture(e.pointerId);
    });
    over.addEventListener("pointermove", e => {
      if (!down.has(e.pointerId)) { if (e.pointerType === "mouse") show(e); return; }
      down.set(e.pointerId, place(e)[0]);
      const xs = [...down.values()], span = grip.to - grip.from;
      if (xs.length === 1 && !moved && Math.abs(xs[0] - grip.xs[0]) < 4) return;
      moved = true; unpick();
      const centre = list => list.reduce((a, b) => a + b, 0) / list.length;
      const reach = list => list.length > 1 ? Math.max(Math.abs(list[1] - list[0]), 8) : 1;
      const zoom = reach(xs) / reach(grip.xs);
      const held = grip.from + (centre(grip.xs) - this.left) / this.plot * span;
      showRange(held - (centre(xs) - this.left) / this.plot * span / zoom, span / zoom);
    });
    const lift = e => {
      if (!down.delete(e.pointerId)) return;
      if (e.type === "pointerup" && !moved) show(e);
      grip = {...view, xs: [...down.values()]};
    };
    over.addEventListener("pointerup", lift); over.addEventListener("pointercancel", lift);
    over.addEventListener("pointerleave", e => { if (e.pointerType === "mouse") unpick(); });
    over.addEventListener("dblclick", e => zoomBy(4, this.time(place(e)[0])));
    over.addEventListener("wheel", e => {
      const sideways = Math.abs(e.deltaX) > Math.abs(e.deltaY) ? e.deltaX : e.shiftKey ? e.deltaY : 0;
      if (e.ctrlKey || e.metaKey) zoomBy(Math.exp(-e.deltaY * 0.004), this.time(place(e)[0]));
      else if (sideways) showRange(view.from + sideways / this.plot * (view.to - view.from), view.to - view.from);
      else return;
      e.preventDefault(); unpick();
    }, {passive: false});
    over.addEventListener("keydown", e => this.key(e));
    over.addEventListener("blur", unpick);
  }
  key(e) {
    const span = view.to - view.from;
    const steps = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    if (e.key === "+" || e.key === "=") zoomBy(2, this.centre()); else if (e.key === "-") zoomBy(0.5, this.centre());
    else if (e.key === "0") showRange(0, full);
    else if (e.key === "Escape") unpick();
    else if (e.key === "Home" || e.key === "End") showRange(e.key === "Home" ? 0 : full, span);
    else if (e.shiftKey && steps[e.key] && steps[e.key][1]) showRange(view.from + steps[e.key][1] * span / 2, span);
    else if (steps[e.key]) this.step(...steps[e.key]);
    else return;
    if (e.key.length === 1 && picked.figure === this && picked.index >= 0) this.point(false);
    e.preventDefault();
  }
  centre() {
    const shown = picked.figure === this && picked.index >= 0, row = this.rows[picked.rank];
    return shown ? (row.start[picked.index] + row.end[picked.index]) / 2 : (view.from + view.to) / 2;
  }
  step(ranks, actions) {
    const seen = picked.figure === this && picked.index >= 0 && this.centre() >= view.from && this.centre() <= view.to;
    const fresh = !seen, from = fresh ? 0 : picked.rank;
    const time = fresh ? view.from : this.centre();
    const rank = fresh ? from : Math.min(Math.max(from + ranks, 0), this.rows.length - 1), row = this.rows[rank];
    if (!row.n) return;
    const index = fresh || ranks ? this.firstEndingAfter(row, time) : picked.index + actions;
    Object.assign(picked, {figure: this, rank, index: Math.min(Math.max(index, 0), row.n - 1), part: 0});
    const span = view.to - view.from, start = row.start[picked.index], end = row.end[picked.index];
    if (start < view.from || end > view.to) showRange((start + end - span) / 2, span);
    this.point(true);
  }
  point(aloud) {  // show the tip at the picked action
    const y = this.over.getBoundingClientRect().top + this.top + picked.rank * this.row;
    if (y < 120 || y + this.row > innerHeight) scrollBy(0, y - innerHeight / 2);
    const x = Math.min(Math.max(this.x(this.centre()), this.left), this.left + this.plot);
    this.showTip(x, this.top + picked.rank * this.row, aloud);
  }
}
