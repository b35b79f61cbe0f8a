/* What the page at /ui does: asks the service about what is typed, and draws where each text left.
 *
 * It speaks to the service that it came from and to nobody else, keeps nothing beyond its own life
 * (no storage, no cookies; an API key is a variable here), and makes text only, never markup. It
 * knows the service's answers, and nothing about how they came about.
 */

const ROOT = new URL("../", import.meta.url);
const TYPING_MS = 150;
const SLIDING_MS = 60;
const LOOK_MS = 1000;
const LOOK_AGAIN_MS = 5000; // after a look that failed
const SPAN_MS = 60_000;
const MOST_LABELS = 3;
const SVG = "http://www.w3.org/2000/svg";

const $ = (id) => document.getElementById(id);

/* ---- Words ------------------------------------------------------------------------------------ */

const SIGNALS = {
  full_depth: "confidence",
  fixed_layer: "layers run",
  confidence: "confidence",
  margin: "margin between the best two",
  entropy: "uncertainty (entropy)",
  energy: "energy",
  patience: "exits that agree in a row",
  vote: "votes",
  gate: "the gate's probability to leave",
};
const LEAVES = { below: "leaves below", above: "leaves above", at_least: "leaves from" };

const count = (number, one, many = `${one}s`) =>
  `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
const times = (ratio) => `${ratio.toFixed(2)}×`;
const percent = (share, digits = 1) => `${(share * 100).toFixed(digits)} %`;
const probability = (p) => (p > 0.9995 ? "> 99.9 %" : p > 0 && p < 0.0005 ? "< 0.1 %" : percent(p));
const milliseconds = (ms) => `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;

/** A signal or threshold, with digits where they matter: near 0 and near 1. */
function figure(value) {
  if (value === null) return "no number";
  if (Number.isInteger(value)) return String(value);
  const distance = Math.min(Math.abs(value), Math.abs(1 - value));
  return value.toFixed(distance >= 0.01 ? 3 : 4);
}

/** What went wrong, for a person; `lines` are the numbers of the lines that were sent. */
function explain(refusal, lines) {
  const wait = refusal.again ? ` Trying again in ${count(refusal.again, "second")}.` : "";
  switch (refusal.status) {
    case 0:
      return `The service cannot be reached.${wait}`;
    case 401:
      return key ? "The server does not accept this API key." : "This server asks for an API key.";
    case 429:
      return `The service has more to do than it can take.${wait}`;
    case 503:
      return `The service is starting or ending.${wait}`;
    case 504:
      return "The service did not answer in time.";
    case 500:
      return "The model failed on these texts. The server's log says why.";
  }
  const place = /^(input|text_pair)\[(\d+)\]/.exec(refusal.message);
  let message = refusal.message.replace(" unless truncation is asked for", "");
  if (place) message = message.replace(place[0], `line ${lines[Number(place[2])]}`);
  return `${message.charAt(0).toUpperCase()}${message.slice(1)}.`;
}

/* ---- The service ------------------------------------------------------------------------------ */

let key = ""; // of the API; lives as long as the page

/** A request that got no answer. `again` is when to try it once more, in seconds; 0: never. */
class Refusal extends Error {
  constructor(status, message, again = 0) {
    super(message);
    this.status = status;
    this.again = again;
  }
}

async function call(path, { body, signal } = {}) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  if (body) headers["content-type"] = "application/json";
  const how = { method: body ? "POST" : "GET", headers, signal, cache: "no-store" };
  if (body) how.body = JSON.stringify(body);
  let response, content;
  try {
    response = await fetch(new URL(path, ROOT), how);
    content = await response.json();
  } catch (error) {
    if (signal?.aborted) throw error;
    // The service speaks JSON, whatever happens; who does not is a proxy that cannot reach it.
    const status = response && response.status < 500 ? response.status : 0;
    throw new Refusal(status, "the answer cannot be read", status ? 0 : 3);
  }
  if (response.ok) return { content, headers: response.headers };
  const busy = response.status === 429 || response.status === 503;
  const again = busy ? Number(response.headers.get("retry-after")) || 1 : 0;
  throw new Refusal(response.status, content.error?.message ?? "the service refused", again);
}

/* ---- The model -------------------------------------------------------------------------------- */

let info = null; // of the model that is chosen
let labels = [];
let opening = 0; // the newest; who is overtaken has nothing to say

