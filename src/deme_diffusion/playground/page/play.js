"use strict";
// The page of `deme play`: what is chosen, asked of the server, shown. Everything is put in as text, never as HTML.
const DEBOUNCE = 150, POLL = 400, MANY = 6, GRIDS = ["base", "merged", "changes"];
const at = (id) => document.getElementById(id);
const state = { weights: [], by_layer: false, known: "", timer: 0, asked: 0, facts: null, running: new Set(), stopped: false, polling: 0 };
const page = named();

function named() {
  // A page that is loaded again takes its own requests back; a copied tab is another page.
  const again = performance.getEntriesByType("navigation")[0]?.type === "reload", made = Math.random().toString(36).slice(2, 14);
  try {
    const name = (again && sessionStorage.getItem("page")) || made;
    sessionStorage.setItem("page", name);
    return name;
  } catch { return made; }  // a browser that stores nothing
}

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

function listed(weights, by_layer) {
  if (!state.facts.weighted) return "";
  const first = weights.slice(0, MANY).map(shown).join(", "), more = weights.length > MANY ? ", …" : "";
  return `w = (${first}${more})${by_layer ? " by layer" : ""}`;
}

async function ask(path, body) {
  const post = { method: "POST", headers: { "content-type": "application/json" } };
  const sent = { page, server: state.facts?.server, ...body };
  const answer = await fetch(path, body && { ...post, body: JSON.stringify(sent) }).catch(() => {
    throw new Error("The server does not answer: is deme play still running?");
  });
  const told = await answer.json().catch(() => { throw new Error(`The server's answer was cut short (${answer.status}).`); });
  if (told.reload) at("reload").hidden = false;
  if (told.error) throw new Error(told.error);
  return told;
}

function say(id, text, wrong = false) {
  at(id).textContent = text;
  at(id).classList.toggle("error", wrong);
}

// -- building the page ---------------------------------------------------------------------------

function build(facts) {
  document.title = `${facts.name} · playground · deme`;
  at("name").textContent = facts.name;
  at("about").textContent = `${facts.folder} · base ${facts.base} · ${facts.experts.length} experts merged by ${facts.method}`;
  at("notes").replaceChildren(...facts.notes.map((note) => made("li", note)));
  if (facts.weighted) {
    at("sliders").replaceChildren(...facts.experts.map(slider));
  } else {
    at("weighing").textContent = "Merged model";
    at("keeping").textContent = "Keep this model";
  }
  if (facts.weighted && facts.experts.length > MANY) scrolls(at("sliders"));
  at("unweighted").hidden = facts.weighted;
  at("sum").hidden = !facts.weighted;
  presets(facts);
  const own = made("optgroup", undefined, { label: "of the recipe" }), stock = made("optgroup", undefined, { label: "others" });
  facts.samplers.forEach(({ label }, i) => (i < facts.listed ? own : stock).append(made("option", label, { value: label })));
  at("sampler").replaceChildren(own, ...(stock.children.length ? [stock] : []));
  at("steps").max = facts.timesteps;
  at("images").max = facts.most.images;
  at("seed").max = facts.most.seed;
  at("save-name").value = facts.save_as;
  at("loss-note").textContent = `The denoising loss on at most ${facts.loss_images} images of the search split: the report split stays unseen. A lower loss is not yet better images.`;
  sampling(facts);
}

function scrolls(box) {
  box.classList.add("many");
  for (const [name, value] of Object.entries({ tabindex: 0, role: "region", "aria-label": "Weights of the experts" })) box.setAttribute(name, value);
}

function presets(facts) {
  // Each expert alone is the last ones of the list; of many experts they are in a select.
  const many = facts.weighted && facts.experts.length > MANY, split = many ? facts.presets.length - facts.experts.length : facts.presets.length;
  state.buttons = facts.presets.slice(0, split).map((preset) => button(preset.name, preset.what, () => choose(preset)));
  const reset = button("reset", "weights as the page began, and the recipe's first sampler", () => { sampling(facts); choose(facts.presets[facts.start]); });
  at("presets").replaceChildren(...state.buttons, ...(many ? [alone(facts, split)] : []), reset);
}

function alone(facts, split) {
  const select = made("select", undefined, { id: "alone", "aria-label": "One expert alone" });
  select.append(made("option", "expert …", { value: "" }));
  facts.presets.slice(split).forEach((preset, i) => select.append(made("option", `${preset.name} alone`, { value: split + i })));
  select.addEventListener("change", () => { if (select.value) choose(facts.presets[select.value]); });
  return select;
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
  const { bounds: [low, high], most, timesteps } = state.facts, id = `w${i}`;
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
  const called = `weight of ${expert.name}, timesteps ${expert.range}`;
  const number = made("input", undefined, { id: `${id}n`, type: "number", min: -most.weight, max: most.weight, step: "any", required: "" });
  range.setAttribute("aria-label", called);
  number.setAttribute("aria-label", `${called}, as a number`);
  range.addEventListener("input", () => { number.value = shown(range.valueAsNumber); moved(i, range.valueAsNumber); });
  number.addEventListener("input", () => {
    if (!number.checkValidity()) return changed();  // which says what is wrong
    range.value = number.value;
    moved(i, number.valueAsNumber);
  });
  const inputs = made("div", undefined, { class: "inputs" });
  inputs.append(range, number);
  row.append(label, where, inputs);
  return row;
}

