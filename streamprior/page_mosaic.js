// /mosaic -> the sample as far as it is known: maps with axes, and what speaks for and against them. Builds on the script of page.html.
"use strict";
const cividis = ramp([[0,34,78],[18,53,112],[59,73,108],[87,93,109],[112,113,115],[138,134,120],[165,156,116],[195,179,105],[225,204,85],[254,232,56]]);
const views = [
  { name: "amplitude", title: "Sample: amplitude", means: "transmission, 1 is an empty beam; ring: newest frame; grey: hardly any light", unit: "", large: true },
  { name: "phase", title: "Sample: phase", means: "phase of the transmission, 0 is an empty beam", unit: " rad", large: true },
  { name: "light", title: "Light", means: "photons a pixel", unit: " photons" },
  { name: "uncertainty", title: "Uncertainty", means: "half the difference of odd and even frames", unit: "" },
  { name: "probe", title: "Probe", means: "intensity, all modes", unit: "" },
];
const bitmaps = {};
let sample = null, sampleSerial = 0, pointed = null, running = "";

const paletteOf = (name) => name !== "phase" ? viridis : sample.cyclic ? twilight : cividis;
const shade = (name) => getComputedStyle(document.body).getPropertyValue(name);
const niceStep = (atMost) => { const ten = 10 ** Math.floor(Math.log10(atMost)); return ten * [5, 2, 1].find((times) => times * ten <= atMost * (1 + 1e-9)); };
const signed = (text) => text.replace("-", "−");

// The frame of the displayed pixels: [y, x] of the upper left edge, of one displayed pixel, and their number.
function field() {
  const count = sample.images.amplitude.shape, step = sample.pixel.map((one) => one * sample.stride);
  return { count, step, edge: sample.origin.map((one, axis) => one - sample.pixel[axis] / 2) };
}

function ruler(extent) {
  if (sample.unit !== "m") return { name: sample.unit, size: 1 };
  return extent < 2e-6 ? { name: "nm", size: 1e-9 } : extent < 2e-3 ? { name: "µm", size: 1e-6 } : { name: "mm", size: 1e-3 };
}