async function open(name = null) {
  const mine = ++opening;
  try {
    const [about, cards] = await Promise.all([
      call(name === null ? "info" : `info?model=${encodeURIComponent(name)}`),
      call("v1/models"),
    ]);
    if (mine !== opening) return;
    info = about.content;
    labels = Object.values(info.model_type.classifier.id2label);
    offer(cards.content.data.map((card) => card.id));
  } catch (error) {
    if (mine !== opening) return;
    if (!(error instanceof Refusal)) throw error;
    show(error);
    if (error.again) setTimeout(() => mine === opening && open(name), error.again * 1000);
    return;
  }
  show(null);
  describe();
  setSpeed();
  restart();
  ask();
}

function offer(names) {
  $("model").replaceChildren(...names.map((name) => new Option(name, name)));
  $("model").value = info.served_model_name;
  $("models").hidden = names.length < 2;
}

function describe() {
  const name = $("models").hidden ? [info.served_model_name] : [];
  const parts = [
    ...name,
    `${info.num_layers} layers`,
    count(labels.length, "label"),
    `${info.model_dtype} on ${info.backend === "onnx" ? "ONNX Runtime" : info.backend}, ${info.device}`,
  ];
  $("facts").textContent = parts.join(" · ");
  $("figures").hidden = false;
  document.title = `${info.served_model_name} · offramp`;
}

/* ---- Speed ------------------------------------------------------------------------------------ */

/** Calibrated [speed-up, accuracy], as the service looks it up: the first that is fast enough. */
function calibrated(speedup) {
  const points = info.calibration?.curve ?? [];
  return points.find((point) => point[0] >= speedup - 1e-6) ?? points.at(-1);
}

function setSpeed() {
  const slider = $("speed");
  const { min, max, default: usual } = info.speedup;
  const steps = Math.floor((max - min) / 0.05 + 1e-9);
  slider.min = min;
  slider.max = Math.min(max, min + steps * 0.05);
  slider.disabled = steps === 0;
  slider.value = usual;
  drawSpeed();
}

function drawSpeed() {
  const speedup = Number($("speed").value);
  const point = calibrated(speedup);
  $("speed-value").textContent = times(speedup);
  let note = "Every text runs to the last layer.";
  if (!point) note = "Not calibrated for this exit policy: every text runs to the last layer.";
  else if (speedup > 1) {
    const full = percent(calibrated(1)[1]);
    note = `About ${percent(1 / point[0], 0)} of the layers; ${percent(point[1])} of held-out texts `;
    note += `right, ${full} at full depth.`;
  }
  $("speed-note").textContent = note;
  $("speed").setAttribute("aria-valuetext", `${speedup.toFixed(2)} times. ${note}`);
  drawCurve(point);
}

/* ---- Asking ----------------------------------------------------------------------------------- */

let turn = 0; // of the newest question; answers to older ones are dropped
let pending = null;
let timer = 0;

function askSoon(ms) {
  clearTimeout(timer);
  timer = setTimeout(ask, ms);
}

/** What stands in a field: its texts, and the number of the line where each stands. */
function written(field) {
  const lines = field.value.split("\n").map((text, index) => ({ text: text.trim(), at: index + 1 }));
  const filled = lines.filter((line) => line.text);
  return { texts: filled.map((line) => line.text), lines: filled.map((line) => line.at) };
}

async function ask() {
  if (!info) return;
  clearTimeout(timer);
  const mine = ++turn;
  pending?.abort();
  const { texts, lines } = written($("texts"));
  const second = $("pairs").checked ? written($("second")).texts : null;
  if (!texts.length) return clear();
  if (second && second.length !== texts.length) {
    clear();
    say(`Each text needs a second one: there are ${texts.length} and ${second.length}.`);
    return;
  }
  const most = info.max_client_batch_size;
  const body = {
    model: info.served_model_name,
    input: texts.slice(0, most),
    speedup: Number($("speed").value),
    return_signals: true,
  };
  if (second) body.text_pair = second.slice(0, most);
  pending = new AbortController();
  const begun = performance.now();
  try {
    const { content, headers } = await call("classify", { body, signal: pending.signal });
    if (mine !== turn) return;
    show(null);
    drawAnswers(content.data, body, headers, performance.now() - begun);
    if (texts.length > most) {
      say(`${$("status").textContent} The service takes ${most} texts at once: the first ones.`);
    }
  } catch (error) {
    if (mine !== turn) return;
    if (!(error instanceof Refusal)) throw error;
    show(error, lines);
    if (error.again) askSoon(error.again * 1000);
  }
}