// -- what is chosen --------------------------------------------------------------------------------

function moved(i, weight) {
  state.weights[i] = weight;
  state.by_layer = false;
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
  range.setAttribute("aria-valuetext", shown(state.weights[i]));  // which may lie beyond the slider, or between its steps
  at(`w${i}n`).title = String(state.weights[i]);
}

function choose(preset) {
  state.weights = [...preset.values];
  state.by_layer = preset.by_layer;
  if (state.facts.weighted) state.weights.forEach((w, i) => { at(`w${i}`).value = w; at(`w${i}n`).value = shown(w); colour(i); });
  changed(0);
}

function changed(delay = DEBOUNCE) {
  const { facts, weights, by_layer } = state, pressed = facts.presets.map((one) => one.by_layer === by_layer && equal(one.values, weights));
  state.buttons.forEach((one, i) => one.setAttribute("aria-pressed", pressed[i]));
  if (at("alone")) { const i = pressed.indexOf(true, state.buttons.length); at("alone").value = i < 0 ? "" : i; }
  const layers = by_layer ? " · by layer, as the search found them: the sliders show means, and moving one leaves them" : "";
  at("sum").textContent = `Σ w = ${shown(weights.reduce((sum, w) => sum + w, 0))}${layers}`;
  for (const id of ["measured", "saved"]) if (at(id).classList.contains("error")) say(id, "");
  clearTimeout(state.timer);
  state.timer = setTimeout(sample, delay);
}

function weighed() {
  // The weights as they are shown: none are sampled, measured or saved while a field holds something else.
  const { facts, weights, by_layer } = state, wrong = weights.findIndex((_, i) => facts.weighted && !at(`w${i}n`).checkValidity());
  if (wrong >= 0) throw new Error(`weight of ${facts.experts[wrong].name}: a number from ${-facts.most.weight} to ${facts.most.weight}`);
  return { weights: [...weights], by_layer };
}

function chosen() {
  const wrong = ["steps", "images", "seed"].find((id) => !at(id).checkValidity());
  if (wrong) throw new Error(`${at(wrong).parentElement.firstChild.textContent.trim()}: ${at(wrong).validationMessage}`);
  const number = (id) => at(id).valueAsNumber;
  return { sampler: at("sampler").value, steps: number("steps"), images: number("images"), seed: number("seed") };
}

// -- what runs -------------------------------------------------------------------------------------

function begun(kind) {
  state.running.add(kind);
  state.stopped = false;
  state.polling ||= setInterval(progress, POLL);
}

function ended(kind) {
  state.running.delete(kind);
  if (state.running.size) return;
  clearInterval(state.polling);
  state.polling = 0;
  at("busy").hidden = true;
}

const KINDS = ["samples", "loss", "save"];
const said = ([doing, done, total]) => (total ? `${doing}, ${done} of ${total}` : doing);

async function progress() {
  const told = await fetch(`api/progress?page=${page}&server=${state.facts.server}`).then((answer) => answer.json()).catch(() => ({}));
  const found = KINDS.filter((kind) => state.running.has(kind) && Array.isArray(told[kind]));
  at("busy").hidden = !found.length;
  if (!found.length) return;
  const first = found.find((kind) => !told[kind][0].startsWith("waiting")) ?? found[0], [, done, total] = told[first], bar = at("progress");
  if (total) { bar.max = total; bar.value = done; } else bar.removeAttribute("value");
  at("doing").textContent = said(told[first]);
  if (found.includes("save")) say("saved", `Saving: ${told.save[2] && !told.save[0].startsWith("waiting") ? percent(told.save[1] / told.save[2]) : said(told.save)}`);
}

async function stop() {
  clearTimeout(state.timer);
  state.stopped = true;
  await ask("api/stop", {}).catch((error) => say("status", error.message, true));
}

const superseded = () => (state.stopped ? "Stopped." : "Not finished: something newer was asked for. Ask again.");

// -- samples ---------------------------------------------------------------------------------------

async function sample() {
  const asked = ++state.asked, current = () => asked === state.asked;
  at("merged").setAttribute("aria-busy", "true");
  begun("samples");
  try {
    const weights = weighed(), choice = chosen();
    const told = await ask("api/samples", { ...weights, known: state.known, ...choice });
    if (!current()) return;
    if (told.superseded) say("status", superseded());
    else show(told, weights, choice);
  } catch (error) {
    if (current()) say("status", error.message, true);
  } finally {
    if (current()) { at("merged").removeAttribute("aria-busy"); ended("samples"); }
  }
}

