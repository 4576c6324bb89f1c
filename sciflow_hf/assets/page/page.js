"use strict";
// The report of a run or an evaluation. All text of the data is set as text, never as HTML.

const BATCH = 24; // rows that are added at a time
const $ = (id) => document.getElementById(id);
const blocks = [...document.querySelectorAll('script[type="application/json"]:not(#data)')];
const thumbnails = new Map(); // block -> its thumbnails, decoded when first needed

let page = JSON.parse($("data").textContent);
let ordered = []; // the rows that pass the filter, sorted
let shown = BATCH;
let open = null; // {row, before, after}: what the viewer shows
let returnTo = null; // the row whose image opened it
const hidden = new Set(); // columns
const elements = new Map(); // name of a row -> {key, element}

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}

const option = (value, label = value) => make("option", { value, textContent: label });
const linkTo = (path) => path.split("/").map(encodeURIComponent).join("/");
const format = (value) => (value === null || value === undefined ? "–" : String(+value.toPrecision(3)));
const words = (name) => name.replaceAll("_", " ");

// ---- images ----

function thumbnail(picture) {
  if (page.follow) return `thumbnails/${linkTo(picture.path)}?${picture.version}`;
  const block = page.blocks[picture.path];
  if (!thumbnails.has(block)) thumbnails.set(block, JSON.parse(blocks[block].textContent));
  return thumbnails.get(block)[picture.path];
}

const original = (picture) => linkTo(picture.path) + (page.follow ? `?${picture.version}` : "");

function scoreOf(row, metric, of) {
  const value = (column) => row.pictures[column]?.scores[metric] ?? null;
  if (!of.startsWith("-")) return value(of);
  const [after, before] = [value(of.slice(1)), value(page.base)];
  return after === null || before === null ? null : after - before;
}

function scores(picture, column, row) {
  const chosen = page.metrics[$("sort").value] === undefined ? [] : [$("sort").value];
  const names = [...new Set([...chosen, ...Object.keys(page.metrics)])].filter((n) => n in picture.scores);
  return names.slice(0, 3).map((name, i) => {
    const span = make("div", { className: i === 0 ? "first" : "" }, `${words(name)} ${format(picture.scores[name])}`);
    const difference = column === page.base ? null : scoreOf(row, name, `-${column}`);
    if (difference) {
      const better = difference > 0 === page.metrics[name];
      span.append(" ", make("span", { className: better ? "good" : "bad" }, `${difference > 0 ? "+" : ""}${format(difference)}`));
    }
    return span;
  });
}

function figure(row, column) {
  const picture = row.pictures[column];
  const caption = make("figcaption", {}, make("b", { dir: "auto" }, column));
  if (!picture || picture.problem) {
    return make("figure", {}, make("div", { className: "empty" }, picture ? picture.problem : "none"), caption);
  }
  caption.append(...scores(picture, column, row));
  if (picture.note) caption.append(make("span", { className: "note" }, picture.note));
  const image = make("img", { alt: "", loading: "lazy", decoding: "async", width: picture.width, height: picture.height });
  if (picture.width < 200) image.className = "pixels";
  image.onerror = () => image.closest("button").replaceWith(make("div", { className: "empty" }, "cannot be read"));
  image.src = thumbnail(picture);
  const label = `${column}, ${row.prompt || row.name}: compare`;
  const button = make("button", { type: "button", className: "shot", "aria-label": label }, image);
  button.onclick = () => view(row.name, column);
  return make("figure", {}, button, caption);
}

const columnsShown = () => page.columns.filter((column) => !hidden.has(column));

function rowElement(row) {
  const key = JSON.stringify([row, columnsShown(), $("sort").value]);
  const known = elements.get(row.name);
  if (known?.key === key) return known.element;
  const facts = Object.entries(row.facts).map(([name, value]) => `${words(name)} ${value}`);
  const head = make("div", { className: "head" },
    make("div", { className: "prompt", dir: "auto" }, row.prompt || row.name),
    make("div", { className: "fact" }, facts.slice(0, 2).join(" · ")));
  const strip = make("div", { className: "strip" }, ...columnsShown().map((column) => figure(row, column)));
  const element = make("article", { className: "row" }, head, strip);
  element.setAttribute("aria-label", row.prompt || row.name);
  elements.set(row.name, { key, element });
  return element;
}