function bitmap({ shape: [rows, columns], bytes }, table, lit) {
  const canvas = Object.assign(document.createElement("canvas"), { width: columns, height: rows }), context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  for (let i = 0; i < bytes.length; i++) {
    const from = !lit || lit[i] ? table : unmeasured, at = from === table ? 3 * bytes[i] : 0;
    image.data[4 * i] = from[at]; image.data[4 * i + 1] = from[at + 1]; image.data[4 * i + 2] = from[at + 2]; image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

// A canvas as sharp as the screen, cleared; what is drawn on it is measured in CSS pixels.
function sheet(id, heightOf) {
  const canvas = byId(id), width = canvas.parentElement.clientWidth, height = Math.round(heightOf(width)), dense = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * dense); canvas.height = Math.round(height * dense);
  canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d"), size = 0.8 * parseFloat(getComputedStyle(document.body).fontSize);
  context.scale(dense, dense);
  context.font = `${size}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  return { context, width, height, size };
}

// Where a view's picture lies on its canvas: as large as its card and the screen allow, in the sample's own proportions.
function place(view, width, size) {
  const [rows, columns] = sample.images[view.name].shape, [high, wide] = sample.pixel;
  const left = view.large ? 3.6 * size : 0, bottom = view.large ? 2.6 * size : 0, ratio = (rows * high) / (columns * wide);
  const most = Math.max((view.large ? 0.57 : 0.3) * window.innerHeight, 240), across = Math.min(width - left - (view.large ? size : 0), most / ratio);
  return { left: left + (width - left - across) / 2, top: view.large ? size / 2 : 0, across, down: across * ratio, bottom };
}

function drawView(view) {
  if (!bitmaps[view.name]) return;
  let box;
  const { context, size } = sheet(`sample-${view.name}`, (width) => {
    box = place(view, width, 0.8 * parseFloat(getComputedStyle(document.body).fontSize));
    return box.top + box.down + box.bottom;
  });
  // Enlarged pixels stay pixels; a reduced picture is averaged instead of sampled.
  context.imageSmoothingEnabled = bitmaps[view.name].width > box.across * (window.devicePixelRatio || 1);
  context.drawImage(bitmaps[view.name], box.left, box.top, box.across, box.down);
  view.box = box;
  scaleBar(context, box, sample.images[view.name].shape[1] * sample.pixel[1] * (view.name === "probe" ? 1 : sample.stride), size);
  if (view.name === "probe") return;
  if (view.large) axes(context, box, size);
  if (sample.position) mark(context, box, sample.position);
  if (pointed) cross(context, box, pointed);
}

// White within black: a map may have any colour below.
function onMap(context, draw) {
  for (const [colour, width] of [["#000c", 4], ["#fff", 1.6]]) { context.strokeStyle = colour; context.lineWidth = width; draw(); }
}

function scaleBar(context, box, extent, size) {
  const { name, size: unit } = ruler(extent), long = niceStep(0.3 * extent / unit), pixels = long * unit / extent * box.across;
  const x = box.left + size, y = box.top + box.down - size, text = `${number(long)} ${name}`;
  onMap(context, () => { context.beginPath(); context.moveTo(x, y); context.lineTo(x + pixels, y); context.stroke(); });
  context.strokeStyle = "#000c"; context.lineWidth = 3; context.fillStyle = "#fff"; context.textAlign = "left";
  context.strokeText(text, x, y - size); context.fillText(text, x, y - size);
}

function axes(context, box, size) {
  const { count, step, edge } = field(), unit = ruler(Math.max(count[0] * step[0], count[1] * step[1]));
  context.fillStyle = context.strokeStyle = shade("--soft"); context.lineWidth = 1;
  for (const axis of [0, 1]) {
    const long = axis ? box.across : box.down, extent = count[axis] * step[axis] / unit.size, from = edge[axis] / unit.size;
    const each = niceStep(extent * Math.min(1, (axis ? 7 : 4) * size / long) * 1.6), digits = Math.max(0, -Math.floor(Math.log10(each) + 1e-9));
    context.textAlign = axis ? "center" : "right";
    for (let k = Math.ceil(from / each); k * each <= from + extent; k++) {
      const at = (k * each - from) / extent * long, text = signed((k * each).toFixed(digits).replace(/^-(0(\.0+)?)$/, "$1"));
      context.beginPath();
      if (axis) { context.moveTo(box.left + at, box.top + box.down); context.lineTo(box.left + at, box.top + box.down + 4); }
      else { context.moveTo(box.left - 4, box.top + at); context.lineTo(box.left, box.top + at); }
      context.stroke();
      context.fillText(text, axis ? box.left + at : box.left - 6, axis ? box.top + box.down + 4 + 0.7 * size : box.top + at);
    }
  }
  context.textAlign = "center";
  context.fillText(`x, ${unit.name}`, box.left + box.across / 2, box.top + box.down + 4 + 1.8 * size);
  context.save();
  context.translate(0.6 * size, box.top + box.down / 2); context.rotate(-Math.PI / 2);
  if (box.left > 3.4 * size) context.translate(0, box.left - 3.6 * size);
  context.fillText(`y, ${unit.name}`, 0, 0);
  context.restore();
}

// Canvas coordinates of (y, x) on the sample, or null where the map does not reach.
function onCanvas(box, [y, x]) {
  const { count, step, edge } = field(), down = (y - edge[0]) / (count[0] * step[0]), right = (x - edge[1]) / (count[1] * step[1]);
  return down < 0 || down > 1 || right < 0 || right > 1 ? null : [box.left + right * box.across, box.top + down * box.down];
}

function mark(context, box, position) {
  const at = onCanvas(box, position);
  if (at) onMap(context, () => { context.beginPath(); context.arc(at[0], at[1], 7, 0, 7); context.moveTo(at[0] + 1, at[1]); context.arc(at[0], at[1], 1, 0, 7); context.stroke(); });
}

function cross(context, box, position) {
  const at = onCanvas(box, position);
  if (!at) return;
  onMap(context, () => {
    context.beginPath();
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) { context.moveTo(at[0] + 4 * dx, at[1] + 4 * dy); context.lineTo(at[0] + 12 * dx, at[1] + 12 * dy); }
    context.stroke();
  });
}

// What each map holds where the pointer is, in all of them at once.
function point(event, view) {
  if (!sample || !view.box || view.name === "probe") return;
  const { left, top, across, down } = view.box, { count, step, edge } = field();
  const right = (event.offsetX - left) / across, below = (event.offsetY - top) / down;
  const inside = right >= 0 && right < 1 && below >= 0 && below < 1;
  pointed = inside ? [edge[0] + below * count[0] * step[0], edge[1] + right * count[1] * step[1]] : null;
  drawViews();
}

function read(view) {
  const { count, step, edge } = field(), [low, high] = sample.ranges[view.name];
  const rowAt = Math.min(Math.floor((pointed[0] - edge[0]) / step[0]), count[0] - 1), columnAt = Math.min(Math.floor((pointed[1] - edge[1]) / step[1]), count[1] - 1);
  const at = rowAt * count[1] + columnAt, byte = sample.images[view.name].bytes[at], unit = ruler(Math.max(count[0] * step[0], count[1] * step[1]));
  const value = low + byte / 255 * (high - low), beyond = byte === 255 && !sample.cyclic ? "at least " : byte === 0 && low ? "at most " : "";
  // The map knows its values to a 255th of its range: no more digits than that.
  const digits = Math.max(0, Math.ceil(-Math.log10((high - low) / 255)));
  const told = sample.images.lit.bytes[at] || view.name === "light" ? `${beyond}${signed(value.toFixed(Math.min(digits, 6)))}${view.unit}` : "not measured";
  return `x ${number(pointed[1] / unit.size)}, y ${number(pointed[0] / unit.size)} ${unit.name}: ${told}`;
}

function drawViews() {
  for (const view of views) {
    if (!bitmaps[view.name]) continue;
    drawView(view);
    byId(`sample-${view.name}-note`).textContent = pointed && view.name !== "probe" ? read(view) : view.means;
  }
}

// Lines over a common x; a logarithm where the values span more than a factor of ten.
function chart(id, { lines, x: [from, to], y: [low, high], xName, upright }) {
  const { context, width, height, size } = sheet(id, (wide) => Math.min(Math.max(0.62 * wide, 120), 200));
  const log = low > 0 && high > 10 * low, scaled = (value) => log ? Math.log10(value) : value, [bottom, top] = log ? [Math.floor(scaled(low)), Math.ceil(scaled(high))] : [low, high];
  const box = { left: 3.4 * size, top: size, right: width - size, bottom: height - 2.8 * size };
  const right = (value) => box.left + (value - from) / (to - from || 1) * (box.right - box.left), up = (value) => box.bottom - (scaled(value) - bottom) / (top - bottom || 1) * (box.bottom - box.top);
  const rung = log ? 1 : niceStep((top - bottom) / 2), rail = niceStep((to - from) / 2);
  context.fillStyle = shade("--soft"); context.strokeStyle = shade("--line"); context.lineWidth = 1;
  for (let k = Math.ceil(bottom / rung - 1e-9); k * rung <= top * (1 + 1e-9); k++) {
    const value = log ? 10 ** k : k * rung, y = up(value);
    context.beginPath(); context.moveTo(box.left, y); context.lineTo(box.right, y); context.stroke();
    context.textAlign = "right"; context.fillText(number(value), box.left - 5, y);
  }
  context.textAlign = "center";
  for (let k = Math.ceil(from / rail - 1e-9); k * rail <= to * (1 + 1e-9); k++) context.fillText(number(k * rail), right(k * rail), box.bottom + 0.9 * size);
  context.fillText(xName, (box.left + box.right) / 2, box.bottom + 2.1 * size);
  for (const { xs, ys, colour, dash } of [...lines, ...(upright ? [{ xs: [upright, upright], ys: [low, high], colour: "--good", dash: [2, 3] }] : [])]) {
    context.beginPath();
    ys.forEach((value, at) => { if (value !== null) context.lineTo(right(xs[at]), up(Math.max(value, low))); });
    context.setLineDash(dash); context.strokeStyle = shade(colour); context.lineWidth = 1.8; context.stroke();
  }
}

function drawCurves() {
  const { frequency, correlation, threshold } = sample.rings, { frames, before } = sample.errors, pixel = (sample.pixel[0] + sample.pixel[1]) / 2;
  byId("sample-rings-card").hidden = !frequency.length;
  byId("sample-errors-card").hidden = before.length < 2;
  if (frequency.length) {
    const lines = [{ xs: frequency, ys: threshold, colour: "--soft", dash: [5, 4] }, { xs: frequency, ys: correlation, colour: "--curve", dash: [] }];
    chart("sample-rings", { lines, x: [0, 0.5], y: [0, 1], xName: "cycles per pixel", upright: sample.resolution && 0.5 * pixel / sample.resolution });
  }
  if (before.length > 1) {
    const most = Math.max(...before), least = Math.min(...before.filter((one) => one > 0));
    chart("sample-errors", { lines: [{ xs: frames, ys: before, colour: "--curve", dash: [] }], x: [0, frames.at(-1)], y: [most > 10 * least ? least : 0, most], xName: "frames in" });
  }
}

function resolution() {
  if (sample.resolution === null) return "not known";
  const { name, size } = ruler(sample.resolution), pixels = 2 * sample.resolution / (sample.pixel[0] + sample.pixel[1]);
  return `${number(sample.resolution / size)} ${name}${sample.unit === "m" ? ` (${number(pixels)} px)` : ""}`;
}

function facts() {
  const out = Object.entries(sample.frames).filter(([name, count]) => name !== "in" && count), left = sum(Object.fromEntries(out)), taken = sample.frames.in;
  const told = [
    [running && sample.run !== running ? "Sample of an earlier run" : "Sample", sample.final ? "final image" : `image ${sample.image}`],
    ["Resolution, half period", resolution()],
    ["Odd and even frames differ by", sample.disagreement === null ? "not known" : `${number(100 * sample.disagreement)} % of the contrast`],
    ["χ² of the newest frames", number(sample.chi2)],
    ["Frames in", String(taken)],
    ["Further passes", taken ? `${number(sample.passes / taken)} a frame` : "none"],
    ["Left out", left ? `${left} (${out.map(([name, count]) => `${words(name)} ${count}`).join(", ")})` : "none"],
  ];
  byId("facts").replaceChildren(...told.map(([name, value]) => {
    const tile = document.createElement("div"), term = document.createElement("dt"), text = document.createElement("dd");
    term.textContent = name; text.textContent = value;
    tile.append(term, text);
    return tile;
  }));
}

function warn() {
  const box = byId("warnings"), text = sample.warnings.join("\n");
  // Set only when it changes: every change is read out by a screen reader.
  if (box.innerText !== text) box.replaceChildren(...sample.warnings.map((one) => Object.assign(document.createElement("p"), { textContent: one })));
  box.hidden = !text;
}

function ends(view) {
  const [low, high] = sample.ranges[view.name];
  byId(`sample-${view.name}-scale`).style.background = gradient(paletteOf(view.name));
  byId(`sample-${view.name}-low`).textContent = view.name === "phase" && sample.cyclic ? "−π" : number(low);
  byId(`sample-${view.name}-high`).textContent = view.name === "phase" && sample.cyclic ? "π" : number(high) + view.unit;
}

function showSample(header) {
  sample = header; sampleSerial = header.serial;
  byId("sample").hidden = false;
  document.body.classList.add("sampled");
  for (const view of views) {
    const image = header.images[view.name];
    byId(`sample-${view.name}-card`).hidden = !image;
    bitmaps[view.name] = image && bitmap(image, paletteOf(view.name), view.name === "probe" || view.name === "light" ? null : header.images.lit.bytes);
    if (image) ends(view);
  }
  byId("thinned").textContent = header.stride > 1 ? `Thinned for this page: one pixel of ${header.stride} each way, of ${header.shape.join(" × ")}.` : "";
  byId("thinned").hidden = header.stride === 1;
  facts(); warn(); drawSample();
}

function drawSample() { if (sample) { drawViews(); drawCurves(); } }

for (const view of views) {
  const canvas = byId(`sample-${view.name}`);
  for (const kind of ["pointermove", "pointerdown"]) canvas.addEventListener(kind, (event) => point(event, view));
  canvas.addEventListener("pointerleave", () => { pointed = null; if (sample) drawViews(); });
}
addEventListener("resize", drawSample);
// A scroll bar that comes or goes resizes no window, but narrows the cards.
new ResizeObserver(drawSample).observe(document.body);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawSample);