function clear() {
  show(null);
  say("");
  $("legend").hidden = true;
  $("answers").replaceChildren();
}

const say = (words) => ($("status").textContent = words);

/** What stands in the way, or null: nothing does. */
function show(refusal, lines = []) {
  const problem = $("problem");
  problem.hidden = refusal === null;
  problem.textContent = refusal === null ? "" : explain(refusal, lines);
  $("answers").classList.toggle("old", refusal !== null);
  if (refusal !== null) say("");
  if (refusal?.status === 401) {
    $("access").hidden = false;
    $("access").open = true;
    $("key").focus();
  }
}

/* ---- Answers ---------------------------------------------------------------------------------- */

function element(kind, className = "", words = "") {
  const made = document.createElement(kind);
  if (className) made.className = className;
  if (words) made.textContent = words;
  return made;
}

function drawing(kind, attributes, words = "") {
  const made = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (words) made.textContent = words;
  return made;
}

function drawAnswers(items, asked, headers, taken) {
  const list = $("answers");
  const scale = scaleOf(items);
  while (list.children.length > items.length) list.lastElementChild.remove();
  while (list.children.length < items.length) {
    list.append($("answer").content.firstElementChild.cloneNode(true));
  }
  items.forEach((item, index) => {
    const second = asked.text_pair?.[index];
    const text = second === undefined ? asked.input[index] : `${asked.input[index]} ⏐ ${second}`;
    drawAnswer(list.children[index], item, text, scale);
  });
  drawLegend(items[0].details);
  const layers = items.reduce((sum, item) => sum + item.details.exit_layer, 0);
  const all = items.length * info.num_layers;
  const raised = headers.get("x-speedup-effective");
  say(
    `${count(items.length, "text")} answered in ${milliseconds(taken)}: ` +
      `${layers} of ${count(all, "layer")} run, a speed-up of ${times(all / layers)}.` +
      (raised ? ` The service is under load and has raised it to ${times(Number(raised))}.` : ""),
  );
}

function drawLegend(details) {
  const { direction } = info.threshold;
  $("legend").hidden = false;
  $("legend-signal").textContent = SIGNALS[info.exit_policy] ?? info.exit_policy;
  $("legend-limit").textContent =
    details.threshold === null
      ? "no threshold: never leaves early"
      : `${LEAVES[direction]} ${figure(details.threshold)}`;
}

function drawAnswer(card, item, text, scale) {
  const { details } = item;
  card.querySelector(".text").textContent = text;
  card.querySelector(".labels").replaceChildren(...labelsOf(item));
  const { exit_layer: left, num_layers: all, timings_ms: time } = details;
  const saved = all - left;
  card.querySelector(".how").replaceChildren(
    element("strong", "", saved ? `Left after layer ${left} of ${all}` : `Ran all ${all} layers`),
    `${milliseconds(time.inference)} in the model, ${milliseconds(time.queue)} waiting for it`,
  );
  drawPath(card.querySelector(".path"), details, scale);
}

/** The most probable labels; of a multi-label model all that hold. */
function labelsOf(item) {
  const order = item.probs.map((_, index) => index).sort((a, b) => item.probs[b] - item.probs[a]);
  const isSet = info.problem_type === "multi_label_classification";
  const holds = (index) => (isSet ? item.probs[index] > 0.5 : index === order[0]);
  const held = order.filter(holds).length;
  const lines = order.slice(0, Math.max(MOST_LABELS, held)).map((index) => {
    const line = element("li", holds(index) ? "holds" : "");
    const bar = element("span", "bar");
    bar.style.setProperty("--share", item.probs[index]);
    line.append(element("span", "name", labels[index]), bar);
    line.append(element("span", "score", probability(item.probs[index])));
    return line;
  });
  return held ? lines : [element("li", "holds", "No label holds"), ...lines];
}

/** From a signal to a height, 0 to 1, the same for all answers that are shown. */
function scaleOf(items) {
  const { min, max } = info.threshold;
  // Probabilities meet their thresholds close to 0 or 1, where only odds tell them apart.
  const isShare = min === 0 && max === 1;
  const spread = (value) => {
    if (!isShare) return value;
    const inside = Math.min(Math.max(value, 1e-5), 1 - 1e-5);
    return Math.log(inside / (1 - inside));
  };
  const values = items.flatMap(({ details }) => [
    ...details.signals.map((one) => one.exit_signal),
    details.threshold,
  ]);
  const known = values.filter((value) => value !== null).map(spread);
  const low = Math.min(...known);
  const high = Math.max(...known);
  return (value) => (high > low ? (spread(value) - low) / (high - low) : 0.5);
}