// Sorts and filters, then shows the first rows; unless `keep`, from the top.
function update(keep = false) {
  const sort = $("sort").value, metric = sort in page.metrics, of = $("of").value, first = $("order").value === "first";
  $("of-label").hidden = !metric;
  const asked = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const text = ({ prompt, name, facts: { seed, size, ...others } }) => [prompt || name, ...Object.values(others)].join(" ").toLowerCase();
  ordered = page.rows.filter((row) => asked.every((word) => text(row).includes(word)));
  if (metric) {
    const up = page.metrics[sort] === first ? 1 : -1; // worst first: ascending where higher is better
    const value = new Map(ordered.map((row) => [row, scoreOf(row, sort, of)]));
    ordered.sort((a, b) => {
      const [x, y] = [value.get(a), value.get(b)];
      return x === null || y === null ? (x === null) - (y === null) : up * (x - y);
    });
  } else {
    if (sort === "-prompt") ordered.sort((a, b) => a.prompt.localeCompare(b.prompt));
    if (!first) ordered.reverse();
  }
  if (!keep) shown = BATCH;
  render();
}

function render() {
  const focused = document.activeElement?.closest?.(".row") ? document.activeElement : null;
  const visible = ordered.slice(0, shown).map(rowElement);
  const rows = $("rows");
  rows.style.setProperty("--columns", columnsShown().length);
  visible.forEach((element, i) => { if (rows.children[i] !== element) rows.insertBefore(element, rows.children[i] ?? null); });
  while (rows.children.length > visible.length) rows.lastChild.remove();
  if (focused?.isConnected) focused.focus({ preventScroll: true });
  const all = page.rows.length;
  const number = ordered.length === all ? `${all} rows` : `${ordered.length} of ${all} rows`;
  $("count").textContent = ordered.length ? number : `No row has these words: ${$("filter").value}`;
  $("more").hidden = ordered.length <= shown;
}

function more() {
  shown += BATCH;
  render();
}

// ---- the viewer: before and after ----

function view(name, column) {
  const row = page.rows.find((each) => each.name === name);
  const there = page.columns.filter((name) => row.pictures[name] && !row.pictures[name].problem);
  const other = there.filter((name) => name !== column);
  const before = other.includes(page.base) ? page.base : other.at(-1) ?? column;
  open = column === page.base && other.length ? { row, before: column, after: other.at(-1) } : { row, before, after: column };
  returnTo = row;
  showViewer();
  if (!$("viewer").open) $("viewer").showModal();
  $("slider").focus();
}

function showViewer() {
  const { row } = open;
  const there = page.columns.filter((name) => row.pictures[name] && !row.pictures[name].problem);
  for (const side of ["before", "after"]) {
    if (!there.includes(open[side])) open[side] = there[side === "before" ? 0 : there.length - 1] ?? "";
    $(side).replaceChildren(...there.map((name) => option(name)));
    $(side).value = open[side];
    document.querySelector(`.side.${side}`).textContent = open[side];
  }
  const at = ordered.indexOf(row);
  $("viewer-title").textContent = at < 0 ? row.name : `${at + 1} of ${ordered.length}`;
  $("previous").disabled = at <= 0;
  $("next").disabled = at < 0 || at >= ordered.length - 1;
  $("viewer-prompt").textContent = row.prompt || row.name;
  const pictures = [row.pictures[open.before], row.pictures[open.after]];
  $("compare").hidden = !pictures[0];
  if (pictures[0]) showPair(pictures);
  const metrics = Object.keys(page.metrics).filter((name) => pictures.some((picture) => picture && name in picture.scores));
  const lines = metrics.map((name) => {
    const [x, y] = pictures.map((picture) => picture?.scores[name] ?? null);
    return [words(name), format(x), format(y), x === null || y === null ? "–" : format(y - x)];
  });
  const facts = [["name", row.name], ...Object.entries(row.facts)];
  $("viewer-facts").replaceChildren(
    ...(lines.length ? [table({ title: "", columns: ["score", open.before, open.after, "difference"], rows: lines })] : []),
    table({ title: "", columns: [], rows: facts }));
  move();
}

