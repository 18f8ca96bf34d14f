"use strict";
// The sample browser. Everything of the data is put into the page as text, never as HTML.
(() => {
  const { levels, datasets } = JSON.parse(document.getElementById("data").textContent);
  const element = (id) => document.getElementById(id);
  const [datasetBox, settingBox, sampleBox] = ["dataset", "setting", "sample"].map(element);
  const usable = datasets.map((one) => ({ ...one, groups: one.groups.filter((group) => group.samples.length) }))
    .filter((one) => one.groups.length);
  const LONG = 260; // characters of an answer that are shown without opening it
  let shown; // the setting and the id shown last, kept where another choice has them too

  function make(tag, options = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(options)) {
      if (name === "text") made.textContent = value;
      else if (name === "style") for (const [key, set] of Object.entries(value)) made.style.setProperty(key, set);
      else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }

  const named = (name) => name.split(",").flatMap((part, i) => (i ? [",", make("wbr"), part] : [part]));
  const dataset = () => usable[datasetBox.selectedIndex];
  const group = () => dataset().groups[settingBox.selectedIndex];
  const sample = () => group().samples[sampleBox.selectedIndex];

  function fill(box, names, keep) {
    box.replaceChildren(...names.map((name) => make("option", { text: name })));
    box.selectedIndex = names.length ? Math.max(0, keep) : -1;
  }

  function fillSettings(name) {
    const names = dataset().groups.map((one) => one.setting);
    fill(settingBox, names, names.indexOf(name));
    element("setting-label").hidden = names.length < 2;
  }

  function fillSamples(id) {
    const { samples } = group();
    const names = samples.map((one) => `${one.id} (spread ${one.spread})`);
    fill(sampleBox, names, samples.findIndex((one) => one.id === id));
  }

  function answer(of, index) {
    const place = of.answer[index];
    if (place < 0) return [make("span", { class: "empty", text: "no record" })];
    const [text, score] = of.answers[place];
    if (score === undefined) return [make("span", { class: "error", text: `failed: ${text}` })];
    const chip = make("span", { class: "chip", text: score.toFixed(1), style: { "--strength": `${score * 0.45}%` } });
    if (text.length <= LONG) {
      const said = text.trim() ? make("span", { text }) : make("span", { class: "empty", text: "empty answer" });
      return [chip, said];
    }
    const start = text.slice(0, LONG - 60).trimEnd();
    return [chip, make("details", {}, make("summary", { text: `${start} …` }), make("span", { text }))];
  }

  function heads(grid) {
    const layers = grid.split(".").map((layer) => [...layer].map((level) => levels.indexOf(level) / (levels.length - 1)));
    const drawn = make("div", {
      class: "heads",
      role: "img",
      "aria-label": `share kept in ${layers.length} layers with ${layers[0].length} KV heads`,
      style: { "grid-template-rows": `repeat(${layers[0].length}, auto)` },
    });
    layers.forEach((layer, l) => layer.forEach((share, h) => drawn.append(make("i", {
      title: `layer ${l}, KV head ${h}: ${Math.round(100 * share)} %`, style: { "--share": `${100 * share}%` },
    }))));
    return drawn;
  }

  function cell(of, index) {
    const [, , , status] = group().cells[index];
    const made = make("div", { class: "cell" }, make("div", { class: "answer" }, ...answer(of, index)));
    const kept = make("div", { class: "kept" });
    if (of.grid[index] >= 0) kept.append(heads(of.grids[of.grid[index]]));
    if (of.kept[index] >= 0) kept.append(make("span", { text: `${of.kept[index]} % kept` }));
    if (status) kept.append(make("span", { class: "error", text: status }));
    if (kept.childNodes.length) made.append(kept);
    return made;
  }

  function table(of) {
    const { methods, budgets, cells } = group();
    const cut = cells.map((one, index) => [...one, index]).filter(([, , isFull]) => !isFull);
    const columns = budgets.map((_, b) => b).filter((b) => cut.some((one) => one[1] === b));
    const rows = methods.map((_, m) => m).filter((m) => cut.some((one) => one[0] === m));
    if (!rows.length) return make("p", { class: "nothing", text: "No method that evicts was run on it." });
    const head = make("tr", {}, make("th", { scope: "col", text: "method" }),
      ...columns.map((b) => make("th", { scope: "col", text: `budget ${budgets[b]}` })));
    const body = rows.map((m) => make("tr", {}, make("th", { scope: "row" }, ...named(methods[m])),
      ...columns.map((b) => make("td", {},
        ...cut.filter((one) => one[0] === m && one[1] === b).map((one) => cell(of, one[4]))))));
    return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "answers by method and budget" },
      make("table", { class: "answers" }, make("thead", {}, head), make("tbody", {}, ...body)));
  }

  function show() {
    const of = sample();
    const [prompt, place] = [dataset().prompts[of.id], group()];
    shown = { setting: place.setting, id: of.id };
    const full = place.cells.map((one, index) => [...one, index]).filter(([, , isFull]) => isFull);
    const end = make("div", {}, make("h3", { text: "End of the prompt" }), prompt === undefined
      ? make("p", { class: "empty", text: `Not available here: ${dataset().noPrompts || "the data set has no such row"}.` })
      : make("pre", { text: `…${prompt}` }));
    const references = make("div", {}, make("h3", { text: "References" }),
      make("ul", {}, ...of.references.map((text) => make("li", { text }))));
    if (full.length) references.append(make("h3", { text: "Full cache", style: { "margin-top": "0.9rem" } }),
      ...full.map((one) => cell(of, one[4])));
    const legend = make("p", { class: "count" }, make("span", { text: "Score and answer; below, what was kept of the " +
      "answer's tokens: a column a layer, a row a KV head, none " }), make("span", { class: "legend" }),
    make("span", { text: " all." }));
    element("shown").replaceChildren(make("div", { class: "sample" }, end, references), legend, table(of));
    const capped = place.samples.length < place.n
      ? ` that keep the page below 10 MB, of ${place.n} that were run` : "";
    element("count").textContent = `Sample ${sampleBox.selectedIndex + 1} of ${place.samples.length}${capped}: ` +
      "those first on which the scores of the methods and budgets differ most.";
    element("previous").disabled = sampleBox.selectedIndex <= 0;
    element("next").disabled = sampleBox.selectedIndex >= place.samples.length - 1;
  }

  // #sample=DATA_SET/ID, and /SETTING where there are several
  const link = () => "#sample=" + [dataset().name, sample().id, ...(dataset().groups.length > 1 ? [group().setting] : [])]
    .map(encodeURIComponent).join("/");

  function chosen() {
    history.replaceState(null, "", link());
    show();
  }

  function follow() {
    if (!location.hash.startsWith("#sample=")) return false;
    let parts;
    try {
      parts = location.hash.slice("#sample=".length).split("/").map(decodeURIComponent);
    } catch {
      return false;
    }
    const place = usable.findIndex((one) => one.name === parts[0]);
    if (place < 0) return false;
    datasetBox.selectedIndex = place;
    fillSettings(parts[2]);
    fillSamples(parts[1]);
    show();
    element("samples").scrollIntoView({ behavior: "instant" });
    return true;
  }

  function step(by) {
    sampleBox.selectedIndex += by;
    chosen();
  }

  element("browser").hidden = false;
  if (!usable.length) {
    element("browser").replaceChildren(make("p", { class: "nothing", text: "No cell has samples that can be read." }));
    return;
  }
  fill(datasetBox, usable.map((one) => one.name), 0);
  datasetBox.addEventListener("change", () => { fillSettings(shown.setting); fillSamples(); chosen(); });
  settingBox.addEventListener("change", () => { fillSamples(shown.id); chosen(); });
  sampleBox.addEventListener("change", chosen);
  element("previous").addEventListener("click", () => step(-1));
  element("next").addEventListener("click", () => step(1));
  element("browser").querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("hashchange", follow);
  fillSettings();
  fillSamples();
  if (!follow()) show();
})();