/** The layers that a text ran and those it did not, with the signal above each exit it came to. */
function drawPath(path, details, scale) {
  const { exit_layer: left, num_layers: all, threshold, signals } = details;
  const name = SIGNALS[info.exit_policy] ?? info.exit_policy;
  const found = new Map(signals.map((one) => [one.exit_layer, one.exit_signal]));
  path.style.setProperty("--layers", all);
  path.classList.toggle("dense", all > 8);
  path.classList.toggle("deep", all > 12);
  const steps = Array.from({ length: all }, (_, index) => {
    const layer = index + 1;
    const step = element("li", layer < left ? "ran" : layer === left ? "left" : "spared");
    let words = `Layer ${layer}: ${layer > left ? "not run" : "run"}`;
    if (found.has(layer)) {
      const value = found.get(layer);
      words = `Layer ${layer}: ${name} ${figure(value)}`;
      if (value !== null) {
        const dot = element("span", "dot");
        dot.style.setProperty("--height", scale(value));
        dot.dataset.value = figure(value);
        step.append(dot);
      }
    }
    const rung = element("span", "rung", String(layer));
    rung.setAttribute("aria-hidden", "true");
    step.append(rung, element("span", "unseen", words + (layer === left ? ", left here" : "")));
    return step;
  });
  path.querySelector(".ladder").replaceChildren(...steps);
  const known = signals.filter((one) => one.exit_signal !== null);
  const points = known.map(
    (one) => `${((one.exit_layer - 0.5) / all) * 100},${(1 - scale(one.exit_signal)) * 100}`,
  );
  path.querySelector("polyline").setAttribute("points", points.join(" "));
  path.classList.toggle("never", threshold === null);
  path.classList.toggle("down", info.threshold.direction === "below");
  if (threshold !== null) path.style.setProperty("--limit-share", scale(threshold));
}

/* ---- Accuracy and speed ----------------------------------------------------------------------- */

const BOX = { left: 54, right: 330, top: 12, bottom: 164 };

/** The whole calibration, and on it the point that is used for what is asked. */
function drawCurve(point) {
  const picture = $("curve");
  picture.toggleAttribute("hidden", !point);
  if (!point) {
    $("curve-note").textContent = "This checkpoint has no calibration for this exit policy.";
    return;
  }
  const { curve, rows } = info.calibration;
  const fastest = curve.at(-1)[0];
  const seen = curve.map((one) => one[1]);
  const step = stepFor(Math.max(...seen) - Math.min(...seen));
  const low = Math.floor(Math.min(...seen) / step) * step;
  const high = Math.max(Math.ceil(Math.max(...seen) / step) * step, low + step);
  const x = (value) =>
    BOX.left + ((BOX.right - BOX.left) * (value - 1)) / Math.max(fastest - 1, 1e-9);
  const y = (value) => BOX.bottom - ((BOX.bottom - BOX.top) * (value - low)) / (high - low);
  const parts = [];
  for (let tick = low; tick < high + step / 2; tick += step) {
    const at = y(tick);
    parts.push(drawing("line", { class: "grid", x1: BOX.left, x2: BOX.right, y1: at, y2: at }));
    const place = { class: "tick", x: BOX.left - 6, y: at + 4, "text-anchor": "end" };
    parts.push(drawing("text", place, `${+(tick * 100).toFixed(1)} %`));
  }
  const stride = Math.max(1, Math.ceil((fastest - 1) / 6));
  for (let tick = 1; tick <= fastest + 1e-9; tick += stride) {
    const place = { class: "tick", x: x(tick), y: BOX.bottom + 16, "text-anchor": "middle" };
    parts.push(drawing("text", place, `${tick}×`));
  }
  const middle = { class: "tick", x: (BOX.left + BOX.right) / 2, y: 196, "text-anchor": "middle" };
  parts.push(drawing("text", middle, "speed-up in layers"));
  const line = curve.map((one) => `${x(one[0]).toFixed(1)},${y(one[1]).toFixed(1)}`).join(" ");
  parts.push(drawing("polyline", { class: "curve", points: line }));
  if (curve.length <= 20) {
    const place = (one) => ({ class: "measured", cx: x(one[0]), cy: y(one[1]), r: 3.5 });
    parts.push(...curve.map((one) => drawing("circle", place(one))));
  }
  const [px, py] = [x(point[0]), y(point[1])];
  parts.push(drawing("line", { class: "cross", x1: px, x2: px, y1: py, y2: BOX.bottom }));
  parts.push(drawing("line", { class: "cross", x1: BOX.left, x2: px, y1: py, y2: py }));
  parts.push(drawing("circle", { class: "point", cx: px, cy: py, r: 6 }));
  picture.replaceChildren(...parts);
  $("curve-note").textContent =
    `Measured on ${count(rows, "held-out text")}: ${percent(point[1])} right at ${times(point[0])}.`;
}