function showPair(pictures) {
  const links = ["before", "after"].map((side, i) => {
    const image = $(`image-${side}`), picture = pictures[i];
    image.className = picture.width < 400 ? "pixels" : "";
    image.alt = open[side];
    image.onerror = () => {
      image.onerror = null;
      image.src = thumbnail(picture);
      $("viewer-note").textContent = "The full image is not in its place next to this file: its thumbnail is shown.";
    };
    image.src = original(picture);
    return make("a", { href: original(picture), target: "_blank", rel: "noopener" }, `${open[side]} (${picture.width} x ${picture.height})`);
  });
  const { width, height } = pictures[0];
  const scale = Math.min(innerWidth < 640 ? innerWidth - 26 : Math.min(1140, innerWidth - 60), (innerHeight * 0.62 * width) / height, 8 * width);
  $("compare").style.width = `${Math.round(scale)}px`;
  $("compare").style.aspectRatio = `${width} / ${height}`;
  $("viewer-note").replaceChildren("Open: ", links[0], ", ", links[1]);
}

function move() {
  const part = $("slider").value;
  $("compare").style.setProperty("--cut", `${part}%`);
  $("slider").setAttribute("aria-label", `Slider between ${open.before} and ${open.after}`);
  $("slider").setAttribute("aria-valuetext", `${part} % ${open.before}, ${100 - part} % ${open.after}`);
}

function turn(by) {
  const row = ordered[ordered.indexOf(open.row) + by];
  if (!row) return;
  open.row = returnTo = row;
  while (ordered.indexOf(row) >= shown) more();
  showViewer();
}

// ---- tables and charts ----

function table({ title, columns, rows }) {
  const head = columns.length ? [make("thead", {}, make("tr", {}, ...columns.map((name) => make("th", { scope: "col", dir: "auto" }, name))))] : [];
  const body = rows.map(([name, ...cells]) => make("tr", {}, make("th", { scope: "row", dir: "auto" }, name), ...cells.map((cell) => make("td", { dir: "auto" }, cell))));
  const scroll = make("div", { className: "table" }, make("table", {}, ...head, make("tbody", {}, ...body)));
  return make("div", { className: "block" }, title ? make("h2", {}, title) : null, scroll);
}

function svg(tag, attributes, text = "") {
  const element = document.createElementNS($("svg").content.firstChild.namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

// Round numbers between two values, about as many as asked for.
function ticks(low, high, number) {
  const rough = (high - low) / number || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((factor) => factor * power >= rough) ?? 10);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => +((first + i) * step).toPrecision(12));
}

function logTicks(low, high) {
  const powers = ticks(Math.floor(Math.log10(low)), Math.ceil(Math.log10(high)), 8).filter(Number.isInteger);
  const factors = high / low > 1000 ? [1] : [1, 2, 5];
  return powers.flatMap((power) => factors.map((factor) => factor * 10 ** power)).filter((value) => value >= low && value <= high);
}

