"use strict";
// The page of `deme play`: what is chosen, asked of the server, shown. Everything is put in as text, never as HTML.
const DEBOUNCE = 150, POLL = 400, GRIDS = ["base", "merged", "changes"];
const page = Math.random().toString(36).slice(2, 14);
const at = (id) => document.getElementById(id);
const state = { weights: [], by_layer: false, known: "", timer: 0, asked: 0, pending: null, facts: null };

function made(tag, text, attributes = {}) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

const shown = (weight) => String(Number(weight.toFixed(4)));
const seconds = (s) => (s < 0.01 ? `${(1000 * s).toFixed(1)} ms` : s < 1 ? `${(1000 * s).toFixed(0)} ms` : `${s.toFixed(1)} s`);
const percent = (x) => `${(100 * x).toPrecision(3)} %`;
const equal = (a, b) => a.every((w, i) => Math.abs(w - b[i]) < 5e-7);

async function ask(path, body, signal) {
  const options = { method: "POST", signal, headers: { "content-type": "application/json" }, body: JSON.stringify({ page, ...body }) };
  const answer = await (body ? fetch(path, options) : fetch(path, { signal }));
  const told = await answer.json();
  if (told.error) throw new Error(told.error);
  return told;
}

function say(id, text, wrong = false) {
  at(id).textContent = text;
  at(id).classList.toggle("error", wrong);
}

const failed = (error) => (error instanceof TypeError ? "The server does not answer: is deme play still running?" : error.message);

// -- building the page ---------------------------------------------------------------------------

function build(facts) {
  document.title = `${facts.name} · playground · deme`;
  at("name").textContent = facts.name;
  at("about").textContent = `${facts.folder} · base ${facts.base} · ${facts.experts.length} experts merged by ${facts.method}`;
  at("notes").replaceChildren(...facts.notes.map((note) => made("li", note)));
  at("sliders").replaceChildren(...facts.experts.map(slider));
  const buttons = facts.presets.map((preset) => button(preset.name, preset.what, () => choose(preset)));
  const reset = button("reset", "weights as the page began, and the recipe's first sampler", () => { sampling(facts); choose(facts.presets[facts.start]); });
  at("presets").replaceChildren(...buttons, reset);
  const own = made("optgroup", undefined, { label: "of the recipe" }), stock = made("optgroup", undefined, { label: "others" });
  facts.samplers.forEach(({ label }, i) => (i < facts.listed ? own : stock).append(made("option", label, { value: label })));
  at("sampler").replaceChildren(own, ...(stock.children.length ? [stock] : []));
  at("steps").max = facts.timesteps;
  at("images").max = facts.most.images;
  at("seed").max = facts.most.seed;
  at("save-name").value = "by-hand";
  at("loss-note").textContent = `The denoising loss on at most ${facts.loss_images} images of the search split: the report split stays unseen. A lower loss is not yet better images.`;
  sampling(facts);
}

function button(text, title, act) {
  const element = made("button", text, { type: "button", title, "aria-pressed": "false" });
  if (text === "reset") element.removeAttribute("aria-pressed");
  element.addEventListener("click", act);
  return element;
}

function sampling(facts) {
  at("sampler").value = facts.samplers[0].label;
  at("steps").value = facts.samplers[0].steps;
  at("images").value = facts.images;
  at("seed").value = 0;
}

function slider(expert, i) {
  const { bounds: [low, high], most, timesteps, weighted } = state.facts, id = `w${i}`;
  const row = made("div", undefined, { class: "slider" }), label = made("label", expert.name, { for: id });
  row.style.setProperty("--colour", expert.colour);
  label.append(made("span", expert.range));
  const where = made("div", undefined, { class: "where", "aria-hidden": "true" });
  for (const [first, stop] of expert.runs) {
    const run = made("i");
    run.style.left = `${(100 * first) / timesteps}%`;
    run.style.width = `${(100 * (stop - first)) / timesteps}%`;
    where.append(run);
  }
  const range = made("input", undefined, { id, type: "range", min: low, max: high, step: 0.01 });
  const named = `weight of ${expert.name}, timesteps ${expert.range}`;
  const number = made("input", undefined, { id: `${id}n`, type: "number", min: -most.weight, max: most.weight, step: "any", required: "" });
  range.setAttribute("aria-label", named);
  number.setAttribute("aria-label", `${named}, as a number`);
  range.disabled = number.disabled = !weighted;
  range.addEventListener("input", () => moved(i, range.valueAsNumber, number));
  number.addEventListener("input", () => { if (number.checkValidity()) moved(i, number.valueAsNumber, range); });
  const inputs = made("div", undefined, { class: "inputs" });
  inputs.append(range, number);
  row.append(label, where, inputs);
  return row;
}