function show(told, { weights, by_layer }, { seed, images }) {
  state.known = told.key;
  const last = images > 1 ? `seeds ${seed} to ${seed + images - 1}` : `seed ${seed}`, by = listed(weights, by_layer);
  told.named = told.merged.map((_, i) => [`seed ${seed + i}`, told.prompts[i]].filter(Boolean).join(": "));
  if (told.base) fill("base", told.base, told, `${images} samples of the base, ${last}`);
  fill("merged", told.merged, told, `${images} samples of the merged model, ${last}${by && `, ${by}`}`);
  fill("changes", told.changes, told, `What changed from the base to the merged model, ${last}`);
  at("base-name").textContent = `· ${told.sampler} · ${last}`;
  at("merged-name").textContent = by && `· ${by}`;
  at("merged-name").title = state.facts.weighted ? weights.map(String).join(", ") : "";
  at("change").textContent = percent(told.change);
  at("change").title = "norm of θ merged − θ over the norm of θ";
  at("difference").textContent = `${told.difference.toFixed(2)} of 255`;
  at("difference").title = "mean absolute difference of a pixel, merged − base";
  at("merge-time").textContent = seconds(told.merge_seconds);
  at("sample-time").textContent = seconds(told.sample_seconds);
  say("status", `${images} ${images > 1 ? "images" : "image"} by ${told.sampler}, ${last}.`);
  at("command").textContent = told.command;
  at("command").hidden = at("measuring").hidden = !told.command;
  fit();
}

function fill(id, coded, { height, width, named }, label) {
  const grid = at(id);
  while (grid.children.length > coded.length) grid.lastChild.remove();
  while (grid.children.length < coded.length) grid.append(made("img", undefined, { alt: "" }));
  coded.forEach((data, i) => Object.assign(grid.children[i], { src: `data:image/png;base64,${data}`, width, height, title: named[i] }));
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
  at("measure").disabled = true;
  begun("loss");
  say("measured", "Measuring…");
  try {
    const asked = weighed(), told = await ask("api/loss", asked);
    if (told.superseded) return say("measured", state.stopped ? "Stopped." : "The weights or the sampler changed: measure again.");
    const rows = told.base.map((base, i) => row(state.facts.ranges[i], base, told.merged[i]));
    at("loss-rows").replaceChildren(...rows, row("all", ...told.overall));
    const by = listed(asked.weights, asked.by_layer), draws = `${told.draws} ${told.draws > 1 ? "draws" : "draw"} in each range`;
    at("loss-at").textContent = `${by ? `At ${by}: ` : ""}${told.images} images, ${draws}`;
    at("losses").hidden = false;
    say("measured", `${told.overall[1].toPrecision(4)}, the base's ${told.overall[0].toPrecision(4)}.`);
  } catch (error) {
    say("measured", error.message, true);
  } finally {
    at("measure").disabled = false;
    ended("loss");
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
  begun("save");
  say("saved", "Saving…");
  try {
    const told = await ask("api/save", { ...weighed(), name: at("save-name").value });
    if (told.superseded) return say("saved", "Stopped: nothing was saved.");
    say("saved", `Saved: ${told.folder}`);
    at("loading").textContent = `from diffusers import DiffusionPipeline\npipeline = DiffusionPipeline.from_pretrained(${JSON.stringify(told.folder)})`;
    if (told.unfolded.length) at("loading").textContent += `\n# with the projections after ${told.unfolded.join(", ")}: see README.md there`;
    at("loading").hidden = false;
    at("save-name").value = told.next;
  } catch (error) {
    say("saved", error.message, true);
  } finally {
    at("save").disabled = false;
    ended("save");
  }
}

async function begin() {
  at("reload").addEventListener("click", () => location.reload());
  try {
    state.facts = await ask("api/facts");
  } catch (error) {
    return say("status", error.message, true);
  }
  build(state.facts);
  at("sampler").addEventListener("change", () => {
    at("steps").value = state.facts.samplers.find(({ label }) => label === at("sampler").value).steps;
    changed();
  });
  for (const id of ["steps", "images", "seed"]) at(id).addEventListener("input", () => changed(2 * DEBOUNCE));
  at("next").addEventListener("click", () => { at("seed").value = at("seed").valueAsNumber + at("images").valueAsNumber; changed(0); });
  at("measure").addEventListener("click", measure);
  at("stop").addEventListener("click", stop);
  at("saving").addEventListener("submit", save);
  for (const id of ["weights", "sampling"]) at(id).addEventListener("submit", (event) => { event.preventDefault(); changed(0); });
  for (const id of GRIDS) for (const kind of ["pointerover", "pointerout"]) at(id).addEventListener(kind, mark);
  addEventListener("resize", fit);
  choose(state.facts.presets[state.facts.start]);
}

begin();