function chartElement(chart) {
  const { title, lines } = chart;
  const picture = svg("svg", { role: "img", tabindex: "0", "aria-label": `${title}: ${lines.map((line) => `${line.name} ${format(line.values[0])} to ${format(line.values.at(-1))}`).join(", ")}. Arrow keys read values.` });
  const legend = make("div", { className: "legend", role: "status" });
  const steps = [...new Set(lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
  const rows = () => steps.map((step) => [format(step), ...lines.map((line) => format(line.values[line.steps.indexOf(step)]))]);
  const values = make("details", {}, make("summary", {}, "Values"));
  values.ontoggle = () => { if (values.children.length < 2) values.append(table({ title: "", columns: ["step", ...lines.map((line) => line.name)], rows: rows() })); };

  const all = lines.flatMap((line) => [...line.values, ...line.low, ...line.high]);
  let [low, high] = [Math.min(...all), Math.max(...all)];
  const log = low > 0 && high > 4 * low && title !== "Learning rate";
  if (title === "Learning rate") low = 0;
  const margin = log ? 1.06 : (high - low || Math.abs(high) || 1) * 0.06;
  [low, high] = log ? [low / margin, high * margin] : [low === 0 ? 0 : low - margin, high + margin];
  const last = Math.max(1, ...steps), start = Math.min(0, ...steps);
  let at = -1, x, y;

  function read() {
    const step = steps[at];
    legend.replaceChildren(...lines.map((line) => {
      const i = line.steps.indexOf(step);
      const value = at < 0 || i < 0 ? null : make("b", {}, ` ${format(line.values[i])}`);
      return make("span", {}, make("i", { className: line.colour }), line.name, value);
    }));
    if (at >= 0) legend.prepend(make("span", {}, "step ", make("b", {}, format(step))));
    picture.querySelector(".cross")?.remove();
    if (at >= 0) picture.append(svg("line", { class: "cross", x1: x(step), x2: x(step), y1: 8, y2: 232 }));
  }

  function draw() {
    const width = picture.clientWidth;
    if (!width) return;
    picture.setAttribute("viewBox", `0 0 ${width} 260`);
    x = (step) => 56 + ((step - start) / (last - start)) * (width - 70);
    y = (value) => 232 - 224 * (log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low));
    const parts = [];
    for (const value of log ? logTicks(low, high) : ticks(low, high, 5)) {
      parts.push(svg("line", { class: "grid", x1: 56, x2: width - 14, y1: y(value), y2: y(value) }));
      parts.push(svg("text", { x: 50, y: y(value) + 4, "text-anchor": "end" }, format(value)));
    }
    for (const step of ticks(start, last, width < 420 ? 3 : 6)) {
      parts.push(svg("text", { x: x(step), y: 252, "text-anchor": "middle" }, step.toLocaleString("en")));
    }
    for (const line of lines) {
      const points = (heights) => line.steps.map((step, i) => `${x(step).toFixed(1)},${y(heights[i]).toFixed(1)}`);
      if (line.low.length) parts.push(svg("polygon", { class: `band ${line.colour}`, points: [...points(line.low), ...points(line.high).reverse()].join(" ") }));
      parts.push(svg("polyline", { class: `line ${line.colour}`, points: points(line.values).join(" ") }));
      if (steps.length < 25) parts.push(...line.steps.map((step, i) => svg("circle", { class: line.colour, cx: x(step), cy: y(line.values[i]), r: 2.6 })));
    }
    picture.replaceChildren(...parts);
    read();
  }

  picture.onpointermove = (event) => {
    const wanted = start + ((event.offsetX - 56) / (picture.clientWidth - 70)) * (last - start);
    at = steps.reduce((best, step, i) => (Math.abs(step - wanted) < Math.abs(steps[best] - wanted) ? i : best), 0);
    read();
  };
  picture.onpointerleave = picture.onblur = () => { at = -1; read(); };
  picture.onkeydown = (event) => {
    const go = { ArrowRight: at + 1, ArrowLeft: at < 0 ? steps.length - 1 : at - 1, Home: 0, End: steps.length - 1 }[event.key];
    if (go === undefined) return;
    at = Math.max(0, Math.min(steps.length - 1, go));
    event.preventDefault();
    read();
  };
  new ResizeObserver(draw).observe(picture);
  return make("figure", { className: "chart" }, make("figcaption", {}, title), picture, legend, values);
}

// ---- the page ----

const TABS = { images: "Images", losses: "Losses", scores: "Scores", details: "Details" };

function showTab(name, focus = false) {
  for (const button of $("tabs").children) {
    const chosen = button.dataset.tab === name;
    button.setAttribute("aria-selected", chosen);
    button.tabIndex = chosen ? 0 : -1;
    $(button.dataset.tab).hidden = !chosen;
    if (chosen && focus) button.focus();
  }
}

function fillTabs() {
  const filled = { images: page.rows.length, losses: page.charts.length, scores: page.scores.length, details: page.details.length };
  const names = Object.keys(TABS).filter((name) => filled[name]);
  const chosen = [...$("tabs").children].find((button) => button.getAttribute("aria-selected") === "true")?.dataset.tab;
  if (names.join() === [...$("tabs").children].map((button) => button.dataset.tab).join()) return;
  $("tabs").replaceChildren(...names.map((name) => {
    const button = make("button", { id: `tab-${name}`, type: "button", role: "tab", "aria-controls": name }, TABS[name]);
    button.dataset.tab = name;
    button.onclick = () => showTab(name);
    return button;
  }));
  const asked = location.hash.slice(1);
  showTab([chosen, asked].find((name) => names.includes(name)) ?? names[0]);
}

function fillTools() {
  const keep = (id, options, usual) => {
    const before = $(id).value;
    $(id).replaceChildren(...options);
    $(id).value = options.some((each) => each.value === before) && before ? before : usual;
  };
  const metrics = Object.keys(page.metrics), sort = $("sort").value;
  keep("sort", [option("-given", "as given"), option("-prompt", "prompt"), ...metrics.map((name) => option(name, words(name)))], "-given");
  const models = page.columns.filter((column) => page.rows.some((row) => Object.keys(row.pictures[column]?.scores ?? {}).length));
  const others = models.filter((column) => column !== page.base);
  keep("of", [...models.map((name) => option(name)), ...(models.includes(page.base) ? others.map((name) => option(`-${name}`, `${name} − ${page.base}`)) : [])], others.at(-1) ?? models[0] ?? "");
  fillOrder();
  const boxes = page.columns.map((column) => {
    const box = make("input", { type: "checkbox", checked: !hidden.has(column) });
    box.onchange = () => { hidden[box.checked ? "delete" : "add"](column); render(); };
    return make("label", {}, box, make("span", { dir: "auto" }, column));
  });
  $("columns").querySelector("fieldset").replaceChildren(make("legend", {}, "Shown side by side"), ...boxes);
  $("columns").hidden = page.columns.length < 2;
}

function fillOrder() {
  const before = $("order").value || "first", metric = $("sort").value in page.metrics;
  $("order").replaceChildren(option("first", metric ? "worst first" : "first to last"), option("last", metric ? "best first" : "last to first"));
  $("order").value = before;
}

function fill(keep) {
  document.title = page.title;
  $("title").textContent = page.title;
  $("subtitle").textContent = page.subtitle;
  $("notices").hidden = !page.notices.length;
  $("notices").querySelector("summary").textContent = page.notices.length === 1 ? "1 notice" : `${page.notices.length} notices`;
  $("notices").querySelector("ul").replaceChildren(...page.notices.map((text) => make("li", { dir: "auto" }, text)));
  $("notices").open ||= page.notices.length < 4;
  fillTabs();
  fillTools();
  update(keep);
  const focused = [...$("losses").children].findIndex((chart) => chart.contains(document.activeElement));
  $("losses").replaceChildren(...page.charts.map(chartElement));
  if (focused >= 0) $("losses").children[focused]?.querySelector("svg").focus();
  for (const part of ["scores", "details"]) $(part).replaceChildren(...page[part].map(table));
}

async function follow(seconds) {
  let tag = "";
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
    if (document.hidden) continue;
    try {
      const answer = await fetch("data.json", { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
      if (answer.status === 200) {
        page = { ...(await answer.json()), follow: seconds };
        tag = answer.headers.get("ETag") ?? "";
        fill(true);
        if (open && $("viewer").open) {
          open.row = page.rows.find((row) => row.name === open.row.name) ?? open.row;
          showViewer();
        }
      } else if (answer.status !== 304) throw new Error((await answer.text()).trim());
      $("live").className = "";
      $("live").textContent = "Following";
    } catch (error) {
      $("live").className = "lost";
      $("live").textContent = `Not up to date: ${error.message}`;
    }
  }
}

$("tools").onsubmit = (event) => event.preventDefault();
$("filter").oninput = () => update();
$("sort").onchange = () => { fillOrder(); update(); };
$("of").onchange = $("order").onchange = () => update();
const resize = () => { $("rows").style.setProperty("--size", `${$("size").value}px`); };
$("size").oninput = resize;
$("more").onclick = () => {
  const next = shown;
  more();
  $("rows").children[next]?.querySelector("button")?.focus();
};
new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting) && !$("more").hidden) more(); }, { rootMargin: "800px" }).observe($("more"));
$("tabs").onkeydown = (event) => {
  const buttons = [...$("tabs").children], at = buttons.indexOf(document.activeElement);
  const go = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
  if (go !== undefined) showTab(buttons.at(go % buttons.length).dataset.tab, true);
};
$("slider").oninput = move;
for (const side of ["before", "after"]) $(side).onchange = () => { open[side] = $(side).value; showViewer(); };
$("swap").onclick = () => { open = { row: open.row, before: open.after, after: open.before }; showViewer(); };
$("previous").onclick = () => turn(-1);
$("next").onclick = () => turn(1);
$("close").onclick = () => $("viewer").close();
$("viewer").onclick = (event) => { if (event.target === $("viewer")) $("viewer").close(); };
$("viewer").onkeydown = (event) => {
  const by = { PageUp: -1, PageDown: 1 }[event.key];
  if (by) { event.preventDefault(); turn(by); }
};
$("viewer").onclose = () => {
  const column = open.after;
  const index = columnsShown().indexOf(column);
  elements.get(returnTo.name)?.element.querySelectorAll("figure")[Math.max(index, 0)]?.querySelector("button")?.focus();
};
onresize = () => { if ($("viewer").open) showViewer(); };

const across = ($("main").clientWidth - 6) / page.columns.length - 12;
$("size").value = innerWidth < 640 ? 160 : Math.max(150, Math.min(240, across));
resize();
fill(false);
if (page.follow) follow(page.follow);