// -- what is chosen --------------------------------------------------------------------------------

function moved(i, weight, other) {
  state.weights[i] = weight;
  state.by_layer = false;
  other.value = shown(weight);
  colour(i);
  changed();
}

function colour(i) {
  // The track is coloured from 0 to the weight. A thumb's middle moves by its own width less than the track.
  const { bounds: [low, high] } = state.facts, range = at(`w${i}`);
  const place = (w) => { const share = (Math.min(Math.max(w, low), high) - low) / (high - low); return `calc(${share} * (100% - 1.1rem) + .55rem)`; };
  const ends = [0, state.weights[i]].sort((a, b) => a - b);
  range.style.setProperty("--from", place(ends[0]));
  range.style.setProperty("--to", place(ends[1]));
}

function choose(preset) {
  state.weights = [...preset.values];
  state.by_layer = preset.by_layer;
  state.weights.forEach((w, i) => { at(`w${i}`).value = w; at(`w${i}n`).value = shown(w); colour(i); });
  changed(0);
}

function changed(delay = DEBOUNCE) {
  const { facts, weights, by_layer } = state, buttons = at("presets").children;
  facts.presets.forEach((preset, i) => buttons[i].setAttribute("aria-pressed", preset.by_layer === by_layer && equal(preset.values, weights)));
  const layers = by_layer ? " · by layer, as the search found them: the sliders show means, and moving one leaves them" : "";
  at("sum").textContent = `Σ w = ${shown(weights.reduce((sum, w) => sum + w, 0))}${layers}`;
  clearTimeout(state.timer);
  state.timer = setTimeout(sample, delay);
}

function chosen() {
  const wrong = ["steps", "images", "seed"].find((id) => !at(id).checkValidity());
  if (wrong) throw new Error(`${at(wrong).parentElement.firstChild.textContent.trim()}: ${at(wrong).validationMessage}`);
  const number = (id) => at(id).valueAsNumber;
  return { sampler: at("sampler").value, steps: number("steps"), images: number("images"), seed: number("seed") };
}

// -- samples ---------------------------------------------------------------------------------------

async function sample() {
  const asked = ++state.asked, current = () => asked === state.asked;
  state.pending?.abort();
  state.pending = new AbortController();
  at("merged").setAttribute("aria-busy", "true");
  const polling = setInterval(() => current() && progress("samples"), POLL);
  try {
    const choice = chosen();
    const told = await ask("api/samples", { weights: state.weights, by_layer: state.by_layer, known: state.known, ...choice }, state.pending.signal);
    if (current() && !told.superseded) show(told, choice);
  } catch (error) {
    if (current() && error.name !== "AbortError") say("status", failed(error), true);
  } finally {
    clearInterval(polling);
    if (current()) { at("merged").removeAttribute("aria-busy"); at("progress").hidden = true; }
  }
}

async function progress(kind) {
  const told = await ask(`api/progress?page=${page}&kind=${kind}`).catch(() => ({}));
  const bar = at("progress"), busy = at("merged").hasAttribute("aria-busy") || at("measure").disabled;
  bar.hidden = !told.doing || !busy;
  if (!told.doing) return;
  bar.title = told.doing;
  if (told.total) { bar.max = told.total; bar.value = told.done; } else bar.removeAttribute("value");
}

function show(told, { seed, images, sampler }) {
  state.known = told.key;
  const last = images > 1 ? `seeds ${seed} to ${seed + images - 1}` : `seed ${seed}`;
  if (told.base) fill("base", told.base, seed, told, `${images} samples of the base, ${last}`);
  fill("merged", told.merged, seed, told, `${images} samples of the merged model, ${last}, w = ${state.weights.map(shown).join(", ")}`);
  fill("changes", told.changes, seed, told, `What changed from the base to the merged model, ${last}`);
  at("base-name").textContent = `· ${told.sampler} · ${last}`;
  at("merged-name").textContent = `· w = (${state.weights.map(shown).join(", ")})`;
  at("change").textContent = percent(told.change);
  at("change").title = "norm of θ merged − θ over the norm of θ";
  at("difference").textContent = `${told.difference.toFixed(2)} of 255`;
  at("difference").title = "mean absolute difference of a pixel, merged − base";
  at("merge-time").textContent = seconds(told.merge_seconds);
  at("sample-time").textContent = seconds(told.sample_seconds);
  say("status", `${images} images by ${told.sampler}, ${last}.`);
  at("command").textContent = told.command;
  at("command").hidden = at("measuring").hidden = !told.command;
  fit();
}