/** A round distance of grid lines, of which three to six fit. */
function stepFor(range) {
  const steps = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1];
  return steps.find((step) => range / step <= 5) ?? 0.2;
}

/* ---- Where all texts left --------------------------------------------------------------------- */

let looks = []; // {at, counts}, the last minute's, the oldest first
let looking = 0;

function restart() {
  looks = [];
  look();
}

async function look() {
  clearTimeout(looking);
  if (document.hidden || !info) return;
  const name = info.served_model_name;
  let next = LOOK_MS;
  try {
    const { content } = await call(`ui/exits?model=${encodeURIComponent(name)}`);
    if (name !== info.served_model_name) return;
    note(content.exit_counts);
    drawExits();
  } catch {
    next = LOOK_AGAIN_MS;
    $("exits-note").textContent = "No figures at the moment.";
  }
  clearTimeout(looking);
  looking = setTimeout(look, next);
}

const sum = (counts) => counts.reduce((total, one) => total + one, 0);

function note(counts) {
  const now = performance.now();
  // Fewer than before: the server was started anew.
  if (looks.length && sum(counts) < sum(looks.at(-1).counts)) looks = [];
  looks.push({ at: now, counts });
  // The last one that is older stays: the minute is counted from there.
  while (looks.length > 1 && now - looks[1].at > SPAN_MS) looks.shift();
}

function drawExits() {
  if (!looks.length) return;
  const newest = looks.at(-1).counts;
  const recent = document.querySelector("input[name=span]:checked").value === "minute";
  const counts = recent ? newest.map((one, index) => one - looks[0].counts[index]) : newest;
  const all = sum(counts);
  const layers = counts.reduce((total, one, index) => total + one * (index + 1), 0);
  const most = Math.max(...counts, 1);
  const list = $("exits");
  list.classList.toggle("dense", counts.length > 8);
  while (list.children.length > counts.length) list.lastElementChild.remove();
  while (list.children.length < counts.length) {
    const bar = element("li");
    bar.append(element("span", "share"), element("span", "column"), element("span", "layer"));
    list.append(bar);
  }
  counts.forEach((one, index) => {
    const [share, column, layer] = list.children[index].children;
    share.textContent = all ? percent(one / all, 0) : "";
    column.style.setProperty("--share", one / most);
    column.classList.toggle("none", one === 0);
    const named = counts.length <= 12 || (index + 1) % 4 === 0;
    layer.replaceChildren(
      element("span", "unseen", `layer ${index + 1}`),
      element("span", named ? "number" : "number unseen", String(index + 1)),
    );
    layer.lastElementChild.setAttribute("aria-hidden", "true");
  });
  const span = recent ? "in the last minute" : "since the server started";
  $("exits-note").textContent = all
    ? `${count(all, "text")} ${span}, a speed-up of ${times((all * counts.length) / layers)}.`
    : `No texts ${span}.`;
}

/* ---- Who does what ---------------------------------------------------------------------------- */

$("texts").addEventListener("input", () => askSoon(TYPING_MS));
$("second").addEventListener("input", () => askSoon(TYPING_MS));
$("pairs").addEventListener("change", () => {
  $("seconds").hidden = !$("pairs").checked;
  ask();
});
$("speed").addEventListener("input", () => {
  drawSpeed();
  askSoon(SLIDING_MS);
});
$("model").addEventListener("change", () => {
  clear();
  open($("model").value);
});
$("key").addEventListener("change", () => {
  key = $("key").value.trim();
  if (info) show(null);
  open(info?.served_model_name);
});
$("access").addEventListener("keydown", (event) => {
  const done = event.key === "Escape" || (event.key === "Enter" && event.target === $("key"));
  if (!done) return;
  event.preventDefault();
  $("access").querySelector("summary").focus(); // leaving the field is what takes the key
  $("access").open = false;
});
for (const choice of document.querySelectorAll("input[name=span]")) {
  choice.addEventListener("change", drawExits);
}
document.addEventListener("visibilitychange", look);

open();