function fill(id, coded, seed, { height, width }, label) {
  const grid = at(id);
  while (grid.children.length > coded.length) grid.lastChild.remove();
  while (grid.children.length < coded.length) grid.append(made("img", undefined, { alt: "" }));
  coded.forEach((data, i) => Object.assign(grid.children[i], { src: `data:image/png;base64,${data}`, width, height, title: `seed ${seed + i}` }));
  grid.style.setProperty("--columns", Math.ceil(Math.sqrt(coded.length)));
  grid.setAttribute("aria-label", label);
}

function fit() {
  // Pixels stay pixels where an image is enlarged; one that is shrunk is smoothed.
  for (const grid of GRIDS.map(at)) {
    const first = grid.firstChild;
    if (first) grid.classList.toggle("pixels", first.clientWidth >= first.naturalWidth);
  }
}

function mark(event) {
  const i = event.target.tagName === "IMG" ? [...event.currentTarget.children].indexOf(event.target) : -1;
  for (const id of GRIDS) [...at(id).children].forEach((image, k) => image.classList.toggle("same", k === i && event.type === "pointerover"));
}

// -- loss, saving ----------------------------------------------------------------------------------

async function measure() {
  const weights = [...state.weights], by_layer = state.by_layer;
  at("measure").disabled = true;
  at("loss-rows").replaceChildren();
  at("losses").hidden = true;
  const polling = setInterval(() => progress("loss"), POLL);
  try {
    const told = await ask("api/loss", { weights, by_layer });
    if (told.superseded) return say("status", "The weights or the sampler changed: measure the loss again.");
    const rows = told.base.map((base, i) => row(state.facts.ranges[i], base, told.merged[i]));
    at("loss-rows").replaceChildren(...rows, row("all", ...told.overall));
    at("loss-at").textContent = `At w = (${weights.map(shown).join(", ")}): ${told.images} images, ${told.draws} ${told.draws > 1 ? "draws" : "draw"} in each range`;
    at("losses").hidden = false;
    say("status", `Loss: ${told.overall[1].toPrecision(4)}, the base's ${told.overall[0].toPrecision(4)}.`);
  } catch (error) {
    say("status", failed(error), true);
  } finally {
    clearInterval(polling);
    at("measure").disabled = false;
    if (!at("merged").hasAttribute("aria-busy")) at("progress").hidden = true;
  }
}

function row(name, base, merged) {
  const line = made("tr"), change = merged / base - 1;
  const kind = Math.abs(change) < 5e-5 ? "" : change < 0 ? "better" : "worse";
  line.append(made("th", name, { scope: "row" }), made("td", base.toPrecision(4)), made("td", merged.toPrecision(4)));
  line.append(made("td", `${change > 0 ? "+" : change < 0 ? "−" : ""}${(100 * Math.abs(change)).toFixed(2)} %`, { class: kind }));
  return line;
}

async function save(event) {
  event.preventDefault();
  at("save").disabled = true;
  at("loading").hidden = true;
  say("saved", "Saving…");
  try {
    const told = await ask("api/save", { weights: state.weights, by_layer: state.by_layer, name: at("save-name").value });
    say("saved", `Saved: ${told.folder}`);
    at("loading").textContent = `from diffusers import DiffusionPipeline\npipeline = DiffusionPipeline.from_pretrained(${JSON.stringify(told.folder)})`;
    if (told.unfolded.length) at("loading").textContent += `\n# with the projections after ${told.unfolded.join(", ")}: see README.md there`;
    at("loading").hidden = false;
  } catch (error) {
    say("saved", failed(error), true);
  } finally {
    at("save").disabled = false;
  }
}

async function begin() {
  try {
    state.facts = await ask("api/facts");
  } catch (error) {
    return say("status", failed(error), true);
  }
  build(state.facts);
  at("sampler").addEventListener("change", () => {
    at("steps").value = state.facts.samplers.find(({ label }) => label === at("sampler").value).steps;
    changed();
  });
  for (const id of ["steps", "images", "seed"]) at(id).addEventListener("input", () => changed(2 * DEBOUNCE));
  at("next").addEventListener("click", () => { at("seed").value = at("seed").valueAsNumber + at("images").valueAsNumber; changed(0); });
  at("measure").addEventListener("click", measure);
  at("saving").addEventListener("submit", save);
  for (const id of ["weights", "sampling"]) at(id).addEventListener("submit", (event) => { event.preventDefault(); changed(0); });
  for (const id of GRIDS) for (const kind of ["pointerover", "pointerout"]) at(id).addEventListener(kind, mark);
  addEventListener("resize", fit);
  choose(state.facts.presets[state.facts.start]);
}

begin();
